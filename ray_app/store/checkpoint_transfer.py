"""Folders with a list of checksums (checkpoints, training state), to and from an object store.

Sent, the list is written last and, where there was one before, taken away first: whatever breaks off in between
leaves a folder without a list, which is none. Fetched, every file is held against the list before the folder gets its
name.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_app.errors import CheckpointError
from ray_app.store.atomic import disk_errors, sha256_file, staged_folder
from ray_app.store.checkpoint import CHECKSUMS_FILE, parse_checksums, verify_folder
from ray_app.store.filesystem import LocalDir, RemoteDir, open_storage

CHUNK_BYTES = 32 * 2**20
"""Of one request when a file is fetched."""


def upload_dir(folder: Path, there: RemoteDir, name: str) -> None:
    """Makes `name` below `there` what `folder` is; nothing is sent where it is so already."""
    sums = (folder / CHECKSUMS_FILE).read_bytes()
    before = _sums(there, name)
    if before == sums:
        return
    if before is not None:
        there.delete(f"{name}/{CHECKSUMS_FILE}")
    for file in parse_checksums(sums, str(folder / CHECKSUMS_FILE)):
        _send_file(folder / file, there, f"{name}/{file}")
    there.write(f"{name}/{CHECKSUMS_FILE}", sums)


def download_dir(there: RemoteDir, name: str, folder: Path) -> Path:
    """`folder`, which is then what lies below `there` by this name ("": there itself).

    CheckpointError names the object that is missing or does not hold. What is in `folder` already is kept where it is
    the same, and replaced otherwise.
    """
    sums = _sums(there, name)
    if sums is None:
        raise CheckpointError(f"{_path(there, name)} is not a checkpoint: it has no {CHECKSUMS_FILE}.")
    if folder.is_dir():
        if (folder / CHECKSUMS_FILE).is_file() and (folder / CHECKSUMS_FILE).read_bytes() == sums:
            verify_folder(folder)
            return folder
        shutil.rmtree(folder)
    with staged_folder(folder) as partial:
        for file, sha256 in parse_checksums(sums, _path(there, name, CHECKSUMS_FILE)).items():
            try:
                with disk_errors(partial), (partial / file).open("wb") as out:
                    shutil.copyfileobj(there.open(f"{name}/{file}".lstrip("/")), out, CHUNK_BYTES)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{_path(there, name, file)} is missing, though {CHECKSUMS_FILE} lists it."
                ) from error
            if sha256_file(partial / file) != sha256:
                raise CheckpointError(
                    f"{_path(there, name, file)} is damaged: its SHA-256 differs from {CHECKSUMS_FILE}. "
                    "Use another checkpoint."
                )
        (partial / CHECKSUMS_FILE).write_bytes(sums)
    return folder


@contextmanager
def local_folder(where: str) -> Iterator[Path]:
    """The checkpoint folder that a path or URI names; of one at a URI a verified copy, which goes with the block."""
    there = open_storage(where)
    if isinstance(there, LocalDir):
        yield there.path
    elif isinstance(there, RemoteDir):
        with tempfile.TemporaryDirectory(prefix="ray-app-") as scratch:
            yield download_dir(there, "", Path(scratch) / "checkpoint")


def _send_file(path: Path, there: RemoteDir, name: str) -> None:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            there.write(name, b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            there.write(name, view)


def _sums(there: RemoteDir, name: str) -> bytes | None:
    try:
        return there.read(f"{name}/{CHECKSUMS_FILE}".lstrip("/"))
    except FileNotFoundError:
        return None


def _path(there: RemoteDir, *names: str) -> str:
    """For people."""
    return "/".join([str(there), *filter(None, names)])
