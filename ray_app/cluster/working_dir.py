"""A folder's own files: what git would keep; without git, what is neither hidden, nor secret, nor made by a build."""

import subprocess
from pathlib import Path

from ray_app.errors import ConfigError

BUILT = {"__pycache__", "node_modules", "venv", "build", "dist", "mlartifacts"}
SECRET = {Path("deploy/ray-app.env"), Path("deploy/tokens")}
"""Folders of this project that git ignores."""
NO_JOBS = (Path("tests"), Path("docs"), Path("benchmarks/results"))
"""Folders of this project that no job reads."""


def files_of(folder: Path) -> list[Path]:
    """Paths below the folder, relative, in order. ConfigError: no folder, or nothing in it."""
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
    files = sorted(file for file in listed if (folder / file).is_file())
    if not files:
        raise ConfigError(f"--working-dir {folder} holds no file to send; name the folder that has ray_app/ in it")
    return files


def kept_by_git(folder: Path) -> list[Path] | None:
    """Tracked and new files that git does not ignore; None without a repository or without git."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [Path(name) for name in listing.decode("utf-8", "surrogateescape").split("\0") if name]
