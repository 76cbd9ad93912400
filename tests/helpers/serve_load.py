"""Load on `ray-app serve`, and its processes."""

import threading
import time
from collections import Counter
from contextlib import suppress

import psutil
from endpoints import INFER, RayServer, Server


class Load:
    """Clients that ask without a pause, with a new connection for each request."""

    def __init__(self, server: Server, body: bytes, headers: dict[str, str], callers: int = 4) -> None:
        self.codes: Counter[int] = Counter()
        self.failures: list[str] = []
        self.versions: set[str] = set()
        self.slowest_s = 0.0
        self._server, self._body, self._headers, self._stop = server, body, headers, threading.Event()
        self._threads = [threading.Thread(target=self._call, daemon=True) for _ in range(callers)]

    def _call(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                status, headers, _ = self._server.ask("POST", INFER, self._body, self._headers)
                self.codes[status] += 1
                self.versions.add(headers.get("x-model-version", ""))
            except OSError as error:
                self.failures.append(repr(error))
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(400)


def replicas(server: RayServer) -> list[psutil.Process]:
    """Processes of the replicas."""
    return processes(server, "ray::ServeReplica")


def processes(server: RayServer, name: str) -> list[psutil.Process]:
    """Child processes of the server by the beginning of their names."""
    matching = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(name):
                matching.append(process)
    return matching
