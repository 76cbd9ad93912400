"""Write docs/files.md: every Python file of the program with the first sentence of its docstring.

python -m docs.file_list
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "files.md"
FOLDERS = ("ray_app", "serve", "benchmarks")
HEAD = "# Files\n\nWritten by `python -m docs.file_list` from the files' docstrings. How they work together:\n"


def page() -> str:
    """Return the text of the page."""
    parts = [f"{HEAD}[architecture.md](architecture.md).\n"]
    for top in FOLDERS:
        folders = sorted({path.parent for path in (ROOT / top).rglob("*.py")})
        for folder in folders:
            files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            lines = [f"- `{path.name}`: {first_sentence(path)}" for path in files]
            if lines:
                parts.append(f"## {folder.relative_to(ROOT)}/\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def first_sentence(path: Path) -> str:
    """Return the first sentence of a file's docstring. ValueError: it has none."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring; give it one that says what is in it.")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z`])", paragraph)[0].replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
