"""Whether anything listens at an address: asked before Ray is, which tries for two minutes and ends the process."""

import socket
from urllib.parse import urlsplit

CONNECT_S = 3.0
"""For a TCP connection."""


def no_listener(address: str, default_port: int = 6379) -> str | None:
    """Why no TCP connection can be made to host:port, or None where it can."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or default_port), timeout=CONNECT_S):
            return None
    except (OSError, ValueError) as error:
        return str(error)
