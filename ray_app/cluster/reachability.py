"""Check that something listens at an address, before Ray tries for two minutes and ends the process."""

import socket
from typing import Any
from urllib.parse import urlsplit

CONNECT_S = 3.0
"""Limit for a TCP connection, in seconds."""
ANSWER_S = 2.0
"""Limit for a node to answer, in seconds."""


def connection_error(address: str, default_port: int = 6379) -> str | None:
    """Return why no TCP connection can be made to host:port, or None if one can."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or default_port), timeout=CONNECT_S):
            return None
    except (OSError, ValueError) as error:
        return str(error)


def node_is_alive(node: dict[str, Any]) -> bool:
    """Return True if the raylet of one of `ray.nodes()` takes connections.

    Ray's head lists a lost node as alive for about 15 s more.
    """
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True
