"""Files that are either wholly there or not at all, and the checksums that prove it."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ray_app.errors import StoreError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A disk, a quota or the largest file is used up."""
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
"""This is no place to write to."""


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Around every write of ours: where the disk is full or closed to us, StoreError says so and how full it is.

    `num_bytes` is what the write needs, where that is known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code not in FULL | CLOSED:
            raise
        why = f"{path} cannot be written: {os.strerror(code)}"
        if code in CLOSED:
            raise StoreError(f"{why}. Name a folder that can be written.") from error
        needed = f"{num_bytes:,} bytes are needed, " if num_bytes is not None else ""
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
        raise StoreError(f"{why}; {needed}{free:,} bytes are free there. Make room for it.") from error


def partial_file(path: Path) -> Path:
    """Where `path` is written before it gets its name; what lies there later was left by a killed process."""
    return path.with_name(f".{path.name}.partial")


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Writes under another name, then renames: a reader sees the old file, or the whole new one."""
    partial = partial_file(path)
    with disk_errors(path, memoryview(data).nbytes):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except BaseException:
            with suppress(OSError):  # it takes room where there is none
                partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends well. The name must be free.

    When the block raises, nothing is left; what a killed process left under the working name is replaced.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder):
        make_folder(folder.parent)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            yield partial
            readable = partial.stat().st_mode & 0o666  # what the umask allows; safetensors writes 0600
            for path in partial.iterdir():
                path.chmod(readable)
                sync(path)
            sync(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a disk that became read-only keeps it: not under its name
            raise
        sync(folder.parent)


def make_folder(folder: Path) -> None:
    """A folder with those above it, each of whose names is on the disk before the next."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _errno(error: OSError | SafetensorError) -> int:
    """The system's number of an error; safetensors tells it in words alone. 0 where there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
