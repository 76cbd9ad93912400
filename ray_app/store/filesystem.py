"""Folders of files on a disk or in an object store, each file written whole or not at all.

On a disk a file is written under another name, synced and renamed (`store/atomic.py`). An object appears when its
upload ends. A store is published by its manifest, which is written last in both.

Credentials are those that pyarrow finds (environment, profile, role of the machine). A `RemoteDir` holds none, so
that none reaches a worker or a log; each process makes its own connection.
"""

import io
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from ray_app.core.back_off import back_off_s
from ray_app.errors import ConfigError, StoreError
from ray_app.listing import data_in, is_data
from ray_app.store.atomic import disk_errors, make_folder, sha256_bytes, sha256_file, write_file

T = TypeVar("T")
TIMEOUT_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
NO_BUCKET = "Create the bucket, or name another."
WRONG_KEY = "The credentials of this environment are not those of a user there."
NON_RETRYABLE = {
    "NO_SUCH_BUCKET": NO_BUCKET,
    "NoSuchBucket": NO_BUCKET,
    "not found": NO_BUCKET,
    "ACCESS_DENIED": "The credentials of this environment do not allow it.",
    "INVALID_ACCESS_KEY_ID": "The credentials of this environment are not known there.",
    "SIGNATURE_DOES_NOT_MATCH": WRONG_KEY,
    "SignatureDoesNotMatch": WRONG_KEY,
    "ExpiredToken": "The credentials of this environment have expired.",
}
"""Answers of an object store that another try does not change, with what to do."""


@dataclass(frozen=True, slots=True)
class LocalDir:
    """A folder on a disk. Its methods are those of `RemoteDir`."""

    path: Path
    """Absolute path of the folder."""

    def __str__(self) -> str:
        return str(self.path)

    def with_logger(self, tell: Callable[[str], None]) -> "LocalDir":  # noqa: ARG002
        return self

    def file(self, name: str) -> str:
        return str(self.path / name)

    uri_of = file

    def exists(self) -> bool:
        return self.path.is_dir()

    def listdir(self, folder: str = "") -> set[str]:
        if not (self.path / folder).exists():  # also below a file
            raise FileNotFoundError(self.path / folder)
        return {path.name for path in data_in(self.path / folder)}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(self, name: str) -> Path:
        return self.path / name

    def sha256(self, name: str) -> str:
        return sha256_file(self.path / name)

    def write(self, name: str, data: bytes | memoryview) -> None:
        with disk_errors(self.path):
            make_folder((self.path / name).parent)
        write_file(self.path / name, data)

    def delete(self, name: str) -> None:
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclass(frozen=True, slots=True)
class RemoteDir:
    """A prefix in an object store, or a folder of another file system that pyarrow reaches by a URI.

    A request that fails is repeated until `timeout_s` is over, on top of the file system's own tries. StoreError: it
    still fails, or another try is useless, as for a missing bucket. A missing file raises FileNotFoundError.
    """

    uri: str
    """URI with its query, in which pyarrow takes options such as `endpoint_override` and `region`."""
    timeout_s: float = TIMEOUT_S
    """Longest outage that is waited for, in seconds."""
    tell: Callable[[str], None] = field(default=logging.getLogger(__name__).warning, compare=False)
    """Called with a sentence when the store stops answering, and when it answers again."""

    def __str__(self) -> str:
        """Return the URI without its query, for messages."""
        return self.uri.partition("?")[0].rstrip("/")

    def with_logger(self, tell: Callable[[str], None]) -> "RemoteDir":
        """Return the same folder with another `tell`."""
        return replace(self, tell=tell)

    def file(self, name: str) -> str:
        """Return the name of a file or folder in it for messages."""
        return f"{self}/{name}".rstrip("/")

    def uri_of(self, name: str) -> str:
        """Return the URI of a file or folder in it for commands, with the query."""
        path, mark, query = self.uri.partition("?")
        return f"{path.rstrip('/')}/{name}{mark}{query}"

    def exists(self) -> bool:
        """Return True if there is such a folder."""
        try:
            self.listdir()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def listdir(self, folder: str = "") -> set[str]:
        """Return names of files and folders. FileNotFoundError: no such folder; NotADirectoryError: a file."""
        infos = self.retry("listed", folder, lambda system, path: system.get_file_info(fs.FileSelector(path)))
        return {info.base_name for info in infos if is_data(info.base_name)}

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""

        def read(system: fs.FileSystem, path: str) -> bytes:
            with system.open_input_stream(path) as file:
                return file.read()

        return self.retry("read", name, read)

    def open(self, name: str) -> "RangeReader":
        """Return a seekable file, of which Parquet reads the parts it needs."""
        return RangeReader(self, name)

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file as 64 hexadecimal digits."""
        return sha256_bytes(self.read(name))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, and the folders above it where the file system has folders."""

        def write(system: fs.FileSystem, path: str) -> None:
            if system.type_name not in ("s3", "gcs", "abfs"):
                system.create_dir(path.rpartition("/")[0], recursive=True)
            with system.open_output_stream(path) as file:
                file.write(data)

        self.retry("written", name, write)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its files; a missing one is no error."""

        def delete(system: fs.FileSystem, path: str) -> None:
            (info,) = system.get_file_info([path])
            if info.type == fs.FileType.Directory:
                system.delete_dir(path)
            elif info.type == fs.FileType.File:
                system.delete_file(path)

        self.retry("deleted", name, delete)

    def retry(self, verb: str, name: str, ask: Callable[[fs.FileSystem, str], T]) -> T:
        """Return what `ask` returns for pyarrow's file system and the path of `name` in it."""
        what, began = f"{self.file(name)} cannot be {verb}", time.monotonic()
        for tries in itertools.count(1):
            try:
                answer: T | FileNotFoundError | NotADirectoryError = ask(*_connect(self.uri, name, what))
            except (FileNotFoundError, NotADirectoryError) as error:
                answer = error
            except OSError as error:
                why, waited_s = _first_line(error), time.monotonic() - began
                wait_s = back_off_s(tries, LONGEST_WAIT_S, FIRST_WAIT_S)
                if remedy := next((remedy for code, remedy in NON_RETRYABLE.items() if code in why), ""):
                    raise StoreError(f"{what}: {why}. {remedy}") from error
                if waited_s + wait_s > self.timeout_s:
                    raise StoreError(f"{what}: {tries} tries in {waited_s:.0f} s failed ({why}).") from error
                if tries == 1:
                    self.tell(f"{self} does not answer; trying again for {self.timeout_s:g} s ({why})")
                time.sleep(wait_s)
                continue
            if tries > 1:
                self.tell(f"{self} answers again, after {time.monotonic() - began:.1f} s")
            if isinstance(answer, FileNotFoundError | NotADirectoryError):
                raise answer
            return answer
        raise AssertionError


class RangeReader(io.RawIOBase):
    """Seekable file over an object. Each read is a request, repeated where it fails."""

    def __init__(self, store: RemoteDir, name: str) -> None:
        self._store, self._name = store, name
        self._file: pa.NativeFile = store.retry("read", name, lambda system, path: system.open_input_file(path))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes from the position on, fewer at the end; all of them for -1."""
        begin = self.tell()
        count = self._file.size() - begin if size < 0 else size
        data: bytes = self._store.retry("read", self._name, lambda *_: self._file.read_at(count, begin))
        self.seek(begin + len(data))
        return data


StorageDir = LocalDir | RemoteDir
Where = StorageDir | Path | str
"""A folder, or the path or URI of one."""


def open_storage(where: Where, timeout_s: float = TIMEOUT_S) -> StorageDir:
    """Return the folder that a path or URI names. ConfigError: the URI has credentials, or only one slash."""
    if isinstance(where, StorageDir):
        return where
    text = os.fspath(where)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if scheme is None:
        return LocalDir(Path(text).absolute())  # tasks on a cluster start in another folder
    if not text.startswith("//", scheme.end() - 1):
        raise ConfigError(f"{text} has one slash after '{scheme[1]}:'; a URI has two, as in s3://bucket/store")
    parts = urlsplit(text)
    if parts.scheme == "file":
        return LocalDir(Path(unquote(parts.path)))
    if "@" in parts.netloc:
        raise ConfigError(
            f"a URI with credentials would end up in logs and manifests; use {parts.scheme}://BUCKET/PATH "
            "and give them by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a profile"
        )
    return RemoteDir(text, timeout_s)


def absolute(where: str) -> str:
    """Return the path or URI in a form that is valid from any working folder."""
    folder = open_storage(where)
    return where if isinstance(folder, RemoteDir) else str(folder)


def _connect(uri: str, name: str, what: str) -> tuple[fs.FileSystem, str]:
    """Return pyarrow's file system and the path of a file in it. StoreError: pyarrow does not take the URI."""
    try:
        system, root = _file_system(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StoreError(f"{what}: {_first_line(error)}. Name a folder, or a URI as pyarrow takes it.") from error
    return system, f"{root.rstrip('/')}/{name}".rstrip("/")


_file_system = lru_cache(maxsize=64)(fs.FileSystem.from_uri)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(" (Request ID")[0].rstrip(".")
