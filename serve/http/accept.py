"""More than one new connection in a turn of the event loop.

libuv, below uvloop, takes one connection from a listening socket in each turn. In a flood a turn takes
milliseconds, connections come faster than turns, and requests on those that wait are not read for seconds: at four
times the capacity of two cores an accepted request took up to 8 s, with this 0.6 s. There is no setting for it; a
socket that is listened on several times over is asked so often.
"""

from socket import socket

import uvicorn

TIMES = 16
"""Connections taken in a turn."""


class Server(uvicorn.Server):
    """Listens on each socket `TIMES` times."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """As uvicorn's; the sockets that are added are closed with its servers."""
        if sockets is not None:
            sockets = [again for one in sockets for again in (one, *(one.dup() for _ in range(TIMES - 1)))]
        await super().startup(sockets)


def accept_often() -> None:
    """In this process: Ray makes its servers of `uvicorn.Server`, and asks nobody of which class."""
    uvicorn.Server = Server  # type: ignore[misc]
