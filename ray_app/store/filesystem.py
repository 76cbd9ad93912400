"""Where the files of a store lie: a folder on a disk, or the objects below a prefix of an object store.

The one module that knows of file systems. On a disk a file is written under another name, synced and renamed
(store/durable.py). An object appears whole when its upload ends, and not at all when that breaks off; nothing is
renamed. In both, a store is published by its manifest, which is written last.

Credentials are those that pyarrow finds by itself (environment, profile, role of the machine). A place holds none,
so that none travels to a worker or into a log; each process makes its own connection.
"""

import hashlib
import io
import logging
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from ray_app.errors import ConfigError, StoreError
from ray_app.store.atomic import disk_errors, make_folder, sha256_file, write_file

T = TypeVar("T")
PATIENCE_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
NON_RETRYABLE = {
    "NO_SUCH_BUCKET": "Create the bucket, or name another.",
    "NoSuchBucket": "Create the bucket, or name another.",
    "not found": "Create the bucket, or name another.",
    "ACCESS_DENIED": "The credentials of this environment do not allow it.",
    "INVALID_ACCESS_KEY_ID": "The credentials of this environment are not known there.",
    "SIGNATURE_DOES_NOT_MATCH": "The credentials of this environment are not those of a user there.",
    "SignatureDoesNotMatch": "The credentials of this environment are not those of a user there.",
    "ExpiredToken": "The credentials of this environment have expired.",
}
"""What an object store says where trying again is of no use, and the way out."""


Where: TypeAlias = "StorageDir | Path | str"
"""What names a place."""


class StorageDir(ABC):
    """A folder of files, each written at once or not at all. A file that is missing raises FileNotFoundError."""

    @abstractmethod
    def __str__(self) -> str:
        """For people; never with a query, which a URI may have."""

    def file(self, name: str) -> str:
        """A file of it, for people."""
        return f"{self}/{name}"

    @abstractmethod
    def uri_of(self, name: str) -> str:
        """The path or URI of a file or folder in it, for commands."""

    @abstractmethod
    def mkdir(self, name: str = "") -> None:
        """Makes the folder, or one in it, with those above it."""

    @abstractmethod
    def listdir(self, folder: str = "") -> set[str]:
        """Files and folders in it, or in a folder of it. FileNotFoundError: there is none; NotADirectoryError: it is
        a file."""

    def exists(self) -> bool:
        """Whether there is such a folder."""
        try:
            self.listdir()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file."""

    @abstractmethod
    def open(self, name: str) -> Any:
        """A file to read parts of: what Parquet takes."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """Of a file's bytes."""

    @abstractmethod
    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file. StoreError: full, closed to us, or away for too long."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes a file, or a folder with all that is in it."""

    def with_logger(self, tell: Callable[[str], None]) -> "StorageDir":  # noqa: ARG002
        """The same place; where it does not answer, and does again, `tell` gets a sentence."""
        return self


def open_storage(where: Where, patience_s: float = PATIENCE_S) -> StorageDir:
    """The place that a path or URI names. ConfigError: a URI that holds credentials, or has lost a slash."""
    if isinstance(where, StorageDir):
        return where
    text = os.fspath(where)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if scheme is None:
        return LocalDir(Path(text).absolute())  # tasks on a cluster start elsewhere
    if not text.startswith("//", scheme.end() - 1):
        raise ConfigError(f"{text} has one slash behind '{scheme[1]}:'; a URI has two, as in s3://bucket/store")
    parts = urlsplit(text)
    if parts.scheme == "file":
        return LocalDir(Path(unquote(parts.path)))
    if "@" in parts.netloc:
        raise ConfigError(
            f"a URI with credentials in it would end up in logs and manifests; take {parts.scheme}://BUCKET/PATH "
            "and give them by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a profile"
        )
    return RemoteDir(text, patience_s)


def absolute(where: str) -> str:
    """The same place by a name that holds from any folder."""
    found = open_storage(where)
    return where if isinstance(found, RemoteDir) else str(found)


@dataclass(frozen=True, slots=True)
class LocalDir(StorageDir):
    """A folder on a disk."""

    path: Path
    """Absolute."""

    def __str__(self) -> str:
        return str(self.path)

    def uri_of(self, name: str) -> str:
        return str(self.path / name)

    def mkdir(self, name: str = "") -> None:
        with disk_errors(self.path):
            make_folder(self.path / name)

    def listdir(self, folder: str = "") -> set[str]:
        path = self.path / folder
        if not path.exists():  # also where it would lie below a file
            raise FileNotFoundError(path)
        return {path.name for path in path.iterdir()}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(self, name: str) -> Path:
        return self.path / name

    def sha256(self, name: str) -> str:
        return sha256_file(self.path / name)

    def write(self, name: str, data: bytes | memoryview) -> None:
        write_file(self.path / name, data)

    def delete(self, name: str) -> None:
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclass(frozen=True, slots=True)
class RemoteDir(StorageDir):
    """A prefix in an object store, or a folder of any other file system that pyarrow reaches by a URI.

    What goes wrong is tried again, after longer and longer waits, until `patience_s` is over; the file system's own
    tries come on top of that. StoreError: nothing helped, or nothing can, such as a bucket that does not exist.
    """

    uri: str
    """With its query, in which pyarrow takes options such as `endpoint_override` and `region`."""
    patience_s: float = PATIENCE_S
    """How long it may fail to answer."""
    tell: Callable[[str], None] = field(default=logging.getLogger(__name__).warning, compare=False)
    """Gets a sentence where it does not answer, and where it does again."""

    def with_logger(self, tell: Callable[[str], None]) -> "RemoteDir":
        return replace(self, tell=tell)

    def uri_of(self, name: str) -> str:
        path, mark, query = self.uri.partition("?")
        return f"{path.rstrip('/')}/{name}{mark}{query}"

    def __str__(self) -> str:
        return self.uri.partition("?")[0].rstrip("/")

    def mkdir(self, name: str = "") -> None:
        def make(system: fs.FileSystem, root: str) -> None:
            if system.type_name not in ("s3", "gcs", "abfs"):  # those have no folders
                system.create_dir(f"{root}/{name}", recursive=True)

        self.retry(f"{self} cannot be made", make)

    def listdir(self, folder: str = "") -> set[str]:
        return set(self.sizes(folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file in it, or in a folder of it; 0 of a folder. Errors as of `names`."""

        def sizes(system: fs.FileSystem, root: str) -> dict[str, int]:
            found = system.get_file_info(fs.FileSelector(f"{root}/{folder}".rstrip("/")))
            return {info.base_name: info.size or 0 for info in found}

        return self.retry(f"{self.file(folder) if folder else self} cannot be listed", sizes)

    def read(self, name: str) -> bytes:
        def read(system: fs.FileSystem, root: str) -> bytes:
            with system.open_input_stream(f"{root}/{name}") as file:
                return file.read()

        return self.retry(f"{self.file(name)} cannot be read", read)

    def open(self, name: str) -> "RangeReader":
        return RangeReader(self, name)

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest()

    def write(self, name: str, data: bytes | memoryview) -> None:
        def write(system: fs.FileSystem, root: str) -> None:
            with system.open_output_stream(f"{root}/{name}") as file:
                file.write(data)

        self.retry(f"{self.file(name)} cannot be written", write)

    def delete(self, name: str) -> None:
        def delete(system: fs.FileSystem, root: str) -> None:
            (info,) = system.get_file_info([f"{root}/{name}"])
            if info.type == fs.FileType.Directory:
                system.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                system.delete_file(info.path)

        self.retry(f"{self.file(name)} cannot be deleted", delete)

    def retry(self, what: str, ask: Callable[[fs.FileSystem, str], T]) -> T:
        """What the store answers. `what` says what is in vain where it does not."""
        began, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 1
        while True:
            try:
                answer = ask(*_connected(self.uri))
            except FileNotFoundError:  # an answer as well
                self._answered(tries, began)
                raise
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise StoreError(
                    f"{what}: {_first_line(error)}. Name a folder, or a URI as pyarrow takes it."
                ) from error
            except OSError as error:
                why, waited_s = _first_line(error), time.monotonic() - began
                if remedy := next((remedy for code, remedy in NON_RETRYABLE.items() if code in why), ""):
                    raise StoreError(f"{what}: {why}. {remedy}") from error
                if waited_s + wait_s > self.patience_s:
                    raise StoreError(
                        f"{what}: it did not answer rightly in {tries} tries and {waited_s:.0f} s ({why})."
                    ) from error
                if tries == 1:
                    self.tell(f"{self} does not answer; trying again for {self.patience_s:g} s ({why})")
                time.sleep(wait_s)
                wait_s, tries = min(2 * wait_s, LONGEST_WAIT_S), tries + 1
            else:
                self._answered(tries, began)
                return answer

    def _answered(self, tries: int, began: float) -> None:
        if tries > 1:
            self.tell(f"{self} answers again, after {time.monotonic() - began:.1f} s")


class RangeReader(io.RawIOBase):
    """An object's bytes as a file to seek in: each read asks the store, and asks again where that fails."""

    def __init__(self, store: RemoteDir, name: str) -> None:
        def opened(system: fs.FileSystem, root: str) -> pa.NativeFile:
            return system.open_input_file(f"{root}/{name}")

        self._store, self._what, self._at = store, f"{store.file(name)} cannot be read", 0
        self._file = store.retry(self._what, opened)
        self._size: int = self._file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        count = left if size < 0 else min(size, left)
        data = self._store.retry(self._what, lambda *_: self._file.read_at(count, self._at)) if count else b""
        self._at += len(data)
        return data


@lru_cache(maxsize=64)
def _connected(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system and the path in it."""
    system, path = fs.FileSystem.from_uri(uri)
    return system, path.rstrip("/")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(" (Request ID")[0].rstrip(".")
