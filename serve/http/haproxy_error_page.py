"""HAProxy's own error answer as a problem: Ray writes one in plain text where HAProxy reads it, this goes over it.

HAProxy reads the file whenever a replica comes or goes, so the first replica writes it before it is there itself.
"""

from http import HTTPStatus
from pathlib import Path

from ..protocol.errors import PROBLEM_JSON, ApiError

NAME = "500.http"
"""Beside HAProxy's configuration; Ray lets it stand for 502, 503 and 504."""
MISSING = ApiError(503, "not_ready", "no replica answers at this moment; ask again.", {"retry-after": "1"})


def page() -> bytes:
    """An HTTP answer as it goes over the wire."""
    body = MISSING.body(request_id="")
    headers = {"content-type": PROBLEM_JSON, "content-length": str(len(body)), **MISSING.headers}
    lines = [f"HTTP/1.1 {MISSING.status} {HTTPStatus(MISSING.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def write_page(node_id: str) -> None:
    """Where the HAProxy of this node reads it."""
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY, RAY_SERVE_HAPROXY_CONFIG_FILE_LOC

    path = Path(RAY_SERVE_HAPROXY_CONFIG_FILE_LOC).parent / node_id / NAME
    if RAY_SERVE_ENABLE_HA_PROXY and path.is_file() and path.read_bytes() != page():
        path.write_bytes(page())
