"""Client of the served endpoint: event features in, aligned features and verdicts out, as numpy arrays.

    with AlignmentClient("http://127.0.0.1:8000") as client:
        answer = client.verify(event_BE, target_BD, theta=0.8)
        answer.accepted_B

Built on `http.client` alone: it sends an array from where it lies and reads an answer into the memory that
the arrays of that answer are views of; libraries above it join and copy 600 KB a pair on both ways. It also
keeps a decoding loop's dependencies at numpy.

Inference is pure, so a request that got lost is sent again: on a lost connection, on 429 and 503 (after as
long as `Retry-After` says), and where something between here and the endpoint says that it lost it. One time
limit spans all of it. A client may be shared by threads: each call takes a connection of its own.

Shapes: B = pairs, E = event width, D = target width.
"""

import http.client
import json
import random
import ssl
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ray_app.client_wire import (
    Answer,
    Reply,
    Wire,
    binary_answer,
    binary_request,
    checked,
    json_answer,
    json_request,
)
from ray_app.errors import ConfigError, EndpointBusy, EndpointError, EndpointUnreachable

REQUEST_ID = "X-Request-Id"
AGAIN = (429, 503)
"""The endpoint says: later."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0
"""Waiting before a retry, where no `Retry-After` says how long: it doubles, and half of it is by chance."""


@dataclass(slots=True)
class AlignmentClient:
    """Calls one endpoint. Close it, or use it in a `with` block."""

    url: str
    """Such as `http://127.0.0.1:8000`; `https://` speaks TLS."""
    token: str | None = field(default=None, repr=False)
    """Bearer token; needed unless the endpoint is bound to loopback."""
    timeout_s: float = 10.0
    """For a whole call, retries and waiting included."""
    ca_file: str | None = None
    """Certificates (PEM) to trust instead of the system's."""
    model_name: str = "alignment-adapter"
    """As in the endpoint's addresses."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    """How to wait."""
    chance: random.Random = field(default_factory=random.Random, repr=False)
    """Spreads the retries of many callers."""
    retries: int = 0
    """Requests that were sent again so far."""
    _idle: list[http.client.HTTPConnection] = field(default_factory=list, repr=False)
    _prefix: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(
                f"'{self.url}' is no address of an endpoint; write http://HOST:PORT or https://HOST:PORT."
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s ({self.timeout_s}) must be positive")
        self._prefix = parts.path.rstrip("/")

    def align(self, event_BE: NDArray[Any], *, wire: Wire = "binary") -> Answer:
        """Aligned features (B, D). `event_BE`: pixels (uint8), or values (float32, float16, bfloat16).

        EndpointError says what the endpoint refuses and why; EndpointBusy and EndpointUnreachable, that the time
        limit was over before it answered.
        """
        return self._ask(wire, {"event": event_BE}, None, ("aligned",))

    def verify(
        self,
        event_BE: NDArray[Any],
        target_BD: NDArray[Any],
        *,
        theta: float = 0.8,
        aligned: bool = False,
        wire: Wire = "binary",
    ) -> Answer:
        """cos_sim and accepted, each (B,); with `aligned` also the features, which are a thousand times as large."""
        outputs = ("cos_sim", "accepted", *(("aligned",) if aligned else ()))
        return self._ask(wire, {"event": event_BE, "target": target_BD}, theta, outputs)

    def v1(self, route: Literal["align", "verify"], document: Mapping[str, Any]) -> dict[str, Any]:
        """POST /v1/ROUTE with any document that it takes (images, recordings, …); its answer."""
        return self._call("POST", f"/v1/{route}", [json.dumps(document).encode()], {}).json()

    def model(self) -> dict[str, Any]:
        """What is served: version, run, dataset fingerprint, metrics with their baselines, since when."""
        return self._call("GET", "/v1/model", [], {}).json()

    def ready(self) -> bool:
        """Whether the endpoint answers requests now. Never raises for being away, never waits for it."""
        try:
            return self._send("GET", "/v2/health/ready", [], {}, self.timeout_s).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def close(self) -> None:
        """Ends idle connections."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self, wire: Wire, tensors: Mapping[str, NDArray[Any]], theta: float | None, outputs: Sequence[str]
    ) -> Answer:
        ready = {name: checked(name, tensor) for name, tensor in tensors.items()}
        if wire == "binary":
            head, blocks = binary_request(ready, theta, outputs)
            path = f"/v2/models/{self.model_name}/infer"
            headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
            return binary_answer(self._call("POST", path, [head, *blocks], headers))
        document = json_request(ready, theta, outputs)
        path = "/v1/verify" if "target" in ready else "/v1/align"
        return json_answer(self._call("POST", path, [json.dumps(document).encode()], {}), outputs)

    def _call(self, method: str, path: str, blocks: Sequence[Any], headers: Mapping[str, str]) -> Reply:
        """Sends until it is answered or the time is over."""
        until, wait_s, last = time.monotonic() + self.timeout_s, FIRST_WAIT_S, "no attempt was finished"
        headers = {**headers, REQUEST_ID: uuid.uuid4().hex}
        kind: type[EndpointError] = EndpointUnreachable
        while (left_s := until - time.monotonic()) > 0:
            pause_s = wait_s * (0.5 + 0.5 * self.chance.random())
            try:
                reply = self._send(method, path, blocks, headers, left_s)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise EndpointUnreachable(f"{self.url}: {error}. ca_file names certificates to trust.") from error
                kind, last = EndpointUnreachable, f"{type(error).__name__}: {error}"
            else:
                if reply.status < 300:
                    return reply
                if not worth_another(reply):
                    raise refusal(reply)
                kind, last = EndpointBusy, str(refusal(reply))
                pause_s = max(pause_s, retry_after_s(reply))
            if pause_s >= until - time.monotonic():
                break
            self.sleep(pause_s)
            self.retries += 1
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise kind(
            f"{self.url} did not answer within {self.timeout_s:g} s; the last attempt: {last}. Look whether it runs "
            "and how much it is asked, or give a larger timeout_s."
        )

    def _send(
        self, method: str, path: str, blocks: Sequence[Any], headers: Mapping[str, str], left_s: float
    ) -> Reply:
        """One request and its answer. OSError or HTTPException where the connection was lost."""
        connection = self._connection(left_s)
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        sent = {}
        if method == "POST":
            length = str(sum(len(block) for block in blocks))
            left_ms = str(max(1, int(left_s * 1e3)))  # work that nobody waits for any more is dropped
            sent = {"Content-Type": "application/json", "Content-Length": length, "X-Request-Timeout-Ms": left_ms}
        try:
            try:
                body = iter(blocks) if blocks else None
                connection.request(method, self._prefix + path, body, {**sent, **headers, **authorization})
            except (BrokenPipeError, ConnectionResetError):
                pass  # it may have answered before it had everything, as it does to a body that is too large
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            reply = Reply(response.status, found, received(response), headers.get(REQUEST_ID, ""))
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return reply

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        try:
            connection = self._idle.pop()
        except IndexError:
            parts = urlsplit(self.url)
            assert parts.hostname
            if parts.scheme == "https":
                trusted = ssl.create_default_context(cafile=self.ca_file)
                return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=trusted)
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        return connection


def received(response: http.client.HTTPResponse) -> memoryview:
    """The whole body, read into the memory that it stays in. IncompleteRead if the connection ends before it."""
    if response.length is None:  # chunked
        return memoryview(response.read())
    body, place = np.empty(response.length, np.uint8).data, 0
    while place < len(body):
        count = response.readinto(body[place:])
        if not count:
            raise http.client.IncompleteRead(bytes(body[:place]), len(body) - place)
        place += count
    return body


def worth_another(reply: Reply) -> bool:
    """Whether to ask again: the endpoint says so, or it was not the endpoint that answered.

    Its own answers bear `application/problem+json`. A 5xx without that comes from a proxy whose replica is gone.
    """
    ours = reply.headers.get("content-type", "").startswith("application/problem+json")
    return reply.status in AGAIN or (reply.status >= 500 and not ours)


def retry_after_s(reply: Reply) -> float:
    """Seconds that the endpoint asks to wait; 0 where it does not say."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", "0")))
    except ValueError:  # a date: the client's own waiting will do
        return 0.0


def refusal(reply: Reply) -> EndpointError:
    """What the endpoint says against a request, in its own words."""
    said = reply.json()
    words = said.get("error") or bytes(reply.body[:300]).decode(errors="replace").strip() or "no reason was given"
    return EndpointError(
        f"{words} (HTTP {reply.status}, request {reply.request_id})", reply.status, str(said.get("code", ""))
    )
