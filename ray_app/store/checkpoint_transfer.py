"""Folders with a list of checksums (checkpoints, training state), to and from an object store.

An upload writes the list last and deletes an older one first: if it breaks off, the folder has no list and is no
checkpoint. A download compares every file with the list before the folder gets its name.
"""

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_app.errors import CheckpointError
from ray_app.store.atomic import (
    CHECKSUMS_FILE,
    disk_errors,
    parse_checksums,
    sha256_file,
    staged_folder,
    verify_folder,
)
from ray_app.store.filesystem import LocalDir, RemoteDir, open_storage
from ray_app.store.scratch import scratch_dir

CHUNK_BYTES = 32 * 2**20
"""Size of one request of a download."""


def upload_dir(folder: Path, remote: RemoteDir, name: str) -> None:
    """Make `name` in `remote` a copy of `folder`; nothing is sent if it is one already."""
    sums = (folder / CHECKSUMS_FILE).read_bytes()
    before = _download_checksums(remote, name)
    if before == sums:
        return
    if before is not None:
        remote.delete(f"{name}/{CHECKSUMS_FILE}")
    for file in parse_checksums(sums, str(folder / CHECKSUMS_FILE)):
        _send_file(folder / file, remote, f"{name}/{file}")
    remote.write(f"{name}/{CHECKSUMS_FILE}", sums)


def download_dir(remote: RemoteDir, name: str, folder: Path) -> Path:
    """Make `folder` a copy of `name` in `remote` ("" for all of it), and return it.

    CheckpointError names the object that is missing or damaged. A `folder` that is a copy already stays.
    """
    sums = _download_checksums(remote, name)
    if sums is None:
        raise CheckpointError(f"{remote.file(name)} is not a checkpoint: it has no {CHECKSUMS_FILE}.")
    if folder.is_dir():
        if (folder / CHECKSUMS_FILE).is_file() and (folder / CHECKSUMS_FILE).read_bytes() == sums:
            verify_folder(folder)
            return folder
        shutil.rmtree(folder)
    with staged_folder(folder) as partial:
        for file, sha256 in parse_checksums(sums, remote.file(f"{name}/{CHECKSUMS_FILE}".lstrip("/"))).items():
            source = f"{name}/{file}".lstrip("/")
            try:
                with disk_errors(partial), (partial / file).open("wb") as out:
                    shutil.copyfileobj(remote.open(source), out, CHUNK_BYTES)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{remote.file(source)} is missing, though {CHECKSUMS_FILE} lists it."
                ) from error
            if sha256_file(partial / file) != sha256:
                raise CheckpointError(
                    f"{remote.file(source)} is damaged: its SHA-256 differs from {CHECKSUMS_FILE}. "
                    "Use another checkpoint."
                )
        (partial / CHECKSUMS_FILE).write_bytes(sums)
    return folder


@contextmanager
def local_folder(where: str) -> Iterator[Path]:
    """Yield the checkpoint folder that a path or URI names; of one at a URI, a verified temporary copy."""
    storage = open_storage(where)
    if isinstance(storage, LocalDir):
        yield storage.path
    else:
        with scratch_dir() as scratch:
            yield download_dir(storage, "", scratch / "checkpoint")


def _send_file(path: Path, remote: RemoteDir, name: str) -> None:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            remote.write(name, b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            remote.write(name, view)


def _download_checksums(remote: RemoteDir, name: str) -> bytes | None:
    try:
        return remote.read(f"{name}/{CHECKSUMS_FILE}".lstrip("/"))
    except FileNotFoundError:
        return None
