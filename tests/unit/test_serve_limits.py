"""Limits and backpressure: bodies are counted as they arrive and when inflated, a full queue says so at once."""

import asyncio
import gzip
import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import uvicorn
import uvloop
from endpoints import INFER, WIDTH, LocalServer, binary_request, local_server, make_checkpoint, wait_for

from serve.http.accept import TIMES, accept_often
from serve.http.middleware import BypassMiddleware

LIMIT = 2**18
"""Bytes of a body here: 85 rows of FP32."""
GOOD, GOOD_HEADERS = binary_request(np.full((1, WIDTH), 0.5))
FULL, FULL_HEADERS = binary_request(np.full((4, WIDTH), 0.5))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("limits") / "checkpoint")
    limits = {"max_batch": 4, "max_queue": 8, "max_body_mib": LIMIT / 2**20, "max_json_mib": LIMIT / 2**21}
    with local_server(checkpoint, **limits) as it:
        yield it


def test_a_body_that_is_declared_too_large_is_refused(server: LocalServer) -> None:
    status, problem = server.json("POST", INFER, bytes(LIMIT + 1), headers=GOOD_HEADERS)
    assert (status, problem["code"]) == (413, "too_large")
    assert f"{LIMIT + 1:,} bytes, the limit is {LIMIT:,}" in problem["error"]


def test_a_body_that_grows_too_large_is_refused(server: LocalServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(
        "POST", INFER, (bytes(1000) for _ in range(LIMIT // 1000 + 1)), GOOD_HEADERS, encode_chunked=True
    )
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (413, "too_large")
    connection.close()


def test_a_body_that_inflates_too_large_is_refused_and_not_held(server: LocalServer) -> None:
    bomb = gzip.compress(bytes(LIMIT * 200))
    assert len(bomb) < LIMIT
    status, problem = server.json("POST", INFER, bomb, headers={**GOOD_HEADERS, "content-encoding": "gzip"})
    assert (status, problem["code"]) == (413, "too_large")
    assert "when inflated" in problem["error"]


def test_json_has_a_limit_of_its_own(server: LocalServer) -> None:
    status, problem = server.json("POST", "/v1/align", b"[" + b" " * (LIMIT // 2))
    assert (status, problem["code"]) == (413, "too_large")
    assert server.ask("POST", INFER, FULL, FULL_HEADERS)[0] == 200


def test_a_caller_may_ask_for_less_time(server: LocalServer) -> None:
    status, problem = server.json("POST", INFER, GOOD, headers={**GOOD_HEADERS, "x-request-timeout-ms": "0.001"})
    assert (status, problem["code"]) == (504, "deadline")
    status, problem = server.json("POST", INFER, GOOD, headers={**GOOD_HEADERS, "x-request-timeout-ms": "soon"})
    assert (status, problem["code"]) == (400, "parameter")
    assert server.ask("POST", INFER, GOOD, {**GOOD_HEADERS, "x-request-timeout-ms": "5000"})[0] == 200


@pytest.mark.parametrize("path", [INFER, "/v1/align"])
def test_a_body_that_does_not_arrive_holds_no_place(server: LocalServer, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.putrequest("POST", path)
    told = {**GOOD_HEADERS, "content-type": "application/json", "x-request-timeout-ms": "200"}
    for name, value in {**told, "content-length": str(len(GOOD))}.items():
        connection.putheader(name, value)
    connection.endheaders(GOOD[:10])
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (504, "deadline")
    connection.close()
    assert server.endpoint.telemetry.in_flight == 0


def test_overload_is_answered_429_and_callers_counts_are_the_servers(server: LocalServer) -> None:
    slow(server)
    before = {code: server.metric("align_requests_total", code=code, method="POST") for code in ("200", "429")}
    refused_ms = []

    def caller(_: int) -> list[int]:
        codes = []
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for _ in range(10):
            began = time.perf_counter()
            connection.request("POST", INFER, FULL, FULL_HEADERS)
            answer = connection.getresponse()
            answer.read()
            codes.append(answer.status)
            if answer.status == 429:
                refused_ms.append((time.perf_counter() - began) * 1e3)
                assert int(answer.getheader("retry-after")) >= 1
                assert answer.getheader("content-type") == "application/problem+json"
        connection.close()
        return codes

    with ThreadPoolExecutor(12) as pool:
        codes = Counter(code for codes in pool.map(caller, range(12)) for code in codes)
    assert set(codes) == {200, 429}
    assert codes[200] >= 3
    for code, earlier in before.items():
        assert server.metric("align_requests_total", code=code, method="POST") - earlier == codes[int(code)]
    assert server.metric("align_rejected_total", reason="busy") == codes[429]
    assert float(np.median(refused_ms)) < 20.0
    assert server.endpoint.batcher.queued_rows == 0


def test_a_full_queue_is_told_before_ray_reads_the_body(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []

    async def ray(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        reached.append(scope["path"])

    async def never() -> Any:
        raise AssertionError("the body was read")

    def asked(method: str, path: str, told: dict[str, str]) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(name.lower().encode(), value.encode()) for name, value in told.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        asyncio.run(BypassMiddleware(ray)(scope, never, send))
        return sent

    endpoint = server.endpoint
    monkeypatch.setattr(BypassMiddleware, "edge", server.edge)
    asked("POST", INFER, GOOD_HEADERS)
    assert reached == [INFER], "there is a place, and the endpoint lives in another event loop: Ray takes it"
    monkeypatch.setattr(endpoint.batcher, "queued_rows", 8)
    before = server.metric("align_requests_total", code="429")
    for path, method in ((INFER, "GET"), ("/v1/reload", "POST"), ("/v2/health/ready", "GET")):
        asked(method, path, {})
    assert reached == [INFER, INFER, "/v1/reload", "/v2/health/ready"], "what waits for no forward pass goes on"
    for path in (INFER, "/v1/align", "/v1/verify"):
        start, body = asked("POST", path, {**GOOD_HEADERS, "x-request-id": "mine"})
        headers = dict(start["headers"])
        assert (start["status"], headers[b"x-request-id"]) == (429, b"mine")
        assert int(headers[b"retry-after"]) >= 1
        assert json.loads(body["body"])["code"] == "busy"
    assert len(dict(asked("POST", INFER, GOOD_HEADERS)[0]["headers"])[b"x-request-id"]) == 32
    assert server.metric("align_requests_total", code="429") - before == 4
    assert len(reached) == 4


def test_an_inference_goes_past_ray(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ray(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        raise AssertionError("Ray was asked")

    async def asked() -> list[Any]:
        parts = [GOOD[:100], GOOD[100:]]
        left = asyncio.Event()  # the caller stays

        async def receive() -> Any:
            if not parts:
                await left.wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        sent: list[Any] = []
        headers = [(name.lower().encode(), value.encode()) for name, value in GOOD_HEADERS.items()]
        scope = {"type": "http", "method": "POST", "path": INFER, "query_string": b"", "headers": headers}
        await BypassMiddleware(ray)(scope, receive, send)
        return sent

    monkeypatch.setattr(BypassMiddleware, "edge", server.edge)
    assert server.endpoint._loop is not None
    start, *parts = asyncio.run_coroutine_threadsafe(asked(), server.endpoint._loop).result(30)
    assert start["status"] == 200
    headers = dict(start["headers"])
    assert len(headers[b"x-request-id"]) == 32
    body = b"".join(part["body"] for part in parts)
    assert (
        body[int(headers[b"inference-header-content-length"]) :]
        == server.ask("POST", INFER, GOOD, GOOD_HEADERS)[2][int(headers[b"inference-header-content-length"]) :]
    )


def test_a_caller_who_leaves_costs_no_forward_pass(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, done, free = server.endpoint.batcher, [], threading.Event()
    inner = batcher._predict

    def predict(works: Any) -> Any:
        free.wait(10)
        done.extend(works)
        return inner(works)

    monkeypatch.setattr(batcher, "_predict", predict)
    before = server.metric("align_requests_total", code="499")
    head = "".join(f"{name}: {value}\r\n" for name, value in {**GOOD_HEADERS, "content-length": len(GOOD)}.items())
    callers = []
    for waiting in (0, 1):  # the first is computed at once, the other waits
        caller = socket.create_connection(("127.0.0.1", server.port))
        caller.sendall(f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode() + GOOD)
        wait_for(lambda: batcher._began is not None and batcher.queued_rows == waiting)  # noqa: B023
        callers.append(caller)
    for caller in callers:
        caller.close()
    wait_for(lambda: server.metric("align_requests_total", code="499") - before == 2)
    free.set()
    wait_for(lambda: batcher._began is None and batcher.queued_rows == 0)
    assert len(done) == 1
    assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 200


def test_a_flood_fills_no_log(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("serve.http.asgi.LOG.log", lambda _, line: lines.append(json.loads(line)))
    monkeypatch.setattr("serve.http.asgi.REFUSALS_S", 0.3)
    monkeypatch.setattr(server.endpoint.batcher, "queued_rows", 8)
    time.sleep(0.35)  # since another test's
    told = server.metric("align_requests_total", code="429")
    for _ in range(5):
        assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 429
    time.sleep(0.35)
    assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 429
    refused = [line for line in lines if line["problem"] == "busy"]
    assert [line["refused"] for line in refused][-1] == 5
    assert len(refused) == 2, "one at once, one for all that came within the time"
    assert server.metric("align_requests_total", code="429") - told == 6


def test_many_connections_are_taken_in_a_turn_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop alone takes one, and 200 would wait for 200 turns."""
    monkeypatch.setattr(uvicorn, "Server", uvicorn.Server)
    alone = uvicorn.Server
    accept_often()
    often = uvicorn.Server
    accept_often()
    assert uvicorn.Server is often, "asked again, it stays so"
    turns = {server: uvloop.run(turns_for(200, server)) for server in (alone, often)}
    assert turns[alone] >= 200
    assert turns[often] <= 200 // TIMES + 5


async def turns_for(connections: int, server: type[uvicorn.Server]) -> int:
    """Turns of the event loop until so many connections, open before the first, are all taken. Then none is."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2 * connections)
    address = listening.getsockname()
    it = server(uvicorn.Config(refuse, log_level="critical", lifespan="off"))
    callers = [socket.create_connection(address) for _ in range(connections)]
    serving = asyncio.create_task(it.serve(sockets=[listening]))
    turns = 0
    while len(it.server_state.connections) < connections:
        turns += bool(it.started)
        await asyncio.sleep(0)
    it.should_exit = True
    await serving
    for caller in callers:
        caller.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    return turns


async def refuse(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    raise AssertionError("nothing was asked")


def test_headers_reach_ray_in_ascii() -> None:
    """It takes the bytes of some for UTF-8, and answers 500 where they are not."""
    reached: list[Any] = []

    async def ray(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        reached.append(dict(scope["headers"]))

    sent = [(b"x-request-id", b"caf\xe9"), (b"x-session-id", "日".encode()), (b"accept", b"*/*")]
    for kind in ("http", "websocket"):
        asyncio.run(BypassMiddleware(ray)({"type": kind, "path": "/", "headers": sent}, None, None))  # type: ignore[arg-type]
    asyncio.run(BypassMiddleware(ray)({"type": "http", "path": "/", "headers": sent[2:]}, None, None))  # type: ignore[arg-type]
    plain = {b"x-request-id": b"caf_", b"x-session-id": b"___", b"accept": b"*/*"}
    assert reached == [plain, plain, {b"accept": b"*/*"}]


def slow(server: LocalServer) -> None:
    """A forward pass of 30 ms: of a wide model, on a narrow one."""
    batcher = server.endpoint.batcher
    inner = batcher._predict

    def predict(works: Any) -> Any:
        time.sleep(0.03)
        return inner(works)

    batcher._predict = predict
