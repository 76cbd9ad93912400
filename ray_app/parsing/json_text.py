"""JSON from outside, in linear time and bounded memory: whatever is wrong with it is a ValueError."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_app.parsing.text import decode_text

MAX_DEPTH = 64
"""Nesting of lists and objects in a document of ours; the deepest has about ten levels."""
MAX_MEMBERS = 1_000
"""Members of an object whose every member is validated."""
BYTES_OF = {"]": 64, "}": 240, ",": 36, '"': 30, ":": 80}
"""Most memory that CPython needs for what such a character means: a list, an object with one member, a number in a
list, half of a text, a member while it is read. Lists and objects that are not closed are few: their nesting is
bounded."""
EXPANSION = 2
"""Memory of the values may be this many times the text's …"""
SPARE_BYTES = 64 * 2**20
"""… and this much: `[[],[],[]` would be 21 times as large."""


class NestedTooDeep(ValueError):
    """Lists and objects are nested deeper than is read."""


def parse_json(data: bytes | bytearray | memoryview | str, max_depth: int = MAX_DEPTH, nan: bool = True) -> Any:
    """Return the value.

    ValueError: no UTF-8, no JSON, too deep, too many small values, a member twice; NaN, Infinity unless `nan`. Python
    itself refuses a number of more than 4,300 digits, since it is read in quadratic time.
    """
    text = data if isinstance(data, str) else decode_text(data)
    _require_room(text)
    with _no_collection():
        try:
            value = json.loads(text, parse_constant=None if nan else _refuse_constant, object_pairs_hook=_members)
        except RecursionError:
            raise NestedTooDeep(f"it is nested deeper than {max_depth} levels") from None
        except MemoryError:
            raise ValueError("its values do not fit into memory") from None
        if type(value) in (list, dict) and text.count("[") + text.count("{") > max_depth:
            _require_depth(value, max_depth)
    return value


def require_few_members(value: Any) -> Any:
    """Return the value. ValueError: an object of more members than ours have, each with a problem of its own."""
    if isinstance(value, dict) and len(value) > MAX_MEMBERS:
        raise ValueError(f"it has {len(value)} members, the limit is {MAX_MEMBERS}")
    return value


def parse_object(data: bytes | bytearray | memoryview | str) -> dict[str, Any]:
    """Return an object. ValueError: as `parse_json`, or a value of another kind."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no cycles: JSON has none, and each collection would visit all objects of the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _require_room(text: str) -> None:
    limit = EXPANSION * len(text) + SPARE_BYTES
    wide = 0 if text.isascii() else 4 * len(text)
    if 240 * len(text) + wide > limit:  # else no text of this length can need more
        needed = wide + sum(size * text.count(character) for character, size in BYTES_OF.items())
        if needed > limit:
            raise ValueError(
                f"its {len(text):,} characters would take about {needed >> 20} MiB, the limit is {limit >> 20} MiB; "
                "it holds too many small values"
            )


def _require_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            item
            for holder in level
            for item in (holder.values() if type(holder) is dict else holder)
            if type(item) in (list, dict)
        ]
        if not level:
            return
    raise NestedTooDeep(f"it is nested deeper than {max_depth} levels")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in members if names.count(name) > 1)
        raise ValueError(f"'{twice[:40]}' is there twice in one object")
    return members


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
