"""Where a number comes from: command, machine, date, commit, versions. Written into every result."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("--", ":(top)", ":(top,exclude)benchmarks/results")
"""What git compares with the commit: a result that was just written is no change of the code."""
LOAD_AT_START = os.getloadavg()[0]
"""The machine's load before the script's own work: scripts save when they are done."""


def require_commit() -> str:
    """Commit of the code, empty outside a git checkout. SystemExit: tracked files differ from it."""
    changed = _git("status", "--porcelain", "--untracked-files=no", *CODE).splitlines()
    if changed:
        raise SystemExit(
            f"{len(changed)} tracked files differ from the commit ({changed[0].split()[-1]} …), so a result would "
            "name a commit that is not the code that ran: commit or stash them, then run this again."
        )
    return _git("rev-parse", "--short=12", "HEAD")


def provenance() -> dict[str, Any]:
    """JSON values. SystemExit: tracked files differ from the commit."""
    program, *words = sys.argv
    return {
        "command": shlex.join(["python", "-m", _module(program), *map(_anywhere, words)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": require_commit(),
        "uncommitted_changes": False,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        **({"gpu": gpu} if (gpu := _gpu()) else {}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": LOAD_AT_START,
        "load_when_saved": os.getloadavg()[0],
        "platform": platform.platform(),
        "versions": {
            name: text for name in ("ray", "torch", "numpy", "mlflow", "pyarrow") if (text := _version(name))
        },
    }


def _anywhere(word: str) -> str:
    """Shorten a path in the home folder, or next to the repository, to what it is called on any machine."""
    for folder, short in ((Path.home(), Path("~")), (ROOT.parent, Path(".."))):
        if Path(word).is_absolute() and Path(word).is_relative_to(folder):
            return str(short / Path(word).relative_to(folder))
    return word


def save(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json, with provenance first. SystemExit: tracked files differ from the commit."""
    text = json.dumps({"provenance": provenance(), **result}, indent=1) + "\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text)
    print(json.dumps(result, indent=1))
    return path


def _module(program: str) -> str:
    """Name for `python -m` of the script that runs."""
    path = Path(program).resolve()
    return ".".join(path.relative_to(ROOT).with_suffix("").parts) if path.is_relative_to(ROOT) else "pytest"


def _git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(RESULTS.parent), *args], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return models[0] if models else platform.machine()


def _gpu() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
