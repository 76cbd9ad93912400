"""The outermost layer, plain ASGI: keys, the short way for binary requests, and what is told of each request.

Whatever happens behind it, the caller gets an answer in JSON, and it is counted once.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..observability.tracing import Tracing
from ..protocol.errors import PROBLEM_JSON, ApiError
from ..protocol.request_context import RequestContext
from ..replica_state import ReplicaState

LOG = logging.getLogger("ray.serve")
OPEN = {"/", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
"""Asked without a token: whether it lives, what it speaks, and the page that asks for one."""
ADMIN = {"/v1/reload"}
INFER = "/v2/models/{model}/infer"
QUEUED = {INFER, "/v1/align", "/v1/verify"}
"""Asked by POST, they wait for a forward pass."""
REFUSALS_S = 1.0
"""A flood fills no log: in so much time one refusal for a full queue has a line, with how many there were."""
LOCAL = ("localhost", "127.0.0.1", "[::1]")

Infer = Callable[[ReplicaState, RequestContext, Receive], Awaitable[tuple[list[tuple[bytes, bytes]], list[bytes]]]]


class AsgiApp:
    """Between Ray Serve and the routes."""

    def __init__(self, endpoint: ReplicaState, infer: Infer, api: ASGIApp, tracing: Tracing) -> None:
        self._endpoint, self._infer, self._api, self._tracing = endpoint, infer, api, tracing
        self._refused, self._refusals_told = 0, 0.0

    def way(self, scope: Scope) -> Literal["ray", "short", "refused"]:
        """How an HTTP request is answered: through Ray, past it, or at once, for the queue is full."""
        if scope["method"] != "POST" or (call := RequestContext.of(scope)).route not in QUEUED:
            return "ray"
        scope["ray_app.call"] = call
        if self._endpoint.batcher.full():
            return "refused"
        return "short" if call.route == INFER and self._endpoint.is_here() else "ray"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        call = (
            scope["ray_app.call"] if "ray_app.way" in scope else RequestContext.of(scope)
        )  # Ray names what it handles
        named = bool(call.request_id) and "ray_app.way" not in scope
        call.request_id = call.request_id or f"{random.getrandbits(128):032x}"
        scope["ray_app.call"], scope["ray_app.endpoint"] = call, self._endpoint
        answer = ResponseSender(call, send, ray_names_requests=named)
        self._endpoint.telemetry.in_flight += 1
        try:
            with self._tracing.request(call):
                await self._routed(call, scope, receive, answer)
        except ApiError as problem:
            await answer.problem(problem)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            # else it was the caller who went away, and nobody hears an answer
        except Exception:  # nothing stands outside of this: what is left is a defect of ours, and callers get JSON
            LOG.exception("request %s failed", call.request_id)
            if not answer.code:
                await answer.problem(defect(call))
        finally:
            self._endpoint.telemetry.in_flight -= 1
            self._tell(call, answer.code or 499)

    async def _routed(self, call: RequestContext, scope: Scope, receive: Receive, answer: "ResponseSender") -> None:
        if call.path not in OPEN:
            scope_needed = "admin" if call.path in ADMIN else "infer"
            call.token = self._endpoint.keys.check(call.headers.get(b"authorization"), scope_needed)
        if self._endpoint.keys.path is None and not self._endpoint.cfg.no_auth:
            require_local(call)
        if scope.get("ray_app.way") == "refused":  # its body is gone, though there may be room again
            raise self._endpoint.batcher.queue_full_error()
        receive = in_time(receive, call, self._endpoint.cfg.timeout_s)
        if call.method == "POST" and call.route == INFER:
            headers, parts = await self._infer(self._endpoint, call, receive)
            await answer.whole(200, headers, parts)
        else:
            if call.method == "HEAD":  # as GET; the HTTP server leaves out the body
                scope = {**scope, "method": "GET"}
            await self._api(scope, receive, answer.send)

    def _tell(self, call: RequestContext, code: int) -> None:
        seconds = time.perf_counter() - call.began
        telemetry = self._endpoint.telemetry
        telemetry.request(call.route, call.method, code, call.version, seconds, call.pairs)
        if call.problem:
            telemetry.rejected(call.problem)
        if call.problem == "busy":
            self._refused += 1
            if call.began - self._refusals_told < REFUSALS_S:
                return
        line: dict[str, Any] = {
            "event": "request",
            "request_id": call.request_id,
            "route": call.route,
            "method": call.method,
            "code": code,
            "ms": round(seconds * 1e3, 3),
            "pairs": call.pairs,
            "model_version": call.version,
            "token": call.token,
            "problem": call.problem,
            **self._tracing.ids(call),
        }
        if call.problem == "busy":
            line["refused"], self._refused, self._refusals_told = self._refused, 0, call.began
        LOG.log(logging.WARNING if code >= 500 else logging.INFO, json.dumps(line))


class ResponseSender:
    """The way back: adds what every answer bears, and remembers its code."""

    def __init__(self, call: RequestContext, send: Send, ray_names_requests: bool) -> None:
        self._call, self._send, self._named = call, send, ray_names_requests
        self.code = 0

    async def send(self, message: Message) -> None:
        """An ASGI message of the routes."""
        if message["type"] == "http.response.start":
            self.code = message["status"]
            message = {**message, "headers": [*message["headers"], *self._everywhere()]}
        await self._send(message)

    async def whole(self, code: int, headers: list[tuple[bytes, bytes]], parts: list[bytes]) -> None:
        """An answer in one piece, or a few."""
        length = str(sum(map(len, parts))).encode()
        await self.send(
            {"type": "http.response.start", "status": code, "headers": [*headers, (b"content-length", length)]}
        )
        for part in parts[:-1]:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        await self._send({"type": "http.response.body", "body": parts[-1]})

    async def problem(self, problem: ApiError) -> None:
        """An answer that says what is wrong."""
        if self.code:
            raise problem
        self._call.problem = problem.code
        headers = [(b"content-type", PROBLEM_JSON.encode())]
        headers += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
        await self.whole(problem.status, headers, [problem.body(self._call.request_id)])

    def _everywhere(self) -> list[tuple[bytes, bytes]]:
        call = self._call
        timing = {**call.spans, "total": time.perf_counter() - call.began}
        headers = [
            (b"server-timing", ", ".join(f"{name};dur={s * 1e3:.2f}" for name, s in timing.items()).encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if call.version:
            headers += [(b"x-model-version", call.version.encode()), (b"x-model-digest", call.digest.encode())]
        if not self._named:
            headers.append((b"x-request-id", call.request_id.encode()))
        return headers


def in_time(receive: Receive, call: RequestContext, longest_s: float) -> Receive:
    """The same, but Problem 504 where a body does not arrive in its request's time: who sends a byte now and then
    would hold a place for as long as he likes."""

    async def bounded() -> Message:
        try:
            async with asyncio.timeout(call.timeout_s(longest_s)):
                return await receive()
        except TimeoutError:
            detail = "the body did not arrive in the time of the request; grant more time, or send fewer pairs."
            raise ApiError(504, "deadline", detail) from None

    return bounded


def defect(call: RequestContext) -> ApiError:
    """500: what happened stands in the log, not in the answer."""
    detail = f"a defect of ours; the server's log tells more under request {call.request_id}."
    return ApiError(500, "internal", detail)


def require_local(call: RequestContext) -> None:
    """Problem 403 where a page of another site asks: without tokens, a browser on this machine could be made to."""
    host = call.headers.get(b"host", b"localhost").decode("latin-1").rpartition(":")
    name = host[0] if host[0] and host[2].isdigit() else "".join(host)
    if name.lower() not in LOCAL and not name.startswith("127."):
        raise ApiError(
            403,
            "forbidden",
            "this endpoint asks for no token and answers only as localhost; serve it with --token-file.",
        )
    if call.headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
        raise ApiError(403, "forbidden", "another site's page may not use this endpoint; serve it with --token-file.")


def headers_of(values: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """As ASGI takes them."""
    return [(name.encode(), str(value).encode()) for name, value in values.items()]
