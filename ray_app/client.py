"""Client of the served endpoint: event features in, aligned features and verdicts out, as numpy arrays.

    with AlignmentClient("http://127.0.0.1:8000") as client:
        answer = client.verify(event_BE, target_BD, theta=0.8)
        answer.accepted_B

Needs numpy and urllib3. An array is sent from its own memory, and the arrays of an answer are views of its body.

Inference is pure, so a lost request is sent again: after a lost connection, after 429 and 503 (when `Retry-After`
says), and where a proxy in front of the endpoint answers for it. One deadline spans all attempts. A client may be
shared by threads: each call takes a connection of its own.

Shapes: B = pairs, E = event width, D = target width.
"""

import json
import re
import ssl
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
import urllib3
from numpy.typing import NDArray
from urllib3.exceptions import HTTPError, IncompleteRead, InvalidHeader, SSLError

from ray_app.client_wire import (
    Answer,
    Reply,
    Wire,
    binary_answer,
    binary_request,
    check_arrays,
    json_answer,
    json_request,
)
from ray_app.errors import ConfigError, EndpointBusy, EndpointError, EndpointUnreachable

REQUEST_ID = "X-Request-Id"
BUSY = (429, 503)
"""Statuses by which the endpoint asks for another attempt."""
NO_ROUTES = b"for available routes"
"""In Ray's answer 404, in plain text, to a path that it does not know."""
BACKOFF = urllib3.Retry(total=None, allowed_methods=None, backoff_factor=0.05, backoff_max=1.0, backoff_jitter=0.05)
"""Pauses between attempts, in seconds, where no `Retry-After` names one: 0, then 0.1, doubling up to 1."""
MAX_IDLE_CONNECTIONS = 64
TAG = re.compile(r"<[^<>]*>")
MAX_FOREIGN_BYTES, MAX_FOREIGN_WORDS = 2**18, 2000
"""Bytes that are read, and characters that are shown, of an answer that is not the endpoint's own."""


@dataclass(slots=True)
class AlignmentClient:
    """Client of one endpoint. Close it, or use it in a `with` block."""

    url: str
    """Address such as `http://127.0.0.1:8000`, or `https://…` for TLS."""
    token: str | None = field(default=None, repr=False)
    """Bearer token; needed unless the endpoint is bound to loopback."""
    timeout_s: float = 10.0
    """Longest time of a call, with retries and pauses."""
    ca_file: str | None = None
    """Certificates (PEM) to trust instead of the system's."""
    model_name: str = "alignment-adapter"
    """Name of the model in the endpoint's addresses."""
    retries: int = 0
    """Requests that were sent again so far."""
    _pool: urllib3.HTTPConnectionPool = field(init=False, repr=False)
    _prefix: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(
                f"'{self.url}' is not an endpoint's address; write http://HOST:PORT or https://HOST:PORT"
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s ({self.timeout_s}) must be positive")
        trust = {"ssl_context": ssl.create_default_context(cafile=self.ca_file)} if parts.scheme == "https" else {}
        self._pool = urllib3.connection_from_url(self.url, maxsize=MAX_IDLE_CONNECTIONS, **trust)
        self._prefix = parts.path.rstrip("/")

    def align(self, event_BE: NDArray[Any], *, wire: Wire = "binary") -> Answer:
        """Return aligned features (B, D). `event_BE`: pixels (uint8), or values (float32, float16, bfloat16).

        EndpointError: the endpoint refuses the request. EndpointBusy, EndpointUnreachable: no answer in time.
        """
        return self._infer(wire, {"event": event_BE}, None, ("aligned",))

    def verify(
        self,
        event_BE: NDArray[Any],
        target_BD: NDArray[Any],
        *,
        theta: float = 0.8,
        aligned: bool = False,
        wire: Wire = "binary",
    ) -> Answer:
        """Return cos_sim and accepted, each (B,); with `aligned` also the features, a thousand times as large."""
        outputs = ("cos_sim", "accepted", *(("aligned",) if aligned else ()))
        return self._infer(wire, {"event": event_BE, "target": target_BD}, theta, outputs)

    def v1(self, route: Literal["align", "verify"], document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to POST /v1/ROUTE with any document that it takes (images, recordings, …)."""
        return self._call("POST", f"/v1/{route}", [json.dumps(document).encode()], {}).json()

    def model(self) -> dict[str, Any]:
        """Return what is served: version, run, dataset fingerprint, metrics with their baselines, since when."""
        return self._call("GET", "/v1/model", [], {}).json()

    def ready(self) -> bool:
        """Return True if the endpoint answers requests now; one attempt, and no error where it is away."""
        try:
            return self._send("GET", "/v2/health/ready", [], {}, time.monotonic() + self.timeout_s).status == 200
        except (OSError, HTTPError):
            return False

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _infer(
        self, wire: Wire, tensors: Mapping[str, NDArray[Any]], theta: float | None, outputs: Sequence[str]
    ) -> Answer:
        ready = {name: check_arrays(name, tensor) for name, tensor in tensors.items()}
        if wire == "binary":
            head, blocks = binary_request(ready, theta, outputs)
            path = f"/v2/models/{self.model_name}/infer"
            headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
            return binary_answer(self._call("POST", path, [head, *blocks], headers))
        document = json_request(ready, theta, outputs)
        path = "/v1/verify" if "target" in ready else "/v1/align"
        return json_answer(self._call("POST", path, [json.dumps(document).encode()], {}), outputs)

    def _call(self, method: str, path: str, blocks: Sequence[Any], headers: Mapping[str, str]) -> Reply:
        """Send until there is an answer or the deadline has passed."""
        deadline, backoff = time.monotonic() + self.timeout_s, BACKOFF
        headers = {**headers, REQUEST_ID: uuid.uuid4().hex}
        failure: type[EndpointError] = EndpointUnreachable
        reason = "no attempt was finished"
        while time.monotonic() < deadline:
            retry_after_s = 0.0
            try:
                reply = self._send(method, path, blocks, headers, deadline)
            except (OSError, HTTPError) as error:
                if isinstance(error, SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
                    raise EndpointUnreachable(f"{self.url}: {error}. ca_file names certificates to trust.") from error
                failure, reason = EndpointUnreachable, str(error)
            else:
                if reply.status < 300:
                    return reply
                if not worth_another(reply):
                    raise refusal(reply)
                failure, reason = EndpointBusy, str(refusal(reply))
                retry_after_s = asked_pause_s(reply)
            backoff = backoff.increment(method, path, error=HTTPError(reason))
            pause_s = max(retry_after_s, backoff.get_backoff_time())
            if pause_s >= deadline - time.monotonic():
                break
            time.sleep(pause_s)
            self.retries += 1
        raise failure(
            f"{self.url} did not answer within {self.timeout_s:g} s; the last attempt: {reason}. Check that it runs "
            "and its load, or give a larger timeout_s."
        )

    def _send(
        self, method: str, path: str, blocks: Sequence[Any], headers: Mapping[str, str], deadline: float
    ) -> Reply:
        """Return the answer to one request. HTTPError: the connection was lost, or the deadline has passed."""
        left_s = max(deadline - time.monotonic(), 1e-3)
        sent = dict(headers)
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        if method == "POST":  # the endpoint drops work that is late
            sent = {"Content-Type": "application/json", "X-Request-Timeout-Ms": str(max(1, int(left_s * 1e3)))} | sent
            sent["Content-Length"] = str(sum(len(block) for block in blocks))
        response = self._pool.urlopen(
            method,
            self._prefix + path,
            body=iter(blocks) if blocks else None,
            headers=sent,
            retries=False,
            timeout=urllib3.Timeout(total=left_s),
            preload_content=False,
        )
        try:
            body = receive(response, deadline)
        except BaseException:
            response.close()
            raise
        response.release_conn()
        names = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status, names, body, sent.get(REQUEST_ID, ""))


def receive(response: urllib3.BaseHTTPResponse, deadline: float) -> memoryview:
    """Return the whole body in writable memory. HTTPError: the connection ended early, or the deadline has passed."""
    length = int(response.headers.get("content-length", -1))
    if length < 0:  # chunked
        chunks = bytearray()
        while piece := _piece(response, deadline, 2**20, len(chunks)):
            chunks += piece
        return memoryview(chunks)
    body, received = np.empty(length, np.uint8).data, 0
    while received < length:
        piece = _piece(response, deadline, length - received, received)
        if not piece:
            raise IncompleteRead(received, length - received)
        body[received : received + len(piece)] = piece
        received += len(piece)
    return body


def _piece(response: urllib3.BaseHTTPResponse, deadline: float, most: int, received: int) -> bytes:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise HTTPError(f"timed out after {received} bytes of the answer")
    if sock := getattr(response.connection, "sock", None):
        sock.settimeout(left_s)
    return response.read1(most)


def worth_another(reply: Reply) -> bool:
    """Return True if the endpoint asks for another attempt, or if something else answered in its place.

    The endpoint's own errors are `application/problem+json`; a 5xx of another type comes from a proxy, and so does
    Ray's 404, which it answers for every path while it knows of no replica.
    """
    if reply.headers.get("content-type", "").startswith("application/problem+json"):
        return reply.status in BUSY
    no_routes = reply.status == 404 and NO_ROUTES in bytes(reply.body[:4096])
    return reply.status in BUSY or reply.status >= 500 or no_routes


def asked_pause_s(reply: Reply) -> float:
    """Return the seconds of `Retry-After`; 0 without it, or where it is neither a number nor a date."""
    try:
        return BACKOFF.parse_retry_after(reply.headers.get("retry-after", "0"))
    except InvalidHeader:
        return 0.0


def foreign_words(body: memoryview) -> str:
    """Return the text of an answer that is not the endpoint's own, such as a proxy's page; of a long one both ends.

    The cause is often at the end, as in a traceback.
    """
    text = " ".join(TAG.sub(" ", bytes(body[:MAX_FOREIGN_BYTES]).decode(errors="replace")).split())
    half = MAX_FOREIGN_WORDS // 2
    return text if len(text) <= MAX_FOREIGN_WORDS else f"{text[:half]} … {text[-half:]}"


def refusal(reply: Reply) -> EndpointError:
    """Return the endpoint's own words about a request as an error."""
    document = reply.json()
    words = document.get("error") or foreign_words(reply.body) or "no reason was given"
    return EndpointError(
        f"{words} (HTTP {reply.status}, request {reply.request_id})", reply.status, str(document.get("code", ""))
    )
