"""Metrics and logs of requests: live numbers of several replicas as one, drift, a line of JSON each, spans."""

import gzip
import json
import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import INFER, WIDTH, LocalServer, binary_request, local_server, make_checkpoint, wait_for

from ray_app.errors import ConfigError
from serve.http.request import LOG, RequestContext
from serve.model.evaluation_record import EvaluationRecord, drift_reference, stability_index
from serve.observability.stats import Snapshot, summed
from serve.observability.tracing import OTLP, Tracing
from serve.protocol.body import BodyBudget

RNG = np.random.default_rng(5)
PERCENTILES = {"P10": 0.2, "P50": 0.5, "P90": 0.9}
BODY, HEADERS = binary_request(np.full((2, WIDTH), 0.5))
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("telemetry")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LocalServer]:
    checkpoint = make_checkpoint(folder / "checkpoint", metrics={"val": {"percentiles": PERCENTILES}})
    with local_server(checkpoint, traces=folder / "spans.jsonl", max_queue=64) as it:
        yield it


def test_the_stability_index_is_the_one_worked_by_hand() -> None:
    """Two bins, expected half and half, live three quarters and a quarter: 0.25 ln 1.5 - 0.25 ln 0.5."""
    edges, expected = np.array([0.5]), np.array([0.5, 0.5])
    live = np.array([0.1, 0.2, 0.3, 0.9])
    assert stability_index(live, edges, expected) == pytest.approx(0.25 * np.log(1.5) - 0.25 * np.log(0.5))
    assert stability_index(np.array([0.1, 0.9]), edges, expected) == 0.0
    empty = 0.5 * np.log(1 / 0.5) + (1e-4 - 0.5) * np.log(1e-4 / 0.5)
    assert stability_index(np.array([0.1, 0.2]), edges, expected) == pytest.approx(empty)


def test_the_baseline_is_of_the_test_part_where_there_is_one() -> None:
    part, edges, shares = drift_reference({"percentiles": PERCENTILES}, {"percentiles": {"P50": 0.0}}) or ("", [], [])
    assert part == "test"
    assert edges.tolist() == [0.2, 0.5, 0.9]
    assert shares == pytest.approx([0.1, 0.4, 0.4, 0.1])
    assert (drift_reference(None, {"percentiles": PERCENTILES}) or ("",))[0] == "val"
    assert drift_reference({"pairs": 3}, None) is None


def test_drift_is_reported_from_a_hundred_verified_pairs(server: LocalServer) -> None:
    """A target along what the adapter gives has cosine 1: above every percentile of the part it was judged on."""
    event = RNG.integers(1, 256, (10, WIDTH), dtype=np.uint8) / 255
    aligned = [row["aligned"] for row in server.json("POST", "/v1/align", {"event": event.tolist()})[1]["pairs"]]
    body = {"event": event.tolist(), "target": (0.1 * np.array(aligned)).tolist()}  # in the range of pixels
    for sent in range(10, 110, 10):
        assert server.json("POST", "/v1/verify", body)[0] == 200
        drift = server.json("GET", "/v1/stats")[1]["drift"]
        assert (drift["live_pairs"], drift["reference"]) == (sent, "val")
        assert (drift["psi"] is None) == (sent < 100)
    outside = sum((1e-4 - share) * np.log(1e-4 / share) for share in (0.1, 0.4, 0.4))
    assert drift["psi"] == pytest.approx(outside + 0.9 * np.log(1 / 0.1), rel=1e-6)
    assert server.metric("align_drift_psi") == pytest.approx(drift["psi"])
    verified = server.json("GET", "/v1/stats")[1]["verified"]
    assert (verified["pairs"], verified["accepted"]) == (100, 100)
    assert verified["cos_sim_mean"] == pytest.approx(1.0, abs=1e-5)


def snapshot(**changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "uptime_s": 5.0,
        "codes": Counter({"200": 3, "422": 1}),
        "request_rate": 1.5,
        "pair_rate": 4.0,
        "seconds": [0.001] * 4,
        "pairs": 6,
        "queue_rows": 2,
        "in_flight": 1,
        "verified": 60,
        "accepted": 30,
        "cos_sum": 30.0,
        "cosines": [0.1] * 60,
        "digest": "one",
    }
    return Snapshot(**{**values, **changes})


def test_the_numbers_of_two_replicas_are_summed() -> None:
    judged = EvaluationRecord(None, None, None, ("test", np.array([0.5]), np.array([0.5, 0.5])))
    other = snapshot(uptime_s=9.0, codes=Counter({"200": 2}), seconds=[0.003] * 4, verified=20, cos_sum=18.0)
    found = summed([snapshot(), other], judged, "one")
    assert (found["replicas"], found["uptime_s"]) == (2, 9.0)
    assert found["requests"] == {"total": 6, "by_code": {"200": 5, "422": 1}}
    assert (found["request_rate_10s"], found["pair_rate_10s"]) == (3.0, 8.0)
    assert (found["pairs"], found["queue_rows"], found["in_flight"]) == (12, 4, 2)
    assert found["latency_ms_60s"]["p50"] == 2.0, "of all requests, not the mean of percentiles"
    assert found["verified"] == {"pairs": 80, "accepted": 60, "cos_sim_mean": 0.6}
    assert found["drift"]["live_pairs"] == 120
    assert found["drift"]["psi"] is not None
    exchanged = summed([snapshot(), snapshot(digest="another")], judged, "one")
    assert exchanged["drift"] == {"live_pairs": 60, "reference": "test", "psi": None}
    assert summed([], judged, "one")["latency_ms_60s"] == {}


def test_each_request_is_a_line_of_json_with_its_id(server: LocalServer) -> None:
    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (line := json.loads(record.getMessage()))[
                "route"
            ] != "/v1/stats":  # of the test before, still under way
                lines.append(line)

    handler, level = Kept(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        answer = server.ask("POST", INFER, BODY, {**HEADERS, "x-request-id": "mine/7"})
        wrong = server.json("POST", "/v1/align", {"event": [[1.0]]})[1]
        server.ask("GET", "/v2/health/live", headers={"x-request-id": 'a"}\x85{"'})
        wait_for(lambda: len(lines) == 3)  # a line is written when its answer is under way
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
    assert [(line["route"], line["code"]) for line in lines] == [
        ("/v2/models/{model}/infer", 200),
        ("/v1/align", 422),
        ("/v2/health/live", 200),
    ]
    assert lines[0]["request_id"] == "mine/7"
    assert (lines[0]["pairs"], lines[0]["model_version"]) == (2, answer[1]["x-model-version"])
    assert lines[0]["ms"] > 0
    assert (lines[1]["request_id"], lines[1]["problem"]) == (wrong["request_id"], "width")
    assert lines[2]["request_id"] == "a_____", "clients cannot write into the log"


def test_a_span_takes_up_the_callers_trace(server: LocalServer, folder: Path) -> None:
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced"}
    assert server.ask("POST", INFER, BODY, {**HEADERS, **sent})[0] == 200
    assert (
        server.ask("GET", "/v2/health/live", headers={"traceparent": "00-zz", "x-request-id": "untraced"})[0] == 200
    )
    spans: dict[str, Any] = {}

    def written() -> bool:
        server.endpoint.tracing._provider.force_flush()
        for line in (folder / "spans.jsonl").read_text().splitlines():
            span = json.loads(line)
            spans[span["attributes"]["align.request_id"]] = span
        return {"traced", "untraced"} <= set(spans)

    wait_for(written)
    traced = spans["traced"]
    assert traced["name"] == "POST /v2/models/{model}/infer"
    assert traced["context"]["trace_id"] == f"0x{TRACE}"
    assert traced["parent_id"] == f"0x{PARENT}"
    assert (traced["attributes"]["align.pairs"], traced["attributes"]["http.request.method"]) == (2, "POST")
    assert traced["attributes"]["align.answer_ms"] > 0
    assert spans["untraced"]["parent_id"] is None


def test_spans_go_to_a_collector_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `traces` is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            got.append(gzip.decompress(data) if self.headers["content-encoding"] == "gzip" else data)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv(OTLP, f"http://127.0.0.1:{collector.server_port}")
        tracing = Tracing(None, "replica-1")
        path, header = "/v2/health/live", (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())
        with tracing.request(
            RequestContext.of({"path": path, "method": "GET", "headers": [header]}, BodyBudget(0).hold())
        ):
            pass
        tracing.close()
        collector.shutdown()
    (sent,) = ExportTraceServiceRequest.FromString(got[0]).resource_spans
    (span,) = sent.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (f"GET {path}", TRACE, PARENT)


def test_a_collector_without_its_exporter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTLP, "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"ray-app\[traces\]"):
        Tracing(None, "replica-1")
