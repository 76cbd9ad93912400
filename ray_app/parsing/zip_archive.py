"""Zip archives whose directory is bounded: a few bytes of an archive can be an entry of half a kilobyte in memory."""

import io
import struct
import zipfile
import zlib
from typing import BinaryIO

MAX_READ_BYTES = 2**20
"""Largest part that is read at a time, which the directory is: about 20,000 entries."""
ZIP_ERRORS = (
    zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError, zlib.error,
    struct.error, MemoryError,
)  # fmt: skip
"""Exceptions of a read from a damaged or odd archive."""


class _SmallReads(io.BufferedIOBase):
    """A file that refuses large reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        size = -1 if size is None else size
        if size > MAX_READ_BYTES:
            raise zipfile.BadZipFile(f"its directory has {size:,} bytes, the limit is {MAX_READ_BYTES:,}")
        return self._file.read(size)


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Open an archive. One of `ZIP_ERRORS`: it is damaged, or its directory is too large."""
    return zipfile.ZipFile(_SmallReads(file))
