"""Before Ray's own handling of a request: a full queue is told at once, and the body of who is refused is not read.

Ray reads every body into the replica before and while the app runs, in pieces of HAProxy's buffer; in a flood of
requests that takes the time of those that were admitted. What is answered here costs the reading of its head: the
HTTP server drops the rest. Ray puts what `middlewares` returns around each replica's server where
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it; elsewhere the app itself refuses, later and dearer.
"""

from typing import ClassVar

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .edge import Edge


class Gate:
    """Around one replica's HTTP server; around Ray's Python proxy it lets everything through."""

    edge: ClassVar[Edge | None] = None
    """Of this process, from when its replica stands."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        edge = Gate.edge
        if edge is None or scope["type"] != "http" or not edge.refuses(scope):
            await self._app(scope, receive, send)
            return
        scope["ray_app.before_ray"] = True
        await edge(scope, empty, send)


async def empty() -> Message:
    """A body of nothing: what is refused for want of a place is not looked at."""
    return {"type": "http.request", "body": b"", "more_body": False}


def middlewares() -> list[Middleware]:
    """As Ray asks for them."""
    return [Middleware(Gate)]
