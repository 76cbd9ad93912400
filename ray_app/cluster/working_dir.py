"""A folder's own files: what git would keep; without git, what is neither hidden, nor secret, nor made by a build.

Folders of data that our commands write are never among them, whatever git says.
"""

import functools
import subprocess
from fnmatch import filter as matching
from fnmatch import fnmatch
from pathlib import Path

from ray_app.errors import ConfigError

BUILT = {"__pycache__", "node_modules", "venv", "build", "dist"}
SECRET = {Path("deploy/ray-app.env"), Path("deploy/tokens")}
"""Folders of this project that git ignores."""
NO_JOBS = (Path("tests"), Path("docs"), Path("benchmarks/results"))
"""Folders of this project that no job reads."""
DATA_FOLDERS = (
    ("manifest.json", "*.parquet"),  # a pair store
    (".prepare",),  # one that is being built
    ("MANIFEST.sha256",),  # a checkpoint, a training state
    ("run.json", "events.jsonl"),
    ("run.json", "checkpoints"),
    ("sweep.json", "events.jsonl"),
    ("alignment_metrics_*.json",),  # reports
    ("benchmark_adapter_full_*.json",),
    ("comparison.json", "comparison.html"),
    ("correlation.json", "correlation.html"),
    ("capture.json", "shards"),
    ("decode.json", "shards"),
)
"""Patterns of names that are in a folder of data; all of one row are."""
DATA_NAMES = ("mlflow.db*", "mlartifacts", "mlruns")


def files_of(folder: Path) -> list[Path]:
    """Paths below the folder, relative, in order; none where all in it is data. ConfigError: no folder."""
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder} is not a folder")
    listed = kept_by_git(folder)
    if listed is None:
        listed = [
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.relative_to(folder) not in SECRET
            and not any(
                part.startswith(".") or part in BUILT or part.endswith(".egg-info")
                for part in path.relative_to(folder).parts
            )
        ]
    if (folder / "ray_app" / "cli.py").is_file():
        listed = [file for file in listed if not any(file.is_relative_to(part) for part in NO_JOBS)]

    @functools.cache
    def is_data(parent: Path) -> bool:
        names = [path.name for path in (folder / parent).iterdir()]
        if any(all(matching(names, pattern) for pattern in row) for row in DATA_FOLDERS):
            return True
        return parent != Path() and is_data(parent.parent)

    named = [file for file in listed if any(fnmatch(part, name) for part in file.parts for name in DATA_NAMES)]
    return sorted(file for file in set(listed) - set(named) if (folder / file).is_file() and not is_data(file.parent))


def kept_by_git(folder: Path) -> list[Path] | None:
    """Tracked and new files that git does not ignore; None without a repository or without git."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [Path(name) for name in listing.decode("utf-8", "surrogateescape").split("\0") if name]
