"""Limits and backpressure: bodies are counted as they arrive and when inflated, a full queue says so at once."""

import gzip
import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from endpoints import INFER, WIDTH, LocalServer, binary_request, local_server, make_checkpoint

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
    headers = {**GOOD_HEADERS, "content-type": "application/json", "x-request-timeout-ms": "200"}
    for name, value in {**headers, "content-length": str(len(GOOD))}.items():
        connection.putheader(name, value)
    connection.endheaders(GOOD[:10])
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (504, "deadline")
    connection.close()
    assert server.endpoint.telemetry.in_flight == 0


def test_overload_is_answered_429_and_callers_counts_are_the_servers(server: LocalServer) -> None:
    slow(server)
    before = {code: server.metric("align_requests_total", code=code, method="POST") for code in ("200", "429")}
    times_ms: dict[int, list[float]] = {200: [], 429: []}

    def caller(_: int) -> list[int]:
        codes = []
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for _ in range(10):
            began = time.perf_counter()
            connection.request("POST", INFER, FULL, FULL_HEADERS)
            answer = connection.getresponse()
            answer.read()
            codes.append(answer.status)
            times_ms[answer.status].append((time.perf_counter() - began) * 1e3)
            if answer.status == 429:
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
    assert 3 * np.median(times_ms[429]) < np.median(times_ms[200]), "a refusal waits for no forward pass"
    assert server.endpoint.batcher.queued_rows == 0


@pytest.mark.parametrize("path", [INFER, "/v1/align", "/v1/verify"])
def test_a_full_queue_refuses_whatever_waits_for_a_forward_pass(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(server.endpoint.batcher, "queued_rows", 8)
    status, headers, data = server.ask("POST", path, GOOD, GOOD_HEADERS)
    assert (status, json.loads(data)["code"]) == (429, "busy")
    assert int(headers["retry-after"]) >= 1
    assert server.ask("GET", "/v2/health/ready")[0] == 200, "what waits for no forward pass is answered"


def test_a_flood_fills_no_log(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("serve.http.request.LOG.log", lambda _, line: lines.append(json.loads(line)))
    monkeypatch.setattr("serve.http.request.REFUSAL_LOG_INTERVAL_S", 0.3)
    monkeypatch.setattr(server.endpoint.batcher, "queued_rows", 8)
    time.sleep(0.35)  # since another test's
    before = server.metric("align_requests_total", code="429")
    for _ in range(5):
        assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 429
    time.sleep(0.35)
    assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 429
    refused = [line for line in lines if line["problem"] == "busy"]
    assert [line["refused"] for line in refused][-1] == 5
    assert len(refused) == 2, "one at once, one for all that came within the time"
    assert server.metric("align_requests_total", code="429") - before == 6


def slow(server: LocalServer) -> None:
    """A forward pass of 30 ms: of a wide model, on a narrow one."""
    batcher = server.endpoint.batcher
    inner = batcher._predict

    def predict(works: Any) -> Any:
        time.sleep(0.03)
        return inner(works)

    batcher._predict = predict
