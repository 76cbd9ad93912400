"""Plain words: a list of words that no file of the project uses, and names that do not come back."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "told",
    "tells",
    "lies",  # "is", "is in"
    "stands",  # "is", "means"
    "beside",  # "next to", "with"
    "anew",  # "again"
    "mend(?:s|ed|ing)?",  # "fix"
    "whoever",
    "(?:go|goes|going|gone|went) on",  # "continue", "resume"
    "way on",  # "resume command"
    "nobody",
    "begun",  # "started"
    "as anybody",
    "for want of",
    "journals?",  # "event log"
)
PATTERN = re.compile("(?<![A-Za-z])(?i:" + "|".join(WORDS).replace(" ", r"[\s_]+") + ")(?![a-z])")

PARTS = ("ray_app", "serve", "docs", "tests", "benchmarks", "other")

RETIRED_NAMES = """
Answered Beside Bench Broken Capturer Compared Controls Cut Disk Drawing Edge Excerpt Held Journal JournalParts
Judge Judged Judgement Keeper Keys Lanes Measured Nameless NodeAddress ObjectStore Placed Rejected Resizing
Rig RunCopy RunFolder Scored Sketch Succession Survey SweepCopy SweepFolder Tally Tried Turn Unsaved Waiting
agreed_place asked_to_stop back_off bring_artifacts by_optuna cause_of cut_short fetch_folder following
folder_of going_on has_writer held_compressed judged_store keep_best kept_settings kind_of
let_go listed_sums most_alike newest_start no_listener no_room own_folder planned reigns refuse_changes
refuse_seen_pairs require_here require_newest run_at run_that_holds send_folder set_aside since_start
steps_told sweep_at take_signs_away tell_past tracked_run unsynced user_errors way_on way_on_told
why_not_again CHANGEABLE EXCHANGE_S FORGET HOPELESS KEPT_PLACES LOOK_S SUMS SWALLOW TOLD VOICES YOUNG_S
"""
RETIRED = set(RETIRED_NAMES.split())
"""Names of classes, functions and constants that were replaced by the field's own."""


def texts() -> list[Path]:
    """Files of the project that people read: code, configuration, pages."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [
        ROOT / name
        for name in names.splitlines()
        if not name.endswith((".json", ".gz", ".png", ".svg", ".jpg", ".mp4", ".avi", ".ts", ".safetensors"))
    ]
    exempt = {ROOT / "CHANGELOG.md", ROOT / "constraints.txt", Path(__file__).resolve()}
    return [path for path in paths if path not in exempt and path.is_file()]


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return "docs" if first == "README.md" else first if first in PARTS else "other"


@cache
def uses() -> dict[str, list[str]]:
    """Where a word of the list is used, as `file:line word`, by part of the project."""
    by_part: dict[str, list[str]] = {part: [] for part in PARTS}
    for path in texts():
        text = path.read_text()
        by_part[part_of(path)] += [
            f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1} {match.group()!r}"
            for match in PATTERN.finditer(text)
        ]
    return by_part


@pytest.mark.parametrize("part", PARTS)
def test_no_word_of_the_list_is_used(part: str) -> None:
    places = uses()[part]
    assert not places, "\n".join(places)


OPENINGS = re.compile(r"(What|Where|Whether|Who|Whose|Which|Of|As)\b")


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below fields and constants too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_a_docstring_opens_with_a_verb_or_a_noun() -> None:
    product = [path for path in texts() if path.suffix == ".py" and part_of(path) in ("ray_app", "serve")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {text[:60]!r}"
        for path in product
        for line, text in docstrings(path)
        if OPENINGS.match(text)
    ]
    assert not wrong, "\n".join(wrong)


def defined_in(path: Path) -> set[str]:
    """Names of the classes, functions and global constants of a module."""
    tree = ast.parse(path.read_text())
    globals_ = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = {name.id for node in globals_ for name in ast.walk(node) if isinstance(name, ast.Name)}
    return names | {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_retired_names_do_not_come_back() -> None:
    product = [path for path in texts() if path.suffix == ".py" and part_of(path) in ("ray_app", "serve")]
    back = {str(path.relative_to(ROOT)): names for path in product if (names := defined_in(path) & RETIRED)}
    assert not back


def test_words_are_found_in_identifiers_and_over_line_ends() -> None:
    text = "told_before, notTold, Told; it goes\non; besides, untold, Tellson"
    assert [match.group() for match in PATTERN.finditer(text)] == ["told", "Told", "goes\non"]


if __name__ == "__main__":
    print("\n".join(place for places in uses().values() for place in places))
    print({part: len(places) for part, places in uses().items()})
