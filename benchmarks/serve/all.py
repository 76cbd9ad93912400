"""All numbers of the endpoint in one run: the same commit, the same machine, one part after another.

    python -m benchmarks.serve.all
    python -m benchmarks.serve.all --without soak rivals
    python -m benchmarks.serve.all --only fuzz kills

About an hour on two cores without other work, 20 minutes of it the soak. Code that is not committed is refused;
each part writes its own file in benchmarks/results. A part that fails is named at the end, and the others are run.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.provenance import require_commit

PARTS: dict[str, tuple[str, ...]] = {
    "load": ("load matrix --width 150528", "load matrix --width 4096"),
    "rivals": ("load rivals --width 150528", "load rivals --width 4096"),
    "precision": ("precision --folder /tmp/serve-precision",),
    "overload": ("chaos overload", "chaos overload --precision fp32"),
    "champions": ("chaos champions",),
    "kills": ("chaos kills",),
    "fuzz": ("fuzz",),
    "memory": ("memory",),
    "soak": ("chaos soak",),
}
"""What each part runs; mutations of binary requests belong to `fuzz`."""


def run(command: str) -> int:
    """One script in a process of its own; its exit code."""
    script, *words = command.split()
    print(f"{time.strftime('%H:%M:%S')} {command}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.serve.{script}", *words], stdout=subprocess.DEVNULL, check=False
    ).returncode


def all_of(parts: Sequence[str], run: Callable[[str], int]) -> list[str]:
    """Run the parts in turn. Return the commands that failed."""
    return [command for part in parts for command in PARTS[part] if run(command) != 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen.add_argument("--without", nargs="+", choices=PARTS, default=[])
    args = parser.parse_args()
    commit = require_commit()
    failed = all_of([part for part in args.only if part not in args.without], run)
    if require_commit() != commit:
        sys.exit("the commit changed meanwhile: these numbers are not of one; run it again.")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
