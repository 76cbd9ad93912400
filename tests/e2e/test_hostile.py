"""Strangers attack `ray-app serve` as it runs: no replica is lost, and good requests are answered meanwhile."""

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from endpoints import WIDTH, RayServer, make_checkpoint, wait_for
from hostile_requests import ATTACKS, MIB, head, held, pipelined
from serve_load import processes, replicas

from ray_app.client import AlignmentClient
from ray_app.cluster.private_folder import private_folder

EVENT = np.full((1, WIDTH), 0.5, np.float32)
TIMES = 2.0
NOISE_S = 0.1
"""Times below this say nothing: the attacker runs on the same cores."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint")
    made = RayServer(str(checkpoint), "--num-replicas", "2", "--timeout-s", "5")
    yield made
    assert made.stop() == 0


class Good:
    """One caller who means well, from one end of the block to the other."""

    def __init__(self, server: RayServer) -> None:
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._url, self._stop = f"http://{server.url}", threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)

    def _call(self) -> None:
        with AlignmentClient(self._url, timeout_s=300) as client:
            while not self._stop.wait(0.02):
                started = time.monotonic()
                try:
                    client.align(EVENT)
                except Exception as error:
                    self.failures.append(repr(error))
                self.seconds.append(time.monotonic() - started)

    def __enter__(self) -> "Good":
        self._thread.start()
        wait_for(lambda: self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        seen = len(self.seconds)
        wait_for(lambda: len(self.seconds) > seen)  # one that began during the attack has ended
        self._stop.set()
        self._thread.join(400)

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))


@pytest.fixture
def unharmed(server: RayServer) -> Iterator[None]:
    """Before and after: the same replicas, and a caller who was answered throughout within twice the time."""
    before = {process.pid for process in replicas(server)}
    assert len(before) == 2
    with Good(server) as quiet:
        time.sleep(1.0)
    with Good(server) as good:
        yield
    assert good.failures == []
    assert good.median_s <= TIMES * max(quiet.median_s, NOISE_S), f"{good.median_s} s, before {quiet.median_s} s"
    assert {process.pid for process in replicas(server)} == before
    assert server.ask("GET", "/v2/health/ready")[0] == 200


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_answered_by_errors(server: RayServer, name: str) -> None:
    codes = ATTACKS[name](server)
    assert codes
    assert all(code < 500 or code == 504 for code in codes), codes
    assert name == "headers" or all(code >= 400 for code in codes), codes  # a query that means nothing is left unread


@pytest.mark.usefixtures("unharmed")
def test_requests_in_one_go_are_answered_each(server: RayServer) -> None:
    assert pipelined(server) == [200] * 50


@pytest.mark.usefixtures("unharmed")
def test_bodies_that_are_announced_and_do_not_come_hold_next_to_nothing(server: RayServer) -> None:
    def memory() -> int:
        """Of replicas and HAProxy, in bytes."""
        total = 0
        for process in [*replicas(server), *processes(server, "haproxy")]:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().uss
        return total

    before = memory()
    with held(server, 110, head(f"Content-Length: {32 * MIB}") + b"x"):
        time.sleep(1.0)
        assert memory() - before < 100 * MIB, "3.5 GB were announced"


@pytest.mark.usefixtures("unharmed")
def test_heads_that_do_not_end_are_closed(server: RayServer) -> None:
    with held(server, 300, head()[:-2]) as connections:
        for connection in connections:
            connection.settimeout(60)
            answer = connection.recv(65536)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_nothing_listens_beyond_loopback_and_its_folders_are_closed(server: RayServer) -> None:
    listening: dict[str, str] = {}
    main = psutil.Process(server.process.pid)
    for process in [main, *main.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    listening[f"{process.name()} {each.laddr.port}"] = each.laddr.ip
    assert len(listening) > 5, "GCS, raylet, workers, HAProxy, replicas"
    assert {name: ip for name, ip in listening.items() if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == {}
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    opened = {Path(file.path) for file in main.open_files()}
    for process in main.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            opened |= {Path(file.path) for file in process.open_files()}
    logs = {path for path in opened if path.suffix in (".log", ".out", ".err")}
    assert logs
    assert all(path.is_relative_to(folder) for path in logs)


def test_haproxy_that_is_killed_is_back_and_callers_wait_for_it(server: RayServer) -> None:
    before = {process.pid for process in processes(server, "haproxy")}
    alive = {process.pid for process in replicas(server)}
    with Good(server) as good:
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        with AlignmentClient(f"http://{server.url}", timeout_s=300) as client:
            assert client.align(EVENT).aligned_BD is not None
        assert {process.pid for process in processes(server, "haproxy")} - before
        print(f"{time.monotonic() - killed:.1f} s without a proxy")
    assert good.failures == []
    assert server.ask("GET", "/v2/health/ready")[0] == 200
    assert {process.pid for process in replicas(server)} == alive
