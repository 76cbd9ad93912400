"""Event recordings in EventGPT's `.npy` form: a pickled dictionary of arrays, read without unpickling.

The pickle's opcodes are read as a tree of plain values; arrays are views of the file's bytes, in the few shapes in
which NumPy 1 and 2 write them, with types of a list. Nothing is looked up or called.
"""

import codecs
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.parsing.pickle_tree import Call, ForbiddenName, Name, Text, parse_pickle, type_name

ADMITTED = {
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("__builtin__", "bytes"),
}
"""Names that NumPy's own pickles consist of (those of NumPy 1 and 2, and bytes in Python 3's old protocol)."""
TYPES = {code: np.dtype(code) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")}
"""Types of a column, without their byte order."""
MAX_OPCODES = 10_000
"""A dictionary of four arrays has 250."""
MAX_DIMS = 8
MAX_ARRAY_BYTES = 8 * 2**30
"""A file above this is refused before it is read: 400 million events."""
MAX_HEADER_BYTES = 4096
HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']{1,40})',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([0-9L, ]*)\),?\s*\}\s*"
)
"""Header of an array of one plain type, as every version of NumPy writes it."""
EVENT_COLUMNS = ("x", "y", "t", "p")


def read_npy(path: Path) -> dict[str | int, Any]:
    """Return the dictionary of an `.npy` recording. InputError: unreadable, too large, or as `parse_npy` says."""
    try:
        size = path.stat().st_size
        if size > MAX_ARRAY_BYTES:
            raise InputError(f"{path}: {size} bytes, more than the {MAX_ARRAY_BYTES} that are read at a time")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return parse_npy(data, str(path))


def parse_npy(data: bytes | memoryview, where: str) -> dict[str | int, Any]:
    """Return the dictionary in an `.npy` file's bytes; arrays are views of them.

    InputError: empty, truncated, forbidden names, or anything but a dictionary of arrays and plain values.
    """
    if not data:
        raise InputError(f"{where} is empty (0 bytes)")
    try:
        dtype, shape, _, at = parse_header(memoryview(data))
    except ValueError as error:
        raise InputError(f"{where} is no .npy file: {error}") from error
    if dtype != "O" or shape != ():
        raise InputError(
            f"{where} holds an array of type {TYPES.get(dtype[-2:], dtype)} and shape {shape}; a recording is a "
            "dictionary of the columns x, y, t, p, saved with numpy.save"
        )
    try:
        tree = parse_pickle(memoryview(data)[at:], lambda name: (name.module, name.name) in ADMITTED, MAX_OPCODES)
        content = _value(_unwrapped_object(tree))
    except ForbiddenName as error:
        raise InputError(
            f"{where}: its pickle asks for {error}, which no recording needs; such a file can run any code, "
            "so it is not read"
        ) from error
    except ValueError as error:
        raise InputError(f"{where} is truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} holds a {type_name(content)}, not a dictionary of the columns x, y, t, p")
    return content


def events_of(content: Mapping[Any, Any], width: int, height: int, where: str) -> Events:
    """Return checked events of a recording's dictionary. InputError: columns that are missing or do not fit."""
    if missing := [name for name in EVENT_COLUMNS if name not in content]:
        keys = ", ".join(str(key)[:40] for key in list(content)[:20])
        raise InputError(f"{where}: no column {', '.join(missing)}; it has {keys or 'none'}")
    for name in EVENT_COLUMNS:
        if not isinstance(content[name], np.ndarray):
            raise InputError(f"{where}: '{name}' is a {type_name(content[name])}, not an array")
    x, y, t, p = (content[name] for name in EVENT_COLUMNS)
    return Events.checked(x, y, _unwrapped(t), p, width, height, where)


def parse_header(data: memoryview) -> tuple[str, tuple[int, ...], bool, int]:
    """Return type ("O", or byte order and type), shape, whether in Fortran order, and where the numbers begin.

    ValueError: no array of one plain type.
    """
    magic, version = bytes(data[:6]), bytes(data[6:8])
    if magic != b"\x93NUMPY" or version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError(f"it begins with {bytes(data[:8])!r}")
    size = 2 if version == b"\1\0" else 4
    length, at = int.from_bytes(data[8 : 8 + size], "little"), 8 + size
    header = bytes(data[at : at + length]).decode("latin-1") if length <= MAX_HEADER_BYTES else ""
    match = HEADER.fullmatch(header)
    if len(header) < length or not match:
        raise ValueError("its header is cut short, or not that of an array of one plain type")
    shape = tuple(int(text.rstrip("L")) for text in match[3].replace(" ", "").split(",") if text)
    return match[1].lstrip("|=") if match[1] == "|O" else match[1], shape, match[2] == "True", at + length


def array_from(data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> NDArray[Any]:
    """Return a view of bytes as an array. ValueError: the shape takes more or fewer bytes than there are."""
    if len(shape) > MAX_DIMS or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape[:MAX_DIMS]} and type {dtype} has {len(data):,} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _unwrapped_object(tree: Any) -> Any:
    """Return the one object of an array of no dimensions, in which numpy.save puts it."""
    state = tree.state if isinstance(tree, Call) and tree.name.name == "_reconstruct" else None
    if isinstance(state, tuple) and len(state) == 5 and isinstance(state[4], list):
        if state[1] != () or len(state[4]) != 1:
            raise ValueError("its array of objects has not one object")
        return state[4][0]
    return tree


def _value(tree: Any) -> Any:
    """Return a dictionary of arrays and plain values; anything else as it is."""
    if not isinstance(tree, dict):
        return tree
    return {key: _plain(value) if isinstance(value, Call) else value for key, value in tree.items()}


def _plain(call: Call) -> Any:
    """Return an array, a number or bytes. ValueError: a call of another form."""
    match (call.name.name, call.args, call.state):
        case ("_reconstruct", (Name(name="ndarray"), (0,), _), (1, tuple(shape), dtype, bool(fortran), data)):
            return array_from(_raw(data), _dtype(dtype), _shape(shape), fortran)
        case ("_frombuffer", (data, dtype, tuple(shape), ("C" | "F") as order), None):
            return array_from(_raw(data), _dtype(dtype), _shape(shape), order == "F")
        case ("scalar", (dtype, data), None):
            return array_from(_raw(data), _dtype(dtype), (), False)[()]
        case ("encode" | "bytes", _, None):
            return bytes(_raw(call))
    raise ValueError(f"a call of {call.name} is not as NumPy writes it")


def _shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("an array's shape is not of whole numbers")
    return shape


def _dtype(call: Any) -> np.dtype[Any]:
    """Return the type that a pickled dtype means. ValueError: none of `TYPES`."""
    match call:
        case Call(
            name=Name(module="numpy", name="dtype"),
            args=(str(code), _, _),
            state=(3, ("<" | ">" | "|" | "=") as order, None, None, None, _, _, 0),
        ) if code in TYPES:
            return TYPES[code].newbyteorder(order)
    raise ValueError(f"an array's type is none of {', '.join(TYPES)}")


def _raw(data: Any) -> memoryview:
    """Return bytes as they were pickled: as such, as Python 2's text, or as a text to be encoded."""
    match data:
        case memoryview():
            return data
        case str():
            return memoryview(data.encode("latin-1"))
        case Call(name=Name(name="bytes"), args=(), state=None):
            return memoryview(b"")
        case Call(name=Name(name="encode"), args=(str(text), "latin1" | "latin-1"), state=None):
            return memoryview(text.encode("latin-1"))
        case Call(name=Name(name="encode"), args=(Text(data=text), "latin1" | "latin-1"), state=None):
            decoder, out = codecs.getincrementaldecoder("utf-8")(), bytearray()
            for at in range(0, len(text), 2**16):  # as one text it could be four times as large
                out += decoder.decode(text[at : at + 2**16], final=at + 2**16 >= len(text)).encode("latin-1")
            return memoryview(out)
    raise ValueError(f"an array's bytes are a {type_name(data)}")


def _unwrapped(t: NDArray[Any]) -> NDArray[Any]:
    """Return times as int64; a 16-bit clock that wraps to 0 continues instead (65.5 ms a turn)."""
    if t.dtype != np.uint16:
        return t
    wide = t.astype(np.int64)
    turns = np.cumsum(np.diff(wide, prepend=wide[:1]) < -(2**15))
    return wide + turns * 2**16
