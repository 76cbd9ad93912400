"""A request's body: bytes bounded as they arrive and as they are inflated, JSON bounded in depth, without NaN."""

import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import torch
from starlette.types import Receive
from torch import Tensor

from ray_app.parsing.json_text import NestedTooDeep, parse_json

from .errors import ApiError

ALIGN = 64
"""Raw tensors start at a multiple of this many bytes from the start of the buffer: a cache line."""
DRAIN_FACTOR = 4
"""A refused body is read and dropped up to this many times the limit, so that its sender reads the answer."""
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
MAX_DEPTH = 16
"""Nesting of lists and objects in JSON."""
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, raw_at: int = 0) -> memoryview:
    """Read at most `limit` bytes, inflated as Content-Encoding says; the result is writable.

    `raw_at` is the offset of raw tensors, which get aligned. ApiError 413: too large; 400: damaged.
    """
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("identity", "", *WINDOW_BITS):
        raise ApiError(415, "encoding", f"Content-Encoding '{encoding[:40]}' is not supported; send gzip or deflate.")
    parts = chunks(receive)
    declared = headers.get(b"content-length")
    size = int(declared) if declared is not None and declared.isdigit() else None
    if size is not None and size > limit:
        await drain(parts, DRAIN_FACTOR * limit)
        raise too_large(f"{size:,}", limit)
    pad = -raw_at % ALIGN
    if encoding in WINDOW_BITS:
        return await _inflated(parts, WINDOW_BITS[encoding], limit, pad)
    buffer = bytearray(pad + (size or 0))
    end = pad
    async for chunk in parts:
        if end + len(chunk) - pad > limit:
            await drain(parts, DRAIN_FACTOR * limit)
            raise too_large(f"more than {limit:,}", limit)
        buffer[end : end + len(chunk)] = chunk
        end += len(chunk)
    return memoryview(buffer)[pad:end]


async def chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the parts of a body as they arrive. ApiError 400 if the client disconnects before the end."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "disconnected", "the body ended before its Content-Length; send it again.")
        more = message.get("more_body", False)
        if chunk := message.get("body", b""):
            yield chunk


async def drain(parts: AsyncIterator[bytes], max_bytes: int) -> None:
    """Read and drop up to `max_bytes`."""
    async for chunk in parts:
        max_bytes -= len(chunk)
        if max_bytes < 0:
            return


async def _inflated(parts: AsyncIterator[bytes], window_bits: int, limit: int, pad: int) -> memoryview:
    inflater = zlib.decompressobj(window_bits)
    buffer = bytearray(pad)
    try:
        async for chunk in parts:
            data = chunk
            while data:
                buffer += inflater.decompress(data, limit + pad - len(buffer) + 1)
                if len(buffer) - pad > limit:
                    await drain(parts, DRAIN_FACTOR * limit)
                    raise too_large(f"more than {limit:,} when inflated", limit)
                data = inflater.unconsumed_tail
    except zlib.error as error:
        raise ApiError(400, "encoding", f"the compressed body is damaged ({error}); send it again.") from error
    if not inflater.eof:
        raise ApiError(400, "encoding", "the compressed body is cut short; send it again.")
    return memoryview(buffer)[pad:]


def too_large(size: str, limit: int) -> ApiError:
    """Error 413 with both numbers."""
    return ApiError(
        413,
        "too_large",
        f"the body has {size} bytes, the limit is {limit:,}; send fewer pairs at a time, or UINT8 instead of FP32.",
    )


def parse_object(data: memoryview) -> dict[str, Any]:
    """Parse a JSON object. ApiError 400: not JSON, nested deeper than `MAX_DEPTH`, NaN or Infinity, not an object."""
    try:
        value = parse_json(data, MAX_DEPTH, nan=False)
    except NestedTooDeep as error:
        raise ApiError(400, "json_depth", f"the JSON cannot be read: {error}; make it flatter.") from error
    except ValueError as error:
        raise ApiError(400, "bad_json", f"the body is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "bad_json", f'the JSON is {json_type_name(value)}, not an object; write {{"event": …}}.')
    return value


def number_rows(value: Any, width: int, name: str) -> Tensor:
    """Convert nested lists of numbers to float32 rows (B, width).

    ApiError 422: another width, or an item that is not a number. Numbers beyond float32 become infinite and are
    refused later, with all other non-finite numbers.
    """
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise ApiError(422, "dtype", f"'{name}' row {i} is {json_type_name(row)}, not a list of numbers.")
        if len(row) != width:
            raise ApiError(422, "width", f"'{name}' row {i} has {len(row):,} numbers, the model takes {width:,}.")
        if not set(map(type, row)) <= {int, float}:
            wrong = next(item for item in row if type(item) not in (int, float))
            raise ApiError(422, "dtype", f"'{name}' row {i} contains {json_type_name(wrong)} among its numbers.")
    values = np.empty((len(rows), width), np.float32)
    try:
        with np.errstate(over="ignore"):
            for i, row in enumerate(rows):  # row by row, so that no second copy of all is made
                values[i] = np.array(row, np.float64)
    except OverflowError as error:
        raise ApiError(422, "not_finite", f"'{name}' contains a whole number beyond float64.") from error
    return torch.from_numpy(values)


def json_type_name(value: Any) -> str:
    """Type of a JSON value, in words."""
    return JSON_TYPES.get(type(value), "null")


def parse_theta(value: Any) -> float:
    """Check a threshold. ApiError 422 unless it is a number from −1 to 1."""
    if type(value) not in (int, float) or not -1.0 <= value <= 1.0:
        shown = value if type(value) in (int, float) and abs(value) < 1e6 else json_type_name(value)
        raise ApiError(422, "theta", f"theta is {shown}; it must be a number from -1 to 1, for instance 0.8.")
    return float(value)
