"""Before Ray's own handling of a request: binary inferences are answered here, and a full queue is told at once.
Headers that Ray would fail at (it takes their bytes for UTF-8, and answers 500) are made plain.

Ray makes two tasks and a queue for each request and reads every body into the replica before and while the app runs.
An inference needs none of that: limits, time, counts and the caller who goes away are the app's own, and while a
replica ends its HTTP server waits for what is under way. What is refused here costs the reading of its head: the
HTTP server drops the rest. Ray puts what `middlewares` returns around each replica's server where
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it; elsewhere the app itself answers, later and dearer. Ray's Python
proxy imports this too, and needs nothing of the model: no torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.request_context import SAFE
from .accept import accept_often

if TYPE_CHECKING:
    from .asgi import AsgiApp


class BypassMiddleware:
    """Around one replica's HTTP server; around Ray's Python proxy it lets everything through."""

    edge: ClassVar[AsgiApp | None] = None
    """Of this process, from when its replica stands."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = plain(scope)
        edge = BypassMiddleware.edge
        way = edge.way(scope) if edge and scope["type"] == "http" else "ray"
        if edge is None or way == "ray":
            await self._app(scope, receive, send)
            return
        scope["ray_app.way"] = way
        await edge(scope, receive if way == "short" else empty, send)


def plain(scope: Scope) -> Scope:
    """The same with every header value in ASCII."""
    headers = scope.get("headers", [])
    if all(value.isascii() for _, value in headers):
        return scope
    return {**scope, "headers": [(name, ascii_of(value)) for name, value in headers]}


def ascii_of(value: bytes) -> bytes:
    """As it is if it is ASCII; else what is no letter of a name becomes an underscore."""
    return value if value.isascii() else SAFE.sub("_", value.decode("latin-1")).encode()


async def empty() -> Message:
    """A body of nothing: what is refused for want of a place is not looked at."""
    return {"type": "http.request", "body": b"", "more_body": False}


def middlewares() -> list[Middleware]:
    """As Ray asks for them, in a replica before its HTTP server starts."""
    accept_often()
    return [Middleware(BypassMiddleware)]
