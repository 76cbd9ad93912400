"""Where a number comes from: command, machine, date, commit, versions. Written beside every result."""

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
"""What git is asked about: a number that was just written changes no other."""
LOAD_AT_START = os.getloadavg()[0]
"""Of the machine, before the script's own work: scripts save when they are done."""


def provenance() -> dict[str, Any]:
    """JSON values."""
    program, *words = sys.argv
    commit = _git("rev-parse", "--short=12", "HEAD")
    return {
        "command": shlex.join(
            ["python", *(("-m", "pytest") if "pytest" in program else (_script(program),)), *words]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", *CODE)) if commit else None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        **({"gpu": gpu} if (gpu := _gpu()) else {}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": LOAD_AT_START,
        "load_when_saved": os.getloadavg()[0],
        "platform": platform.platform(),
        "versions": {
            name: found for name in ("ray", "torch", "numpy", "mlflow", "pyarrow") if (found := _version(name))
        },
    }


def _script(program: str) -> str:
    """As it is called from the project's root, from wherever it was."""
    path = Path(program).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else program


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json, with provenance first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(), **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return path


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
