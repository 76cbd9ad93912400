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
from http import HTTPStatus
from pathlib import Path

PR_SET_PDEATHSIG = 1
HEADER_TIMEOUT_S = 10
"""Longest time for the headers of a request: a connection that sends them byte by byte is closed after it."""
ANSWERS = {
    400: ("bad_request", "this is no request of HTTP/1.1; use an HTTP client."),
    408: ("deadline", f"the headers did not end within {HEADER_TIMEOUT_S} s; send them in one piece."),
    503: ("unavailable", "no replica answers at the moment; ask again."),
}
"""Code and sentence of what HAProxy answers itself, by status."""


def write_binary(folder: Path, haproxy: str) -> Path:
    """Write an executable that runs `haproxy` bound to the life of its parent."""
    program = folder / "haproxy"
    command = shlex.join([sys.executable, "-IS", str(Path(__file__).resolve()), haproxy])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    return program


def completed(config: str, folder: Path) -> str:
    """Return Ray's configuration with what it lacks. ValueError: it is not of the form known here.

    Ray opens HAProxy's metrics and statistics to all interfaces and its control socket to all users, and waits for
    headers as long as for anything. While it knows of no replica it answers 404 in plain text, while none is up 500.
    `folder`: that of the answers.
    """
    own = "".join(f"    errorfile {status} {answer_file(folder, status)}\n" for status in (400, 408))
    for pattern, replacement in (  # the frontend's own `bind` is of --host, and stays
        (r"^(frontend prometheus\n *bind ):", r"\g<1>127.0.0.1:"),
        (r"^(listen stats\n *bind )[*]:", r"\g<1>127.0.0.1:"),
        (r"^( *stats socket \S+ mode )666 ", r"\g<1>600 "),
        (r"^( *errorfile 50[234]) .*$", rf"\1 {answer_file(folder, 503)}"),
        (r"^defaults\n", f"defaults\n    timeout http-request {HEADER_TIMEOUT_S}s\n{own}"),
        (r"^( *)http-request return status 404 .*$", r"\1http-request deny deny_status 503"),
    ):
        config, times = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if not times:
            raise ValueError(f"Ray's configuration of HAProxy has no line like {pattern}")
    return config


def answer_file(folder: Path, status: int) -> Path:
    """Return the file of one of `ANSWERS`."""
    return folder / f"{status}.http"


def answer(status: int) -> bytes:
    """Return head and body of one of `ANSWERS`: the endpoint's own form of errors."""
    code, detail = ANSWERS[status]
    title = HTTPStatus(status).phrase
    problem = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    body = json.dumps({**problem, "error": detail, "code": code, "request_id": ""}).encode()
    next_step = "Retry-After: 1" if status == 503 else "Connection: close"
    head = f"HTTP/1.1 {status} {title}\r\nContent-Type: application/problem+json\r\n{next_step}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if "-f" in sys.argv:
        config = Path(sys.argv[sys.argv.index("-f") + 1])
        for status in ANSWERS:
            answer_file(config.parent, status).write_bytes(answer(status))
        config.write_text(completed(config.read_text(encoding="utf-8"), config.parent), encoding="utf-8")
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
