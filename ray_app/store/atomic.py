"""Files and folders that appear whole or not at all, and checksums."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from ray_app.errors import CheckpointError, StoreError
from ray_app.listing import data_in

CHECKSUMS_FILE = "MANIFEST.sha256"
"""List of checksums in a folder, such as a checkpoint."""
MAX_CHECKSUMS_BYTES = 2**20
"""Such a list has a few hundred bytes."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk or quota, or of a file that is too large."""
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
"""Errors of a folder that cannot be written."""


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn errors of a full or read-only disk into StoreError, with the free space.

    `num_bytes`: what the write needs, if known.
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
        disk = os.statvfs(next(p for p in path.absolute().parents if p.is_dir()))
        if code == errno.ENOSPC and disk.f_files and not disk.f_favail:
            raise StoreError(
                f"{why}; no inodes are left there for another file. Delete or move some files."
            ) from error
        needed = f"{num_bytes:,} bytes are needed, " if num_bytes is not None else ""
        free = disk.f_bavail * disk.f_frsize
        raise StoreError(f"{why}; {needed}{free:,} bytes are free there. Make room for it.") from error


def partial_file(path: Path) -> Path:
    """Return the name under which `path` is written; a file of that name was left by a killed process."""
    return path.with_name(f".{path.name}.partial")


def write_file(path: Path, data: bytes | memoryview, *, new: bool = False) -> None:
    """Write under another name, then rename: a reader sees the old file or the whole new one.

    Processes that write the same file do so one after the other. `new`: FileExistsError if there is one already.
    """
    partial = partial_file(path)
    with disk_errors(path, memoryview(data).nbytes), sole_writer(partial) as file:
        try:
            if new and path.exists():
                raise FileExistsError(path)
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            partial.rename(path)
        except BaseException:
            with suppress(OSError):  # it takes space on a full disk
                partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def sole_writer(path: Path) -> Iterator[BinaryIO]:
    """Open and lock a file that its writer renames or deletes; a file system without locks has several writers."""
    while True:
        with path.open("ab") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = path.stat()
            except FileNotFoundError:
                continue
            if os.path.samestat(current, os.fstat(file.fileno())):
                yield file
                return


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Let one process at a time make a folder, while others wait; a file system without locks has no turns."""
    lock = folder.with_name(f".{folder.name}.lock")
    with disk_errors(folder):
        make_folder(folder.parent)
        with sole_writer(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when the block ends. The name must be free.

    If the block raises, nothing is left. What a killed process left under the working name is replaced.
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
            for path in sorted(partial.rglob("*")):
                if not path.is_dir():
                    path.chmod(readable)
                sync(path)
            sync(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a read-only disk keeps it under the working name
            raise
        sync(folder.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each on the disk before the next."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _errno(error: OSError | SafetensorError) -> int:
    """Return the system's number of an error, 0 if it has none; safetensors has it in its text."""
    if isinstance(error, OSError):
        return error.errno or 0
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else 0


def verify_folder(folder: Path) -> str:
    """Check every file against MANIFEST.sha256 and return its own SHA-256. CheckpointError names the bad file."""
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {CHECKSUMS_FILE}.")
    with path.open("rb") as checksums:
        data = checksums.read(MAX_CHECKSUMS_BYTES + 1)
    listed = parse_checksums(data, str(path))
    files = {file.name for file in data_in(folder) if not file.name.startswith(".")}
    if unlisted := sorted(files - {CHECKSUMS_FILE, *listed}):  # a list that was cut at a line end
        raise CheckpointError(f"{path} is damaged: it does not list {', '.join(unlisted)}. Use another checkpoint.")
    for name, sha256 in listed.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {CHECKSUMS_FILE} lists it.")
        if sha256_file(file) != sha256:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 differs from {CHECKSUMS_FILE}. Use another checkpoint."
            )
    return sha256_bytes(data)


def parse_checksums(data: bytes, where: str) -> dict[str, str]:
    """Return the SHA-256 of each file in a list of checksums. CheckpointError, naming `where`: not such a list."""
    lines = re.findall(rb"^([0-9a-f]{64})  ([A-Za-z0-9_.]+)$", data, re.MULTILINE)
    if not lines or len(data) > MAX_CHECKSUMS_BYTES or data != b"".join(b"%s  %s\n" % line for line in lines):
        raise CheckpointError(f"{where} is damaged: it is not a list of SHA-256 sums and file names.")
    return {name.decode(): sha256.decode() for sha256, name in lines}
