"""A real S3 server (moto's) as processes of their own: the server, and a front before it that can fail.

Clients speak to the front. Killing it is what an outage looks like from outside: connections break off, the port is
closed, and what was stored is still there afterwards. While the file `broken` is in its folder it answers 500 and
makes the file `refused`; while `read_only` is there it serves readers only.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PATIENCE_S = 400.0
LENGTHS = ("content-length", "transfer-encoding", "connection", "expect")
"""Headers of one connection, which the other has of its own."""
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class S3:
    """Server and front on free ports of this machine. `folder` is for logs and signal files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken, self.refused, self.read_only = (folder / name for name in ("broken", "refused", "read_only"))
        self.port, self._server_port = free_port(), free_port()
        server = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._server_port)]
        self._server = self._start(server, self._server_port)
        self.front: subprocess.Popen[bytes] | None = None
        self.start()

    def uri(self, path: str) -> str:
        """A URI that pyarrow takes, by way of the front."""
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.port), str(self._server_port), str(self.folder)]
        self.front = self._start(command, self.port)

    def kill(self) -> None:
        """The front dies at once, in the middle of whatever it does."""
        assert self.front is not None
        self.front.send_signal(signal.SIGKILL)
        self.front.wait()

    def make_bucket(self, name: str) -> None:
        self.ask("PUT", f"/{name}")

    def keys(self, bucket: str) -> list[str]:
        """Names of all objects, asked of the server itself."""
        text = self.ask("GET", f"/{bucket}?list-type=2&max-keys=1000").decode()
        return [part.partition("</Key>")[0] for part in text.split("<Key>")[1:]]

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        where = f"http://127.0.0.1:{self._server_port}{path}"
        request = urllib.request.Request(where, data, {"Content-Type": "text/plain"}, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def close(self) -> None:
        for process in (self.front, self._server):
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, command: list[str], port: int) -> "subprocess.Popen[bytes]":
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert process.poll() is None, (self.folder / "log.txt").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return process
            time.sleep(0.05)
        raise AssertionError(f"nothing listens on port {port} after {PATIENCE_S} s")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Front(BaseHTTPRequestHandler):
    """Hands every request on, and every answer back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of an answer go out at once
    server_port: int
    broken: Path
    refused: Path
    read_only: Path

    def hand_on(self) -> None:
        body = self._body()
        if self.broken.exists():
            self.refused.touch()
            self._reply(500, {}, b"")
            return
        if self.read_only.exists() and self.command not in ("GET", "HEAD"):
            self._reply(403, {"Content-Type": "application/xml"}, DENIED)
            return
        server = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in LENGTHS}
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        self._reply(answer.status, dict(answer.getheaders()), answer.read())
        server.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = hand_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in LENGTHS:
                self.send_header(name, value)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    os.setpgrp()
    port, Front.server_port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    Front.broken, Front.refused, Front.read_only = (folder / name for name in ("broken", "refused", "read_only"))
    ThreadingHTTPServer(("127.0.0.1", port), Front).serve_forever()
