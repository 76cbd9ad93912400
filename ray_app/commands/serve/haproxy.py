"""HAProxy that ends with the Ray process which started it, on a configuration that is closed to other machines.

Ray reads the path of the HAProxy binary from RAY_SERVE_HAPROXY_BINARY_PATH. The program written here completes the
configuration that Ray wrote, asks Linux for SIGTERM at the death of its parent and then becomes HAProxy. Without it
HAProxy outlives a Ray that was killed, keeps the port, and answers for an endpoint that is gone.
"""

import ctypes
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
HEADER_TIMEOUT_S = 10
"""Longest time for the headers of a request: a connection that sends them byte by byte is closed after it."""
UNAVAILABLE = "no replica answers at the moment; ask again."


def write_binary(folder: Path, haproxy: str) -> Path:
    """Write an executable that runs `haproxy` bound to the life of its parent."""
    program = folder / "haproxy"
    command = shlex.join([sys.executable, "-IS", str(Path(__file__).resolve()), haproxy])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    return program


def completed(config: str, error_file: Path) -> str:
    """Return Ray's configuration with what it lacks. ValueError: it is not of the form known here.

    Ray opens HAProxy's metrics and statistics to all interfaces and its control socket to all users, and waits for
    headers as long as for anything. While it knows of no replica it answers 404 in plain text, while none is up 500.
    """
    for pattern, replacement in (  # the frontend's own `bind` is of --host, and stays
        (r"^(frontend prometheus\n *bind ):", r"\g<1>127.0.0.1:"),
        (r"^(listen stats\n *bind )[*]:", r"\g<1>127.0.0.1:"),
        (r"^( *stats socket \S+ mode )666 ", r"\g<1>600 "),
        (r"^( *errorfile 50[234]) .*$", rf"\1 {error_file}"),
        (r"^defaults\n", f"defaults\n    timeout http-request {HEADER_TIMEOUT_S}s\n"),
        (r"^( *)http-request return status 404 .*$", r"\1http-request deny deny_status 503"),
    ):
        config, times = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if not times:
            raise ValueError(f"Ray's configuration of HAProxy has no line like {pattern}")
    return config


def unavailable() -> bytes:
    """Return head and body of the answer while HAProxy has no replica to ask."""
    problem = {"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": UNAVAILABLE}
    body = json.dumps({**problem, "error": UNAVAILABLE, "code": "unavailable", "request_id": ""}).encode()
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if "-f" in sys.argv:
        config = Path(sys.argv[sys.argv.index("-f") + 1])
        error_file = config.with_name("503.http")
        error_file.write_bytes(unavailable())
        config.write_text(completed(config.read_text(encoding="utf-8"), error_file), encoding="utf-8")
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
