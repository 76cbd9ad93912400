"""Event recordings in EventGPT's `.npy` form: a pickled dictionary of arrays, read without running its code.

A pickle may name any function and have it called. The unpickler here admits the few names that arrays and
dictionaries are rebuilt from, and refuses every other by name.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events

ADMITTED = {
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""Names that NumPy's own pickles consist of (those of NumPy 1 and 2, and bytes as Python 2 wrote them)."""
MAX_ARRAY_BYTES = 8 * 2**30
"""A file above this is refused before it is read: 400 million events."""
EVENT_COLUMNS = ("x", "y", "t", "p")


class ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays, dictionaries, numbers and text, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise InputError(
                f"its pickle asks for {module}.{name}, which no recording needs; such a file can run any code, "
                "so it is not read"
            )
        return super().find_class(module, name)


def read_npy(path: Path) -> dict[str, Any]:
    """Return the dictionary of an `.npy` recording. InputError: unreadable, too large, or as `parse_npy` says."""
    try:
        size = path.stat().st_size
        if size > MAX_ARRAY_BYTES:
            raise InputError(f"{path}: {size} bytes, more than the {MAX_ARRAY_BYTES} that are read at a time")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return parse_npy(data, str(path))


def parse_npy(data: bytes, where: str) -> dict[str, Any]:
    """Return the dictionary in an `.npy` file's bytes. InputError: empty, truncated, forbidden names."""
    if not data:
        raise InputError(f"{where} is empty (0 bytes)")
    stream = io.BytesIO(data)
    try:
        version = npy_format.read_magic(stream)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except ValueError as error:
        raise InputError(f"{where} is no .npy file: {error}") from error
    if dtype != np.dtype(object) or shape != ():
        raise InputError(
            f"{where} holds an array of type {dtype} and shape {shape}; a recording is a dictionary of the columns "
            "x, y, t, p, saved with numpy.save"
        )
    try:
        content = ArrayUnpickler(stream, encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        MemoryError,
        OverflowError,
        UnicodeDecodeError,
    ) as error:
        raise InputError(f"{where} is truncated or damaged: {error}") from error
    if isinstance(content, np.ndarray) and content.shape == ():
        content = content.item()
    if not isinstance(content, dict):
        raise InputError(f"{where} holds a {type(content).__name__}, not a dictionary of the columns x, y, t, p")
    return content


def events_of(content: Mapping[str, Any], width: int, height: int, where: str) -> Events:
    """Return checked events of a recording's dictionary. InputError: columns that are missing or do not fit."""
    if missing := [name for name in EVENT_COLUMNS if name not in content]:
        raise InputError(f"{where}: no column {', '.join(missing)}; it has {', '.join(map(str, content)) or 'none'}")
    x, y, t, p = (np.asarray(content[name]) for name in EVENT_COLUMNS)
    return Events.checked(x, y, _unwrapped(t), p, width, height, where)


def _unwrapped(t: NDArray[Any]) -> NDArray[Any]:
    """Return times as int64; a 16-bit clock that wraps to 0 continues instead (65.5 ms a turn)."""
    if t.dtype != np.uint16:
        return t
    wide = t.astype(np.int64)
    turns = np.cumsum(np.diff(wide, prepend=wide[:1]) < -(2**15))
    return wide + turns * 2**16
