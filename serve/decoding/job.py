"""A job of a decoder, and the messages to it through a pipe: a line of JSON, then bytes."""

import json
from dataclasses import dataclass
from typing import IO, Any, Literal

MAX_HEAD_BYTES = 2**16
"""Longest line of JSON."""


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """A picture, or the events of a recording, to be made images of a given size."""

    kind: Literal["image", "recording"]
    """Picture or recording; also the code of the error where it cannot be decoded."""
    height: int
    """Rows of the result."""
    width: int
    """Columns of the result."""
    sensor: tuple[int, int] = (640, 480)
    """Columns and rows of the recording's sensor."""
    middle: bool = True
    """True: the middle one of five images of equal event count; else one of all events."""
    num_images: int = 1
    """More than one: that many images of a recording, of equal event count."""
    steps: dict[str, Any] | None = None
    """Preprocessing of the encoder that takes the images; without one they are resized."""
    name: str = "event"
    """Side of the pair, in messages."""


def write_message(pipe: IO[bytes], head: dict[str, Any], data: bytes | memoryview = b"") -> None:
    """Write one message."""
    pipe.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n")
    pipe.write(data)
    pipe.flush()


def read_message(pipe: IO[bytes], max_bytes: int) -> tuple[dict[str, Any], bytes]:
    """Read one message of at most `max_bytes`. EOFError: the other side is gone, or sends something else."""
    line = pipe.readline(MAX_HEAD_BYTES)
    head = json.loads(line) if line.endswith(b"\n") else {}
    size = head.pop("bytes", -1)
    if not 0 <= size <= max_bytes or len(data := pipe.read(size)) < size:
        raise EOFError("the other side is gone, or sends something else")
    return head, data
