"""Commands, names and lengths of the README and the pages in docs/, so that none goes stale."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from docs import file_list
from ray_app import cli
from ray_app.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
PAGES = [ROOT / "README.md", *DOCS]


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


COMMANDS = [line for page in PAGES for line in shell_lines(page) if re.match(r"(\.venv/bin/)?ray-app ", line)]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_is_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[-1] == "--help":
        return
    name, rest = cli.find_command(words)
    rest, trailing, _ = cli.split_trailing(cli.COMMANDS[name], rest)
    _, config_file, rest = cli.take_common(rest)
    if name in ("train", "tune") and {"--resume", "--watch"} & set(
        rest
    ):  # its settings are those of a run or a sweep that is not here
        with pytest.raises(StoreError, match=r"not the folder of a (run|sweep)"):
            cli.parse(name, cli.COMMANDS[name], config_file, rest)
        return
    assert cli.parse(name, cli.COMMANDS[name], config_file, rest, trailing)


def test_every_command_has_a_row_in_the_readme() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE)
    named = {f"{first} {rest}".strip() for row in rows for first, rest in row_words(row)}
    assert {name for name in cli.COMMANDS if name not in named} == set()


def row_words(row: str) -> list[tuple[str, str]]:
    """Split a row such as `jobs list\\|logs JOB` into one (command, subcommand) for each alternative."""
    first, *rest = row.replace("\\|", "|").split()
    second = rest[0] if rest and rest[0].replace("|", "").islower() else ""
    return [(first, each) for each in second.split("|")] if second else [(first, "")]


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(shell_lines(ROOT / "README.md"))))
    assert {"quickstart", "test"} <= named <= targets


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 220
    assert len(README.encode()) <= 15_000


@pytest.mark.parametrize("page", [page for page in DOCS if page.name != "files.md"], ids=lambda page: page.stem)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:ray_app|serve|benchmarks|tests|tune_configs)/[\w./-]+\.\w+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_pictures_are_small() -> None:
    assert {path.name for path in (ROOT / "docs" / "images").iterdir()} == {
        "console.png",
        "report.png",
        "event_proxies.svg",
    }
    assert all(path.stat().st_size < 150_000 for path in (ROOT / "docs" / "images").iterdir())


def test_every_dependency_has_its_reason_next_to_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    project = tomllib.loads("\n".join(lines))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    declared = [name for name in (*project["dependencies"], *extras) if not name.startswith("ray-app")]
    bare = [name for name in declared if not any(f'"{name}"' in line and "  # " in line for line in lines)]
    assert not bare


def test_the_list_of_files_is_that_of_the_docstrings() -> None:
    """Written again by `python -m docs.file_list`."""
    assert file_list.PAGE.read_text() == file_list.page()
