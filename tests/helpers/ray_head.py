"""A real Ray head with its dashboard in processes of its own, and a TCP relay in front of it that can be cut."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Head:
    """Where a head answers, and the token that it asks for."""

    dashboard: str
    address: str
    token: str


@contextmanager
def ray_head(folder: Path, num_cpus: int = 2) -> Iterator[Head]:
    """One node with token authentication; ended with all its processes."""
    dashboard, port, token = free_port(), free_port(), secrets.token_hex(32)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    command += [
        f"--temp-dir={folder}/r",
        "--object-store-memory=200000000",
    ]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token)
    try:
        wait_for(head, process, folder / "head.log")
        yield head
    finally:
        mine = [process] if process.poll() is not None else [*psutil.Process(process.pid).children(True), process]
        for one in mine:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def wait_for(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(request, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(log.read_text()[-2000:])


class Relay:
    """Passes TCP connections on to a port; `cut` breaks those that are open, and refuses more until `repair`."""

    def __init__(self, to_port: int) -> None:
        self._to, self._open, self._refuse = to_port, set[socket.socket](), False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refuse:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(65536):
                sink.sendall(piece)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # a close alone sends nothing while the other thread reads
            end.close()
            self._open.discard(end)

    def cut(self) -> None:
        self._refuse = True
        for end in list(self._open):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                end.close()

    def repair(self) -> None:
        self._refuse = False

    def close(self) -> None:
        self._listener.close()
        self.cut()
