"""Before Ray's own handling of a request: a full queue is told at once, and the body of who is refused is not read.
Headers that Ray would fail at (it takes their bytes for UTF-8, and answers 500) are made plain.

Ray reads every body into the replica before and while the app runs, in pieces of HAProxy's buffer; in a flood of
requests that takes the time of those that were admitted. What is answered here costs the reading of its head: the
HTTP server drops the rest. Ray puts what `middlewares` returns around each replica's server where
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it; elsewhere the app itself refuses, later and dearer. Ray's Python
proxy imports this too, and needs nothing of the model: no torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .call import SAFE

if TYPE_CHECKING:
    from .edge import Edge


class Gate:
    """Around one replica's HTTP server; around Ray's Python proxy it lets everything through."""

    edge: ClassVar[Edge | None] = None
    """Of this process, from when its replica stands."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = plain(scope)
        edge = Gate.edge
        if edge is None or scope["type"] != "http" or not edge.refuses(scope):
            await self._app(scope, receive, send)
            return
        scope["ray_app.before_ray"] = True
        await edge(scope, empty, send)


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
    """As Ray asks for them."""
    return [Middleware(Gate)]
