"""JSON as the endpoint takes it: bounded depth, no NaN, and lists of numbers that hold nothing else."""

import json
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ApiError

DEPTH = 16
"""Lists and objects inside one another."""
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parse_object(data: memoryview) -> dict[str, Any]:
    """A JSON object. Problem 400: no JSON, nested deeper than `DEPTH`, NaN or Infinity in it, or no object."""
    if (found := depth(data)) > DEPTH and (found := depth(STRING.sub(b'""', data))) > DEPTH:
        raise ApiError(400, "json_depth", f"the JSON is nested {found} deep, the limit is {DEPTH}; make it flatter.")
    try:
        value = json.loads(bytes(data).decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "bad_json", f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "bad_json", f'the JSON is {json_type_name(value)}, not an object; write {{"event": …}}.')
    return value


def depth(data: memoryview | bytes) -> int:
    """How deep brackets stand inside one another, those in strings counted too.

    Where no more than `DEPTH` are opened, how many: they cannot stand deeper.
    """
    text = bytes(data)
    if (opened := text.count(b"[") + text.count(b"{")) <= DEPTH:
        return opened
    byte = np.frombuffer(data, np.uint8) & ~np.uint8(32)  # [ { and ] } differ in this bit
    brackets = byte[(byte == 0x5B) | (byte == 0x5D)]
    return int(np.cumsum(np.where(brackets == 0x5B, 1, -1)).max(initial=0))


def number_rows(value: Any, width: int, name: str) -> Tensor:
    """Nested lists of numbers as float32 rows (B, width).

    Problem 422: another width, or something that is no number. Numbers that are no float32 become infinite, and
    are refused where all numbers are.
    """
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise ApiError(422, "dtype", f"'{name}' row {i} is {json_type_name(row)}, not a list of numbers.")
        if len(row) != width:
            raise ApiError(422, "width", f"'{name}' row {i} has {len(row):,} numbers, the model takes {width:,}.")
        if not set(map(type, row)) <= {int, float}:
            wrong = next(item for item in row if type(item) not in (int, float))
            raise ApiError(422, "dtype", f"'{name}' row {i} holds {json_type_name(wrong)} among its numbers.")
    try:
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(rows, np.float64).astype(np.float32))
    except OverflowError as error:
        raise ApiError(422, "not_finite", f"'{name}' holds a whole number beyond float64.") from error


def json_type_name(value: Any) -> str:
    """A JSON value's kind, in words."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


def theta_of(value: Any) -> float:
    """A threshold. Problem 422 unless it is a number from −1 to 1."""
    if type(value) not in (int, float) or not -1.0 <= value <= 1.0:
        shown = value if type(value) in (int, float) and abs(value) < 1e6 else json_type_name(value)
        raise ApiError(422, "theta", f"theta is {shown}; it must be a number from -1 to 1, for instance 0.8.")
    return float(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON has no word for")
