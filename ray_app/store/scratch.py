"""Scratch folders that go with their process; those of processes that were killed go with the next one."""

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".ray-app-"
MIN_AGE_S = 60.0
"""A younger folder may belong to a process that has not locked it yet."""


@contextmanager
def scratch_dir(parent: Path | None = None) -> Iterator[Path]:
    """Make a scratch folder of this process, below TMPDIR if no `parent` is named, and delete those left there."""
    parent = parent or Path(tempfile.gettempdir())
    for old in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if _is_left(old):
                with locked(old):
                    shutil.rmtree(old)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name,
        locked(Path(name)),
    ):
        yield Path(name)


def _is_left(folder: Path) -> bool:
    """Return True if a folder was made here, by this user, a while ago."""
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.getuid()
    named = re.fullmatch(rf"{re.escape(PREFIX)}\w{{8}}", folder.name)
    return own and named is not None and time.time() - status.st_mtime > MIN_AGE_S


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder. BlockingIOError: another process has."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
