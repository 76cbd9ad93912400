"""Share of small wrong changes to the code that the tests notice.

    python -m benchmarks.mutants
    python -m benchmarks.mutants --only evaluation client --jobs 2

`mutants.yaml` lists the changes: file, function, the words that are replaced, and the tests that should fail. Each is
made alone in a copy of the tracked files, and those tests are run until the first failure. A change that no test
notices is a law that no test holds. The tests are run once without a change first, and must pass.
Writes benchmarks/results/mutants.json, unless a part is run.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from benchmarks.provenance import require_commit, save

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".yaml")
FAILED, LIMIT_S = 1, 600
"""Exit code of pytest where a test failed; a change that makes a test wait for ever is noticed too."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong change."""

    file: str
    """Path in the repository."""
    function: str
    """`name` or `Class.name`; `` for the module's own lines."""
    old: str
    """Words that occur exactly once in that function."""
    new: str
    """Words in their place."""
    tests: tuple[str, ...]
    """Tests that cover the file, as pytest names them."""

    @property
    def name(self) -> str:
        return f"{self.file}:{self.function}: {self.old} -> {self.new}"

    def applied(self, source: str) -> str:
        """Return the file's text with the change. ValueError: no such function, or the words do not occur once."""
        first, last = 0, len(source)
        if self.function:
            lines = source.splitlines(keepends=True)
            node = find_function(ast.parse(source), self.function)
            first, last = sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))
        if (count := source[first:last].count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.function} has {self.old!r} {count} times, not once")
        return source[:first] + source[first:last].replace(self.old, self.new) + source[last:]


def find_function(tree: ast.AST, name: str) -> Any:
    """Return the definition of `name` or `Class.name`. ValueError: there is none."""
    node = tree
    for part in name.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part), None)
        if node is None:
            raise ValueError(f"there is no {name}")
    return node


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """Return the list: of each file its tests and, for each function, pairs of old and new words."""
    return [
        Mutant(file, function, str(old), str(new), tuple(entry["tests"]))
        for file, entry in yaml.safe_load(path.read_text()).items()
        for function, changes in entry["changes"].items()
        for old, new in changes
    ]


def copy_tracked(folder: Path) -> Path:
    """Copy the tracked files, and the data next to the repository by a link."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, names.decode().split("\0")):
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "copy" / name)
    if (shared := ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(shared.resolve())
    return folder / "copy"


def run_tests(copy: Path, tests: tuple[str, ...]) -> int:
    """Return pytest's exit code; `FAILED` where the time is up."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            command, cwd=copy, env=environment, timeout=LIMIT_S, capture_output=True, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return FAILED


def noticed(copy: Path, mutant: Mutant) -> bool:
    """Make the change, run the tests, take it back. RuntimeError: the tests could not be run at all."""
    path = copy / mutant.file
    source = path.read_text()
    path.write_text(mutant.applied(source))
    try:
        code = run_tests(copy, mutant.tests)
    finally:
        path.write_text(source)
    if code not in (0, FAILED):
        raise RuntimeError(f"pytest ended with {code} for {mutant.name}")
    return code == FAILED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="files whose path has one of these words")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at the same time")
    args = parser.parse_args()
    if not args.only:
        require_commit()
    mutants = [m for m in read_mutants() if not args.only or any(word in m.file for word in args.only)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            (Path(folder) / str(number)).mkdir()
            copies.put(copy_tracked(Path(folder) / str(number)))

        def with_copy(job: Any, *of: Any) -> Any:
            copy = copies.get()
            try:
                return job(copy, *of)
            finally:
                copies.put(copy)

        files = sorted({test for mutant in mutants for test in mutant.tests})
        if any(codes := list(pool.map(lambda test: with_copy(run_tests, (test,)), files))):
            sys.exit(f"without a change these fail: {[f for f, code in zip(files, codes, strict=True) if code]}")
        results = []
        for mutant, was_noticed in zip(
            mutants, pool.map(lambda mutant: with_copy(noticed, mutant), mutants), strict=True
        ):
            results.append({**asdict(mutant), "noticed": was_noticed})
            print(f"{'noticed' if was_noticed else 'NOT NOTICED'}  {mutant.name}", file=sys.stderr, flush=True)
    share = sum(result["noticed"] for result in results) / len(results)
    print(f"{share:.1%} of {len(results)} noticed", file=sys.stderr)
    if not args.only:
        save("mutants", {"mutants": len(results), "noticed_share": round(share, 4), "wanted": 0.95, "each": results})


if __name__ == "__main__":
    main()
