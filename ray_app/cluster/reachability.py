"""Whether anything listens at an address: asked before Ray is, which tries for two minutes and ends the process."""

import socket
from typing import Any
from urllib.parse import urlsplit

CONNECT_S = 3.0
"""For a TCP connection."""
ANSWER_S = 2.0
"""For a node to answer."""


def connection_error(address: str, default_port: int = 6379) -> str | None:
    """Why no TCP connection can be made to host:port, or None where it can."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or default_port), timeout=CONNECT_S):
            return None
    except (OSError, ValueError) as error:
        return str(error)


def node_is_alive(node: dict[str, Any]) -> bool:
    """One of `ray.nodes()` still has a raylet that takes connections.

    Ray's head takes one that has gone for alive for some 15 s more.
    """
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True
