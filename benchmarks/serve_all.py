"""All numbers of the endpoint in one run: the same commit, the same machine, one part after another.

    python benchmarks/serve_all.py
    python benchmarks/serve_all.py --without soak rivals
    python benchmarks/serve_all.py --only fuzz kills

About an hour on two cores that nobody else uses, 20 minutes of it the soak. Code that is not committed is refused;
each part writes its own file in benchmarks/results. A part that fails is named at the end, and the others are run.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from provenance import provenance

HERE = Path(__file__).parent
PARTS: dict[str, tuple[str, ...]] = {
    "load": ("serve_load.py matrix --width 150528", "serve_load.py matrix --width 4096"),
    "rivals": ("serve_load.py rivals --width 150528", "serve_load.py rivals --width 4096"),
    "overload": ("serve_chaos.py overload", "serve_chaos.py overload --precision fp32"),
    "champions": ("serve_chaos.py champions",),
    "kills": ("serve_chaos.py kills",),
    "fuzz": ("serve_fuzz.py",),
    "memory": ("serve_memory.py",),
    "soak": ("serve_chaos.py soak",),
}
"""What each part runs; mutations of binary requests belong to `fuzz`."""


def run(command: str) -> int:
    """One script in a process of its own; its exit code."""
    script, *words = command.split()
    print(f"{time.strftime('%H:%M:%S')} {command}", flush=True)
    return subprocess.run([sys.executable, HERE / script, *words], stdout=subprocess.DEVNULL, check=False).returncode


def all_of(parts: Sequence[str], run: Callable[[str], int]) -> list[str]:
    """Runs the parts in turn. Returns the commands that failed."""
    return [command for part in parts for command in PARTS[part] if run(command) != 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen.add_argument("--without", nargs="+", choices=PARTS, default=[])
    args = parser.parse_args()
    began = provenance()
    if not began["commit"] or began["uncommitted_changes"]:
        sys.exit("there is code that is not committed: a number would not say what it is of; commit it first.")
    failed = all_of([part for part in args.only if part not in args.without], run)
    if provenance()["commit"] != began["commit"]:
        sys.exit("the commit changed meanwhile: these numbers are not of one; run it again.")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
