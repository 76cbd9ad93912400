"""A request's body, counted while it arrives and again while it is inflated; bounded in both."""

import zlib
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive

from ..protocol.errors import ApiError

ALIGN = 64
"""Raw tensors begin at a multiple of so many bytes from the start of the buffer: a cache line."""
DRAIN_FACTOR = 4
"""So many times the limit are still read and dropped, so that a caller that is sending hears the answer."""
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, raw_at: int = 0) -> memoryview:
    """The body, writable, at most `limit` bytes, inflated where its Content-Encoding says so.

    `raw_at` is where raw tensors begin in it; that place is aligned. Problem 413: too large. Problem 400: broken.
    """
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("identity", "", *WINDOW_BITS):
        raise ApiError(
            415, "encoding", f"Content-Encoding '{encoding[:40]}' is not understood; send gzip or deflate."
        )
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
    """The parts of a body as they arrive. Problem 400 if the caller goes away in between."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "disconnected", "the body ended before its Content-Length; send it again.")
        more = message.get("more_body", False)
        if chunk := message.get("body", b""):
            yield chunk


async def wait_for_disconnect(receive: Receive) -> None:
    """Ends when the caller goes away. Asked after the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def drain(parts: AsyncIterator[bytes], most: int) -> None:
    """Reads on and keeps nothing, up to `most` bytes."""
    async for chunk in parts:
        most -= len(chunk)
        if most < 0:
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
        raise ApiError(400, "encoding", "the compressed body ends too early; send it again.")
    return memoryview(buffer)[pad:]


def too_large(found: str, limit: int) -> ApiError:
    """413 with both numbers."""
    return ApiError(
        413,
        "too_large",
        f"the body has {found} bytes, the limit is {limit:,}; send fewer pairs at a time, or UINT8 instead of FP32.",
    )
