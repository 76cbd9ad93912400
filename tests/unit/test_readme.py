"""The README's commands are parsed by the real parser, so that none goes stale."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from ray_app import cli
from ray_app.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


COMMANDS = [line for page in PAGES for line in shell_lines(page) if re.match(r"(\.venv/bin/)?ray-app ", line)]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_is_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[-1] == "--help":
        return
    name, rest = cli.find_command(words)
    rest, trailing = cli.split_trailing(cli.COMMANDS[name], rest)
    _, config_file, rest = cli.take_common(rest)
    if name == "train" and "--resume" in rest:  # its settings are those of a run that is not here
        with pytest.raises(StoreError, match="not the folder of a run"):
            cli.parse(name, cli.COMMANDS[name], config_file, rest)
        return
    assert cli.parse(name, cli.COMMANDS[name], config_file, rest, trailing)


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(shell_lines(ROOT / "README.md"))))
    assert {"quickstart", "test"} <= named <= targets


def test_every_dependency_is_named_in_the_readme_with_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    declared = [name for name in (*project["dependencies"], *extras) if not name.startswith("ray-app")]
    declared = [re.match(r"[A-Za-z0-9_-]+", name)[0] for name in declared]
    table = {row.split("|")[1].strip(" `").split("[")[0] for row in README.splitlines() if row.startswith("| `")}
    assert set(declared) <= table, f"not in the README's table: {set(declared) - table}"


def test_every_file_and_folder_of_the_package_has_a_line_in_the_readme() -> None:
    files = [path for path in (ROOT / "ray_app").rglob("*.py") if path.name != "__init__.py"]
    missing = [str(path.relative_to(ROOT)) for path in files if f"`{path.name}`" not in README]
    assert not missing
