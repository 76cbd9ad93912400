"""Arrays on this machine's disk, in files without a name: what a window of any length needs is not held in memory.

A file is gone when nothing in it is needed any more, and in any case when the process ends.
"""

import os
import socket
import tempfile
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ResourceError

FILE_BYTES = 2**26
"""Size after which a new file is started, so that the space of what is no longer needed is free again."""


class UnlinkedFile:
    """A file without a name: it is closed, and gone, when nothing refers to it."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.size = 0

    def append(self, data: memoryview) -> int:
        """Return the offset of what was written."""
        self.file.write(data)
        self.file.flush()
        self.size += data.nbytes
        return self.size - data.nbytes


@dataclass(frozen=True, slots=True)
class Spooled:
    """An array in a file."""

    held: UnlinkedFile
    """The file."""
    offset: int
    """First byte."""
    shape: tuple[int, ...]
    """Type of the array."""
    dtype: np.dtype[Any]
    """Shape of the array."""

    def read(self) -> NDArray[Any]:
        """Return the array, read-only."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(os.pread(self.held.file.fileno(), size, self.offset), self.dtype).reshape(self.shape)


class Spool:
    """Writes arrays, one after the other."""

    def __init__(self) -> None:
        self._file: UnlinkedFile | None = None

    def put(self, array: NDArray[Any]) -> Spooled:
        """Write an array and return its position. ResourceError: the disk is full."""
        try:
            if self._file is None or self._file.size >= FILE_BYTES:
                self._file = UnlinkedFile()
            offset = self._file.append(np.ascontiguousarray(array).data)
        except OSError as error:
            raise ResourceError(
                f"{tempfile.gettempdir()} on {socket.gethostname()} cannot hold a window's events: {error.strerror}; "
                "make room there, or let TMPDIR name another folder."
            ) from error
        return Spooled(self._file, offset, array.shape, array.dtype)
