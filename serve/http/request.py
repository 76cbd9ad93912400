"""Around every route: what is known of a request, authentication, JSON errors, metrics and the log line."""

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_app.config.serve import is_loopback

from ..protocol.body import BodyShare, read_body
from ..protocol.errors import PROBLEM_JSON, ApiError

if TYPE_CHECKING:
    from ..replica import ReplicaState

LOG = logging.getLogger("ray.serve")
OPEN = {"/", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
"""Paths that need no token: health, the API description, and the page that asks for the token."""
ADMIN = {"/v1/reload"}
REFUSAL_LOG_INTERVAL_S = 1.0
"""While the queue is full, one line per interval is logged, with the number of requests refused meanwhile."""
UNSAFE = re.compile(r"[^A-Za-z0-9._:/+-]")
AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::[0-9]{1,5})?")
TIMEOUT = b"x-request-timeout-ms"
MODEL_PATH = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
TEMPLATES = (
    (re.compile(MODEL_PATH + "/infer"), "/v2/models/{model}/infer"),
    (re.compile(MODEL_PATH + "/ready"), "/v2/models/{model}/ready"),
    (re.compile(MODEL_PATH), "/v2/models/{model}"),
)
ROUTES = {
    *OPEN,
    *ADMIN,
    "/metrics",
    "/v1/align",
    "/v1/model",
    "/v1/stats",
    "/v1/verify",
    "/v2",
}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


@dataclass(slots=True)
class RequestContext:
    """One request: who asks, for how long, and what is recorded about it for logs and metrics."""

    path: str
    """Path below the application's mount point."""
    method: str
    """GET, POST, …; OTHER for a method that HTTP does not define."""
    headers: Mapping[bytes, bytes]
    """Header values by lower-case name; the last one of several."""
    route: str
    """Path with parameters left in braces, the label of metrics; `other` for an unknown path."""
    share: BodyShare
    """Share of its body in the memory for bodies."""
    model: str | None = None
    """Model named in the path."""
    model_version: str | None = None
    """Version named in the path."""
    request_id: str = ""
    """Id sent by the client, else one made by Ray or here."""
    token: str | None = None
    """Name of the token."""
    started: float = field(default_factory=time.perf_counter)
    """Arrival on the clock of time.perf_counter."""
    version: str = ""
    """Version of the model that answered."""
    digest: str = ""
    """Digest of the model that answered."""
    pairs: int = 0
    """Pairs in the answer."""
    problem: str | None = None
    """Code of the error answer."""
    trace_id: str = ""
    """Trace id where tracing is on."""
    spans: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the request, for Server-Timing."""

    @staticmethod
    def of(scope: Scope, share: BodyShare) -> "RequestContext":
        """Read the request line and headers; never fails."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        headers = dict(scope["headers"])
        named, route = None, path if path in ROUTES else "other"
        for pattern, template in TEMPLATES:
            if named := pattern.fullmatch(path):
                route = template
                break
        return RequestContext(
            path=path,
            method=scope["method"] if scope["method"] in METHODS else "OTHER",
            headers=headers,
            route=route,
            share=share,
            model=named["model"] if named else None,
            model_version=named["version"] if named else None,
            request_id=UNSAFE.sub("_", headers.get(b"x-request-id", b"").decode("latin-1")[:128]),
        )

    def timeout_s(self, limit_s: float, asked_us: int | None = None) -> float:
        """Seconds left for this request, at most `limit_s` in all. ApiError 400: the header is not a number."""
        granted = limit_s
        if (text := self.headers.get(TIMEOUT)) is not None:
            if not re.fullmatch(rb"[0-9]{1,9}(\.[0-9]{1,6})?", text):
                raise ApiError(
                    400, "parameter", "x-request-timeout-ms must be a number of milliseconds, such as 250."
                )
            granted = min(granted, float(text) / 1e3)
        if asked_us and asked_us < granted * 1e6:
            granted = asked_us / 1e6
        return max(granted - (time.perf_counter() - self.started), 0.0)


def context_of(request: Request) -> tuple["ReplicaState", RequestContext]:
    """Return the replica and the context of a request inside of `RequestMiddleware`."""
    return request.scope["ray_app.replica"], request.scope["ray_app.request"]


async def body_of(request: Request, limit: int, raw_at: int = 0) -> memoryview:
    """Read the body of a request, as `read_body` does; its size is counted in the metrics."""
    replica, ctx = context_of(request)
    body = await read_body(ctx.headers, request.receive, limit, ctx.share, raw_at)
    replica.telemetry.body(len(body))
    return body


class RequestMiddleware:
    """Answers every request in JSON, errors included, and counts it once. Plain ASGI, around the routes."""

    def __init__(self, app: ASGIApp, replica: "ReplicaState") -> None:
        self._app, self._replica = app, replica
        self._refused, self._refusal_logged = 0, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ctx = RequestContext.of(scope, self._replica.bodies.hold())
        sender = ResponseSender(ctx, send, id_is_sent_by_ray=bool(ctx.request_id))
        ctx.request_id = ctx.request_id or f"{random.getrandbits(128):032x}"
        scope["ray_app.request"], scope["ray_app.replica"] = ctx, self._replica
        self._replica.telemetry.in_flight += 1
        try:
            with self._replica.tracing.request(ctx):
                self._authenticate(ctx, scope["headers"])
                if ctx.method == "HEAD":  # answered as GET; the HTTP server leaves out the body
                    scope = {**scope, "method": "GET"}
                await self._app(scope, with_deadline(receive, ctx, self._replica.cfg.timeout_s), sender.send)
        except ApiError as problem:
            await sender.problem(problem)
        except Exception:  # a bug: the traceback goes to the log, JSON to the client
            LOG.exception("request %s failed", ctx.request_id)
            detail = f"internal error; see the server's log under request {ctx.request_id}."
            if not sender.code:
                await sender.problem(ApiError(500, "internal", detail))
        finally:
            self._replica.telemetry.in_flight -= 1
            ctx.share.release()
            self._record(ctx, sender.code or 499)

    def _authenticate(self, ctx: RequestContext, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if ctx.path not in OPEN:
            scope_needed = "admin" if ctx.path in ADMIN else "infer"
            ctx.token = self._replica.tokens.check(ctx.headers.get(b"authorization"), scope_needed)
        if self._replica.tokens.path is None and not self._replica.cfg.no_auth:
            require_local(headers)

    def _record(self, ctx: RequestContext, code: int) -> None:
        seconds = time.perf_counter() - ctx.started
        telemetry = self._replica.telemetry
        telemetry.request(ctx.route, ctx.method, code, ctx.version, seconds, ctx.pairs)
        if ctx.problem:
            telemetry.rejected(ctx.problem)
        if ctx.problem == "busy":
            self._refused += 1
            if ctx.started - self._refusal_logged < REFUSAL_LOG_INTERVAL_S:
                return
        line: dict[str, Any] = {
            "event": "request",
            "request_id": ctx.request_id,
            "route": ctx.route,
            "method": ctx.method,
            "code": code,
            "ms": round(seconds * 1e3, 3),
            "pairs": ctx.pairs,
            "model_version": ctx.version,
            "token": ctx.token,
            "problem": ctx.problem,
            **({"trace_id": ctx.trace_id} if ctx.trace_id else {}),
        }
        if ctx.problem == "busy":
            line["refused"], self._refused, self._refusal_logged = self._refused, 0, ctx.started
        LOG.log(logging.WARNING if code >= 500 else logging.INFO, json.dumps(line))


class ResponseSender:
    """Wraps `send`: adds the headers of every answer and records the status code."""

    def __init__(self, ctx: RequestContext, send: Send, id_is_sent_by_ray: bool) -> None:
        self._ctx, self._send, self._id_is_sent = ctx, send, id_is_sent_by_ray
        self.code = 0

    async def send(self, message: Message) -> None:
        """Send an ASGI message of the routes."""
        if message["type"] == "http.response.start":
            self.code = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers()]}
        await self._send(message)

    async def problem(self, problem: ApiError) -> None:
        """Send an error answer. Raises it if an answer has started already."""
        if self.code:
            raise problem
        self._ctx.problem = problem.code
        body = problem.body(self._ctx.request_id)
        values = {"content-type": PROBLEM_JSON, "content-length": str(len(body)), **problem.headers}
        headers = [(name.encode(), value.encode()) for name, value in values.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        ctx = self._ctx
        timing = {**ctx.spans, "total": time.perf_counter() - ctx.started}
        headers = [
            (b"server-timing", ", ".join(f"{name};dur={s * 1e3:.2f}" for name, s in timing.items()).encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if ctx.version:
            headers += [(b"x-model-version", ctx.version.encode()), (b"x-model-digest", ctx.digest.encode())]
        if not self._id_is_sent:
            headers.append((b"x-request-id", ctx.request_id.encode()))
        return headers


def with_deadline(receive: Receive, ctx: RequestContext, limit_s: float) -> Receive:
    """Bound `receive` by the request's time, so that a slow sender holds no slot. It raises ApiError 504."""

    async def bounded() -> Message:
        try:
            async with asyncio.timeout(ctx.timeout_s(limit_s)):
                return await receive()
        except TimeoutError:
            detail = "the body did not arrive within the time of the request; allow more time, or send fewer pairs."
            raise ApiError(504, "deadline", detail) from None

    return bounded


def require_local(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """ApiError 403 for a request from another site's page, which a browser on this machine could be made to send."""
    for name, value in headers:
        text = value.decode("latin-1")
        if name == b"host" and not is_loopback(host_of(text)):
            detail = "without tokens this endpoint answers only as localhost; serve it with --token-file."
            raise ApiError(403, "forbidden", detail)
        foreign = name == b"origin" and not is_loopback(host_of(text.partition("://")[2]))
        if foreign or (name == b"sec-fetch-site" and text in ("cross-site", "same-site")):
            detail = "pages of other sites are refused without tokens; serve with --token-file."
            raise ApiError(403, "forbidden", detail)


def host_of(authority: str) -> str:
    """Return the host of `HOST`, `HOST:PORT` or `[IPV6]:PORT`, empty if it is none of them."""
    matched = AUTHORITY.fullmatch(authority)
    return (matched["v6"] or matched["name"]) if matched else ""
