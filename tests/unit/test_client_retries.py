"""What the client asks again, when, and for how long: a server that answers from a script, and a clock of our own."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from ray_app import client as client_module
from ray_app.client import AlignmentClient
from ray_app.errors import EndpointBusy, EndpointError, EndpointUnreachable

PROBLEM, HTML = "application/problem+json", "text/html"
Answer = tuple[int, dict[str, str]]
OK: Answer = (200, {"Content-Type": "application/json"})


class ScriptedServer(ThreadingHTTPServer):
    """Gives the answers of its script in turn, the last one for good. None: never answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Scripted)
        self.script: list[Answer | None] = []
        self.body = json.dumps({"error": "said by the script", "code": "script"}).encode()
        self.requests: list[dict[str, str]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Scripted(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        script, number = self.server.script, len(self.server.requests)
        self.server.requests.append(dict(self.headers))
        answer = script[min(number, len(script) - 1)]
        if answer is None:
            self.server.over.wait()
            return
        status, headers = answer
        body = self.server.body
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as it:
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield it
        it.over.set()
        it.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every pause of the client, in seconds; its clock moves by them alone."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 100.0 + sum(slept), sleep=slept.append, time=time.time)
    monkeypatch.setattr(client_module, "time", clock)
    return slept


def busy(retry_after: str | None = None, status: int = 429) -> Answer:
    return status, {"Content-Type": PROBLEM} | ({"Retry-After": retry_after} if retry_after else {})


@pytest.mark.parametrize("status", [429, 503])
def test_the_client_waits_as_long_as_retry_after_says(
    server: ScriptedServer, pauses: list[float], status: int
) -> None:
    server.script = [busy("7", status), busy("3", status), OK]
    with AlignmentClient(server.url, timeout_s=60) as client:
        client.model()
        assert client.retries == 2
    assert pauses == [7.0, 3.0]


def test_without_retry_after_pauses_grow_and_stay_small(server: ScriptedServer, pauses: list[float]) -> None:
    server.script = [busy()] * 8 + [OK]
    with AlignmentClient(server.url, timeout_s=60) as client:
        client.model()
    assert len(pauses) == 8
    assert pauses[-1] > pauses[1] > 0
    assert max(pauses) <= 1.0 + 0.05


def test_a_pause_that_would_end_after_the_limit_is_not_started(server: ScriptedServer, pauses: list[float]) -> None:
    server.script = [busy("30"), OK]
    with AlignmentClient(server.url, timeout_s=10) as client, pytest.raises(EndpointBusy, match="said by the script"):
        client.model()
    assert pauses == []
    assert len(server.requests) == 1


def test_a_call_never_outlasts_its_limit(server: ScriptedServer, pauses: list[float]) -> None:
    server.script = [busy()]
    with AlignmentClient(server.url, timeout_s=4) as client, pytest.raises(EndpointBusy, match="within 4 s"):
        client.model()
    assert 2.5 < sum(pauses) < 4.0
    assert len(server.requests) == len(pauses) + 1


@pytest.mark.parametrize("status", [500, 504, 400, 404, 422])
def test_the_endpoint_s_own_error_is_raised_and_not_asked_again(
    server: ScriptedServer, pauses: list[float], status: int
) -> None:
    server.script = [(status, {"Content-Type": PROBLEM}), OK]
    with AlignmentClient(server.url) as client, pytest.raises(EndpointError, match="said by the script") as caught:
        client.model()
    assert (caught.value.status, caught.value.code) == (status, "script")
    assert not isinstance(caught.value, EndpointBusy)
    assert (len(server.requests), pauses) == (1, [])


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_5xx_of_something_in_between_is_asked_again(
    server: ScriptedServer, pauses: list[float], status: int
) -> None:
    server.script = [(status, {"Content-Type": HTML}), OK]
    with AlignmentClient(server.url) as client:
        assert client.model()["code"] == "script"
    assert (len(server.requests), len(pauses)) == (2, 1)


def test_a_kept_connection_has_the_limit_of_the_call_it_is_used_for(server: ScriptedServer) -> None:
    server.script = [OK, None]
    with AlignmentClient(server.url, timeout_s=300) as client:
        client.model()
        client.timeout_s = 0.3
        with pytest.raises(EndpointUnreachable, match=r"within 0\.3 s.*timed out"):
            client.model()
    assert len(server.requests) == 2


def test_of_a_long_page_of_something_else_the_cause_at_its_end_is_kept(server: ScriptedServer) -> None:
    server.script = [(400, {"Content-Type": HTML})]
    server.body = (
        b"<html><h1>A proxy\n says</h1>" + b"<p>frame of a traceback</p>" * 500 + b"RuntimeError: the cause</html>"
    )
    with AlignmentClient(server.url) as client, pytest.raises(EndpointError) as raised:
        client.model()
    words = str(raised.value)
    assert words.startswith("A proxy says frame of a traceback")
    assert "RuntimeError: the cause (HTTP 400" in words
    assert len(words) < 2200
    assert "<" not in words
    server.body = b"<" * 2**20
    with AlignmentClient(server.url) as client, pytest.raises(EndpointError, match="<<<< … <<<<"):
        client.model()
