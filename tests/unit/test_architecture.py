"""The layers of the project, held by reading every import, those inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ray_app"
EDGE = ROOT / "serve"
SERVE_MAY = {"sources.npy", "sources.images", "events.render"}
"""Of these layers the endpoint needs only what turns a recording or a picture into a feature, as `prepare` does."""

LAYERS: dict[str, tuple[set[str], set[str]]] = {
    # layer: (layers of ours it may import, foreign packages it may import)
    "errors": (set(), set()),
    "config": ({"config", "errors"}, {"pydantic"}),
    "core": ({"core", "errors"}, {"torch", "numpy"}),
    "events": ({"events", "errors"}, {"numpy"}),
    "sources": ({"sources", "events", "errors"}, {"numpy", "PIL", "h5py", "hdf5plugin", "av", "yaml", "aedat"}),
    "store": (
        {"store", "core", "config", "errors"},
        {"numpy", "torch", "pyarrow", "safetensors", "pydantic"},
    ),
    "commands": (
        {"jobs", "store", "sources", "events", "core", "config", "errors"},
        {"numpy", "torch", "pyarrow", "PIL", "ray", "mlflow", "rich", "jinja2", "matplotlib", "sqlalchemy"}
        | {"optuna", "pydantic", "yaml", "transformers", "psutil"}
        | {"serve"},  # `serve.app`, by its name and when it is started: it lies beside the package
    ),
    "serve": (
        {"serve", "store", "core", "sources", "events", "config", "errors"},
        {
            "ray",
            "fastapi",
            "starlette",
            "uvicorn",
            "pydantic",
            "torch",
            "numpy",
            "PIL",
            "prometheus_client",
            "opentelemetry",
        }
        | {"mlflow", "sqlalchemy"},
    ),
    "client": ({"client_wire", "errors"}, {"numpy"}),
    "client_wire": ({"errors"}, {"numpy"}),
    "command_table": ({"config"}, set()),
    "cli": ({"command_table", "commands", "runs", "cluster", "config", "errors"}, {"tyro", "yaml", "rich"}),
    "__main__": ({"cli"}, set()),
}
IMPURE = {
    "os",
    "time",
    "pathlib",
    "shutil",
    "subprocess",
    "socket",
    "datetime",
    "tempfile",
    "random",
    "logging",
}
STANDARD = set(__import__("sys").stdlib_module_names)


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if path.is_relative_to(EDGE):
                assert node.level or not (node.module or "").startswith("serve"), f"{path}: import relatively"
                names |= set() if node.level else {node.module or ""}
                continue
            assert node.level == 0, f"{path}: write imports from the root"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "ray_app" else {module}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            argument = ast.unparse(node.args[0]).strip("f'\"")
            names.add(argument)
    return names


def layer_of(path: Path) -> str:
    if path.is_relative_to(EDGE):
        return "serve"
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


FILES = sorted(path for folder in (PACKAGE, EDGE) for path in folder.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    layer = layer_of(path)
    if path.name == "__init__.py":
        assert not imports_of(path)
        return
    ours, foreign = LAYERS[layer]
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "ray_app":
            assert (rest or [""])[0] in ours, f"{layer} may not import {name}"
            if layer == "serve" and rest[0] in ("sources", "events"):
                assert ".".join(rest) in SERVE_MAY, f"{layer} may not import {name}"
        elif top not in STANDARD:
            assert top in foreign, f"{layer} may not import {name}"
        elif layer in ("core", "events"):
            assert top not in IMPURE, f"{layer} is pure and may not import {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_a_package_file_holds_a_docstring_and_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_module_opens_with_its_idea() -> None:
    silent = [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_no_file_of_the_endpoint_bears_a_name_of_the_standard_library() -> None:
    assert not {path.stem for path in EDGE.rglob("*.py")} & (STANDARD - {"__init__"})


def test_the_walk_sees_lazy_imports(tmp_path: Path) -> None:
    lazy = tmp_path / "lazy.py"
    lazy.write_text("def f():\n    import ray\n    from mlflow.tracking import MlflowClient\n")
    assert imports_of(lazy) == {"ray", "mlflow.tracking"}
