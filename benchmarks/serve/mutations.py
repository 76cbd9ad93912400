"""Damaged binary requests, seeded: what a program with a defect, or somebody with bad intent, sends to the endpoint.

A mutation takes a good request apart (JSON head, raw tensors, header lines) and spoils one thing, or a few bytes
anywhere. Some cannot be answered rightly whatever they hit: they bear `refuse`, and an answer to them is a finding.
"""

import copy
import functools
import gzip
import http.client
import json
import random
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORDS: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, 0.5, "", "event", "FP32", "x" * 5000,
    "\u0000", "💥", [], {}, [[]], [1, 2, 3], [-1, -1], [2**32, 2**32], {"a": {"b": {}}}, [[[[[[]]]]]],
)  # fmt: skip
"""Put in the place of any part of the head."""
LENGTHS = ("-1", "0", "1", "99999999999", "9" * 40, "abc", "1e3", " 12", "+12", "0x10", "١٢", "")
"""Put in the place of Inference-Header-Content-Length."""


@dataclass(slots=True)
class Draft:
    """A request in parts."""

    head: dict[str, Any]
    """JSON head."""
    tensors: dict[str, np.ndarray]
    """Raw tensors in their order."""
    headers: dict[str, str] = field(default_factory=dict)
    """Header lines in addition to those that follow from the body."""
    head_bytes: bytes | None = None
    """Instead of the head as JSON."""
    body: bytes | None = None
    """Instead of all of it."""
    length: str | None = None
    """Instead of the true length of the head."""
    cut: int | None = None
    """So many bytes are sent of what Content-Length announces, then the sending side closes."""
    refuse: bool = False
    """An answer 200 would be wrong."""

    def bytes(self) -> tuple[dict[str, str], bytes]:
        """Header lines and body."""
        head = self.head_bytes if self.head_bytes is not None else json.dumps(self.head).encode()
        body = self.body if self.body is not None else head + b"".join(t.tobytes() for t in self.tensors.values())
        length = str(len(head)) if self.length is None else self.length
        return {"Inference-Header-Content-Length": length, **self.headers}, body


def good(width: int, rng: random.Random) -> Draft:
    """Return a request that is answered."""
    rows = rng.choice((1, 1, 2, 3))
    numbers = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choice(("UINT8", "FP32", "FP16"))
    dtype = {"UINT8": np.uint8, "FP32": np.float32, "FP16": np.float16}[kind]
    names = ("event", "target") if rng.random() < 0.6 else ("event",)
    tensors = {}
    for name in names:
        values = numbers.integers(1, 256, (rows, width))
        tensors[name] = (values if kind == "UINT8" else values / 255).astype(dtype)
    inputs = [
        {"name": n, "shape": [rows, width], "datatype": kind, "parameters": {"binary_data_size": t.nbytes}}
        for n, t in tensors.items()
    ]
    head: dict[str, Any] = {"inputs": inputs, "id": "fuzz"}
    if len(names) == 2:
        head["parameters"] = {"theta": round(rng.uniform(-1, 1), 2)}
    outputs = ["aligned", *(["cos_sim", "accepted"] if len(names) == 2 else [])]
    head["outputs"] = [{"name": n, "parameters": {"binary_data": rng.random() < 0.8}} for n in outputs]
    return Draft(head, tensors)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of a value in a JSON tree."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def replace_word(draft: Draft, rng: random.Random) -> None:
    path = rng.choice(places(draft.head))
    at(draft.head, path[:-1])[path[-1]] = copy.deepcopy(rng.choice(WORDS))


def drop_word(draft: Draft, rng: random.Random) -> None:
    path = rng.choice(places(draft.head))
    del at(draft.head, path[:-1])[path[-1]]


def rename_key(draft: Draft, rng: random.Random) -> None:
    path = rng.choice([p for p in places(draft.head) if isinstance(p[-1], str)])
    parent = at(draft.head, path[:-1])
    parent[rng.choice(("nme", "INPUTS", path[-1] + "s", "", "__proto__"))] = parent.pop(path[-1])


def repeat_tensor(draft: Draft, rng: random.Random) -> None:
    items = draft.head[rng.choice(("inputs", "outputs"))]
    items.append(copy.deepcopy(rng.choice(items)))
    draft.refuse = True


def double_key(draft: Draft, rng: random.Random) -> None:
    text = json.dumps(draft.head)
    draft.head_bytes = text.replace(
        '"inputs":', rng.choice(('"inputs": [], "inputs":', '"id": 3, "inputs":')), 1
    ).encode()


def other_shape(draft: Draft, rng: random.Random) -> None:
    rows, width = draft.head["inputs"][0]["shape"]
    draft.head["inputs"][0]["shape"] = rng.choice(
        ([-rows, -width], [rows + 1, width], [rows, width + 1], [width, rows], [rows * width], [0, width],
         [2**62, 4], [rows, 2**60], [1] * 500 + [width], [float(rows), width], [str(rows), width], [rows, width, 1])
    )  # fmt: skip
    draft.refuse = width > 4


def other_size(draft: Draft, rng: random.Random) -> None:
    size = draft.head["inputs"][0]["parameters"]["binary_data_size"]
    change = rng.choice((-size, -1, 1, size, -2 * size, 2**40, 0.5))
    draft.head["inputs"][0]["parameters"]["binary_data_size"] = size + change
    draft.refuse = True


def other_type(draft: Draft, rng: random.Random) -> None:
    draft.head["inputs"][0]["datatype"] = rng.choice(("FP64", "INT8", "BYTES", "BOOL", "fp32", "FP32 ", "", "UINT16"))
    draft.refuse = True


def bad_number(draft: Draft, rng: random.Random) -> None:
    """NaN, Inf or a row of zeros."""
    name = rng.choice(list(draft.tensors))
    tensor = draft.tensors[name]
    row = rng.randrange(len(tensor))
    if tensor.dtype == np.uint8 or rng.random() < 0.3:
        tensor[row] = 0
    else:
        tensor[row, rng.randrange(tensor.shape[1])] = rng.choice((np.nan, np.inf, -np.inf))
    draft.refuse = True


def huge_number(draft: Draft, rng: random.Random) -> None:
    tensor = draft.tensors["event"]
    if tensor.dtype != np.uint8:
        tensor[0, rng.randrange(tensor.shape[1])] = np.finfo(tensor.dtype).max


def head_length(draft: Draft, rng: random.Random) -> None:
    true = len(json.dumps(draft.head))
    draft.length = rng.choice((*LENGTHS, str(true - 1), str(true + 1), str(true // 2)))
    draft.refuse = True


def deep_head(draft: Draft, rng: random.Random) -> None:
    depth = rng.choice((20, 1000, 100_000))
    draft.head_bytes = rng.choice(
        (b"[" * depth, b'{"a":' * depth, b'{"inputs":' + b"[" * depth + b"]" * depth + b"}")
    )
    draft.refuse = True


def no_json(draft: Draft, rng: random.Random) -> None:
    draft.head_bytes = rng.choice(
        (b"", b"null", b"[]", b"3", b'"a"', b"{", b"{}", b"NaN", b'{"inputs": NaN}', b"\xff\xfe\x00",
         b"\xef\xbb\xbf{}", b'{"id": "\\ud800", "inputs": []}',
         b'{"parameters": {"theta": 1e999}, "inputs": []}', b"1" * 100_000)
    )  # fmt: skip
    draft.refuse = True


def flip_bytes(draft: Draft, rng: random.Random) -> None:
    body = bytearray(draft.bytes()[1])
    draft.length = draft.bytes()[0]["Inference-Header-Content-Length"]
    span = len(body) if rng.random() < 0.4 else min(int(draft.length), len(body))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        body[rng.randrange(span)] = rng.randrange(256)
    draft.body = bytes(body)


def cut_body(draft: Draft, rng: random.Random) -> None:
    headers, body = draft.bytes()
    draft.length, draft.body = headers["Inference-Header-Content-Length"], body[: rng.randrange(len(body))]
    draft.refuse = True


def more_body(draft: Draft, rng: random.Random) -> None:
    headers, body = draft.bytes()
    draft.length, draft.body = (
        headers["Inference-Header-Content-Length"],
        body + rng.randbytes(rng.choice((1, 7, 4096))),
    )
    draft.refuse = True


def packed(draft: Draft, rng: random.Random) -> None:
    """Encode the body: rightly, wrongly, cut short, with an unknown name, or as a bomb."""
    body = draft.bytes()[1]
    kind = rng.choice(("right", "deflate", "lie", "cut", "unknown", "bomb", "twice"))
    data = {"deflate": zlib.compress(body), "lie": body, "unknown": body, "bomb": bomb()}.get(
        kind, gzip.compress(body, 1)
    )
    draft.length = str(len(json.dumps(draft.head)))
    draft.body = data[: len(data) // 2] if kind == "cut" else gzip.compress(data, 1) if kind == "twice" else data
    draft.headers["Content-Encoding"] = {"deflate": "deflate", "unknown": "br"}.get(kind, "gzip")
    draft.refuse = kind not in ("right", "deflate")


def header_line(draft: Draft, rng: random.Random) -> None:
    name, value = rng.choice(
        (("Content-Type", "text/plain"), ("Content-Type", "application/json; charset=utf-16"), ("Accept", "\t/;;"),
         ("x-request-timeout-ms", "-5"), ("x-request-timeout-ms", "nan"), ("x-request-timeout-ms", "1"),
         ("x-request-id", "é" * 60), ("x-request-id", "a" * 5000), ("Accept", "text/html"), ("Expect", "nothing"),
         ("Authorization", "Bearer \x80"), ("Authorization", "Basic Og=="), ("traceparent", "00-zz"),
         ("X-Many", "a" * 30_000))
    )  # fmt: skip
    draft.headers[name] = value


def stop_early(draft: Draft, rng: random.Random) -> None:
    draft.cut = rng.randrange(len(draft.bytes()[1]))
    draft.refuse = True


@functools.cache
def bomb() -> bytes:
    """64 KB that become 64 MB."""
    return gzip.compress(bytes(2**26), 9)


MUTATIONS: tuple[Callable[[Draft, random.Random], None], ...] = (
    replace_word, replace_word, replace_word, drop_word, rename_key, repeat_tensor, double_key, other_shape,
    other_size, other_type, bad_number, huge_number, head_length, deep_head, no_json, flip_bytes, flip_bytes,
    cut_body, more_body, packed, header_line, stop_early,
)  # fmt: skip


def mutated(width: int, rng: random.Random) -> tuple[str, Draft]:
    """Return (name of the mutation, request)."""
    draft, mutation = good(width, rng), rng.choice(MUTATIONS)
    mutation(draft, rng)
    return mutation.__name__, draft


def send(address: tuple[str, int], path: str, draft: Draft, timeout_s: float = 20.0) -> tuple[int, bytes]:
    """(status, body) of the answer; status 0 where the connection ended without one, −1 where none came in time."""
    headers, body = draft.bytes()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {address[0]}:{address[1]}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, "", ""]).encode("utf-8")
    with socket.create_connection(address, timeout_s) as connection:
        try:
            connection.sendall(head + (body if draft.cut is None else body[: draft.cut]))
            if draft.cut is not None:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before it was all sent: the answer is there
        response = http.client.HTTPResponse(connection, method="POST")
        try:
            response.begin()
            return response.status, response.read()
        except TimeoutError:
            return -1, b""
        except (OSError, http.client.HTTPException):
            return 0, b""
