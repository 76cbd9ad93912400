"""Write the tables of numbers in README.md and docs/results/ from the files in benchmarks/results.

    python -m benchmarks.results_tables

A page marks a table's place with `<!-- table NAME -->` and `<!-- end -->`; `benchmarks/tables/` holds its contents.
A line for each result file follows, with commit, date and machine. Results of code that was not committed are
refused.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md")))
BLOCK = re.compile(r"<!-- table (?P<name>[a-z0-9-]+) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """Cells as text, and the results that they come from."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    results: Sequence[str]
    named: bool = True
    """List the result files below the table (not in the README, which links the page that does)."""


def read(name: str) -> dict[str, Any]:
    """One result by its name without `.json`; `FILE#PART` is a part with a provenance of its own."""
    file, _, part = name.partition("#")
    whole = json.loads((RESULTS / f"{file}.json").read_text())
    return whole[part] if part else whole


def value(name: str, path: str) -> Any:
    """One value of a result; `path` names keys and list positions, divided by slashes."""
    found: Any = read(name)
    for key in path.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def uncommitted(provenance: dict[str, Any]) -> bool:
    """Return True if the result was not made by the code of a commit."""
    return bool(provenance["uncommitted_changes"]) or not provenance["commit"]


def facts(*rows: tuple[str, str, str | Callable[[dict[str, Any]], Any], str | Callable[[Any], str], str]) -> Table:
    """One line for each (what, result, path or function of the result, format, goal)."""
    lines, results = [], []
    for what, name, path, form, wanted in rows:
        number = path(read(name)) if callable(path) else value(name, path)
        cell = form(number) if callable(form) else form.format(number)
        lines.append((what, cell, wanted or "–"))
        results.append(name)
    return Table(("what", "measured", "wanted"), lines, list(dict.fromkeys(results)))


def percent(number: float) -> str:
    """Return a share as percent with one decimal."""
    return f"{100 * number:.1f} %"


def points(number: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return f"{100 * number:+.1f}".replace("-", "−")


def source_line(name: str, page: Path) -> str:
    """Origin of a result: link, commit, date, machine, load."""
    origin = read(name)["provenance"]
    assert not uncommitted(origin), f"{name} is of code that was not committed: measure it again"
    up = "../" * len(page.relative_to(ROOT).parts[:-1])
    when = "before" if "load_when_saved" in origin else "at the end"  # what older results call load_at_start
    machine = origin["cpu"].replace("(R)", "").replace(" Processor", "")
    parts = [
        f"commit {origin['commit'][:7]}",
        origin["date"][:10],
        f"{origin['cores']} cores of an {machine}" + (f" and an {origin['gpu']}" if origin.get("gpu") else ""),
        *([f"load {origin['load_at_start']:.0f} {when}"] if origin.get("load_at_start") is not None else []),
    ]
    file, _, part = name.partition("#")
    return f"- [`{file}`]({up}benchmarks/results/{file}.json){f', {part}' if part else ''}: {', '.join(parts)}"


def rendered(table: Table, page: Path) -> str:
    """Return the table as Markdown, with a line for each result below it."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sources = (
        "\n".join(source_line(name, page) for name in table.results)
        if table.named and page.name != "README.md"
        else ""
    )
    return f"{text}\n\n{sources}\n" if sources else f"{text}\n"


def filled(text: str, page: Path) -> str:
    """Return the page's text with every table written again. KeyError: no table has the name."""
    tables: dict[str, Callable[[], Table]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "tables")]):
        tables |= importlib.import_module(f"benchmarks.tables.{module.name}").TABLES

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table {name} -->\n{rendered(tables[name](), page)}<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(), page))


if __name__ == "__main__":
    main()
