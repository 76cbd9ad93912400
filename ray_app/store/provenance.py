"""Provenance of a result: command, code, versions, machine, data."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ray_app.parsing.redact import redact

PACKAGES = ("ray-app", "ray", "mlflow", "numpy", "pyarrow", "safetensors", "pillow", "av")


def provenance(argv: Sequence[str], dataset_fingerprint: str | None = None, **more: Any) -> dict[str, Any]:
    """Return JSON values to store with a result, with `more`. Passwords and tokens in URLs of `argv` are left out."""
    return {
        "argv": [redact(arg) for arg in argv],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset_fingerprint": dataset_fingerprint,
        "git": git_revision(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: installed for name in PACKAGES if (installed := _version(name))}
        | {"torch": str(torch.__version__)},
        **more,
    }


def git_revision(root: Path) -> dict[str, Any] | None:
    """Return {revision, dirty} of the checkout at `root`; None if it is not one, or git is missing."""
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
