"""A request's body: bytes bounded as they arrive and as they are inflated, JSON bounded in depth, without NaN."""

import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
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
PIECE = 2**16
"""Bytes that are inflated at a time."""
MAX_MEMBERS = 1024
"""Members of a gzip body."""
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


class BodyBudget:
    """Bytes of the bodies that a replica holds, all requests together. Used from one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0

    def hold(self) -> "BodyShare":
        """Return the share of one request, empty so far."""
        return BodyShare(self)


class BodyShare:
    """Part of the budget that the body of one request takes, until it is released."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Take `num_bytes` more. ApiError 429: others have taken all, and have to end first."""
        budget = self._budget
        if budget.held_bytes + num_bytes > budget.max_bytes:
            taken = f"the bodies of requests in progress take {budget.held_bytes:,} bytes"
            detail = f"{taken}, the limit is {budget.max_bytes:,}; try again in 1 s."
            raise ApiError(429, "busy", detail, {"retry-after": "1"})
        budget.held_bytes += num_bytes
        self.num_bytes += num_bytes

    def release(self) -> None:
        """Give all of it back."""
        self._budget.held_bytes -= self.num_bytes
        self.num_bytes = 0


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, limit: int, share: BodyShare, raw_at: int = 0
) -> memoryview:
    """Read at most `limit` bytes, inflated as Content-Encoding says; the result is writable.

    Memory follows what has arrived, whatever Content-Length announces. `raw_at` is the offset of raw tensors, which
    get aligned. ApiError 413: too large; 429: too many bodies at a time; 400: damaged.
    """
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("identity", "", *WINDOW_BITS):
        raise ApiError(415, "encoding", f"Content-Encoding '{encoding[:40]}' is not supported; send gzip or deflate.")
    parts = chunks(receive)
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        await drain(parts, DRAIN_FACTOR * limit)
        raise too_large(f"{int(declared):,}", limit)
    pad = -raw_at % ALIGN
    buffer, received = bytearray(pad), 0
    inflated = Inflated(encoding) if encoding in WINDOW_BITS else None
    async for chunk in parts:
        received += len(chunk)
        for piece in inflated.pieces(chunk) if inflated else (chunk,):
            if max(received, len(buffer) - pad + len(piece)) > limit:
                share.release()
                buffer.clear()
                await drain(parts, DRAIN_FACTOR * limit)
                raise too_large(f"more than {limit:,}{' when inflated' if inflated else ''}", limit)
            share.grow(len(piece))
            buffer += piece
    if inflated and not inflated.ended:
        raise ApiError(400, "encoding", "the compressed body is cut short; send it again.")
    return memoryview(buffer)[pad:]


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


class Inflated:
    """A compressed body as it arrives: one stream of zlib, or members of gzip (RFC 1952) one after the other."""

    def __init__(self, encoding: str) -> None:
        self._window_bits = WINDOW_BITS[encoding]
        self._members_left = MAX_MEMBERS if encoding == "gzip" else 1
        self._start()

    def _start(self) -> None:
        if not self._members_left:
            raise ApiError(400, "encoding", "bytes follow the end of the compressed body; send it without them.")
        self._members_left -= 1
        self._stream = zlib.decompressobj(self._window_bits)

    @property
    def ended(self) -> bool:
        """True if nothing of the last member is missing."""
        return self._stream.eof

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what a part inflates to, in pieces of at most `PIECE` bytes. ApiError 400: damaged."""
        try:
            for start in range(0, len(chunk), PIECE):
                data, piece = chunk[start : start + PIECE], b""
                while data or len(piece) == PIECE:  # a full piece: the stream may hold more
                    if self._stream.eof:
                        if not data:
                            break
                        self._start()
                    yield (piece := self._stream.decompress(data, PIECE))
                    data = self._stream.unconsumed_tail or self._stream.unused_data
        except zlib.error as error:
            raise ApiError(400, "encoding", f"the compressed body is damaged ({error}); send it again.") from error


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


def present(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members that are not null: what many clients write for a value that they do not give."""
    return {name: value for name, value in document.items() if value is not None}


def json_type_name(value: Any) -> str:
    """Type of a JSON value, in words."""
    return JSON_TYPES.get(type(value), "null")


def parse_theta(value: Any) -> float:
    """Check a threshold. ApiError 422 unless it is a number from −1 to 1."""
    if type(value) not in (int, float) or not -1.0 <= value <= 1.0:
        shown = value if type(value) in (int, float) and abs(value) < 1e6 else json_type_name(value)
        raise ApiError(422, "theta", f"theta is {shown}; it must be a number from -1 to 1, for instance 0.8.")
    return float(value)
