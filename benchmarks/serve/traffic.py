"""Traffic for the served endpoint and its rivals: callers on open connections, in one process, on raw sockets.

A closed loop asks again as soon as it is answered; an open loop asks at a fixed rate, whatever the answers are.
Bodies are sent from where they lie and answers are read into one buffer and dropped, so that the generator takes as
little of the two cores as it can; it does share them.
"""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvloop

LIMIT_S = 60.0
"""For one answer: a server that never answers is seen as status 0, and ends no measurement."""


@dataclass(slots=True)
class Traffic:
    """What callers saw."""

    pairs: int
    """In one request."""
    seconds: float = 0.0
    """From the first request to the last answer."""
    ok_s: list[float] = field(default_factory=list)
    """Latencies of the answers 200."""
    refused_s: list[float] = field(default_factory=list)
    """Latencies of the answers 429."""
    codes: Counter[int] = field(default_factory=Counter)
    """Answers by status; 0: none came."""
    longest_gap_s: float = 0.0
    """Longest time without an answer."""

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "requests": sum(self.codes.values()),
            "codes": {str(code): count for code, count in sorted(self.codes.items())},
            "requests_per_s": round(len(self.ok_s) / self.seconds, 2) if self.seconds else 0.0,
            "pairs_per_s": round(self.pairs * len(self.ok_s) / self.seconds, 1) if self.seconds else 0.0,
            **quantiles_ms(self.ok_s),
        }


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95, p99 and the largest, in ms."""
    if not seconds:
        return {"p50_ms": None, "p95_ms": None, "p99_ms": None, "max_ms": None}
    values = np.percentile(np.array(seconds) * 1e3, (50, 95, 99, 100)).round(2).tolist()
    return dict(zip(("p50_ms", "p95_ms", "p99_ms", "max_ms"), values, strict=True))


@dataclass(frozen=True, slots=True)
class Request:
    """One POST, ready to be sent as often as wanted."""

    url: str
    """Whole address."""
    body: bytes
    """As it is sent."""
    headers: tuple[tuple[str, str], ...] = ()
    """In addition to Host and Content-Length."""
    pairs: int = 1
    """In the body."""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def head(self) -> bytes:
        """Return the lines before the body."""
        host, port = self.address
        lines = [
            f"POST {urlsplit(self.url).path} HTTP/1.1",
            f"Host: {host}:{port}",
            f"Content-Length: {len(self.body)}",
        ]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, "", ""]).encode()


def infer_request(base: str, event: np.ndarray, outputs: Sequence[str], target: np.ndarray | None = None) -> Request:
    """Return the endpoint's binary form, built by its client's own code."""
    from ray_app.client_wire import binary_request

    tensors = {"event": event} | ({} if target is None else {"target": target})
    head, blocks = binary_request(tensors, None if target is None else 0.8, outputs)
    headers = (("Inference-Header-Content-Length", str(len(head))), ("Content-Type", "application/octet-stream"))
    url = f"{base}/v2/models/alignment-adapter/infer"
    return Request(url, b"".join([head, *blocks]), headers, len(event))


class Caller:
    """One connection."""

    def __init__(self, request: Request, buffer: memoryview) -> None:
        self._request, self._head, self._buffer = request, request.head(), buffer
        self._socket: socket.socket | None = None

    async def ask(self) -> tuple[int, bytes, float]:
        """(status, head of the answer, seconds). Status 0: the connection was lost, or no answer came in time."""
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        try:
            async with asyncio.timeout(LIMIT_S):
                if self._socket is None:
                    self._socket = socket.socket()
                    self._socket.setblocking(False)
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    await loop.sock_connect(self._socket, self._request.address)
                await loop.sock_sendall(self._socket, self._head)
                await loop.sock_sendall(self._socket, self._request.body)
                status, head = await self._answer(loop, self._socket)
        except OSError:  # TimeoutError is one
            status, head = 0, b""
        if status == 0 or b"connection: close" in head.lower():
            self.close()
        return status, head, time.perf_counter() - began

    async def _answer(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> tuple[int, bytes]:
        held = b""
        while b"\r\n\r\n" not in held:
            chunk = await loop.sock_recv(connection, 65536)
            if not chunk:
                return 0, b""
            held += chunk
        head, _, rest = held.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        if b"content-length" in fields:
            left = int(fields[b"content-length"]) - len(rest)
            while left > 0:
                count = await loop.sock_recv_into(connection, self._buffer[: min(left, len(self._buffer))])
                if not count:
                    return 0, b""
                left -= count
        else:
            while not rest.endswith(b"0\r\n\r\n"):  # chunked
                chunk = await loop.sock_recv(connection, 1 << 20)
                if not chunk:
                    return 0, b""
                rest = (rest + chunk)[-16:]
        return int(head.split(b" ", 2)[1]), head

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def closed_loop(request: Request, callers: int, seconds: float, warm_s: float = 1.0) -> Traffic:
    """`callers` at a time for `seconds`, after an uncounted warm-up. Callers wait for the Retry-After of a 429."""
    return uvloop.run(_closed_loop(request, callers, seconds, warm_s))


async def _closed_loop(request: Request, callers: int, seconds: float, warm_s: float) -> Traffic:
    found, buffer = Traffic(request.pairs), memoryview(bytearray(1 << 20))
    start = time.perf_counter() + warm_s
    stop = start + seconds

    async def loop() -> None:
        caller = Caller(request, buffer)
        while (began := time.perf_counter()) < stop:
            status, head, took = await caller.ask()
            if began >= start:
                note(found, status, took)
            if status == 429:
                await asyncio.sleep(min(retry_after_s(head), max(0.0, stop - time.perf_counter())))
        caller.close()

    await asyncio.gather(*(loop() for _ in range(callers)))
    found.seconds = time.perf_counter() - start
    return found


def open_loop(request: Request, rate: float, seconds: float, most: int = 512) -> Traffic:
    """`rate` requests a second, evenly spaced, over at most `most` connections; without retries."""
    return uvloop.run(_open_loop(request, rate, seconds, most))


async def _open_loop(request: Request, rate: float, seconds: float, most: int) -> Traffic:
    found, buffer = Traffic(request.pairs), memoryview(bytearray(1 << 20))
    idle = [Caller(request, buffer) for _ in range(most)]
    tasks: set[asyncio.Task[None]] = set()

    async def once(caller: Caller) -> None:
        status, _, took = await caller.ask()
        note(found, status, took)
        idle.append(caller)

    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        while not idle:
            await asyncio.sleep(0.001)
        task = asyncio.create_task(once(idle.pop()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    found.seconds = time.perf_counter() - began
    for caller in idle:
        caller.close()
    return found


def note(found: Traffic, status: int, took: float) -> None:
    """Count one answer."""
    found.codes[status] += 1
    if status == 200:
        found.ok_s.append(took)
    elif status == 429:
        found.refused_s.append(took)


def retry_after_s(head: bytes) -> float:
    """As the answer says; a second where it does not."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"retry-after:"):
            return float(line.split(b":")[1])
    return 1.0


def json_body(event: np.ndarray) -> bytes:
    """As `mlflow models serve` takes a tensor."""
    return json.dumps({"inputs": event.tolist()}).encode()
