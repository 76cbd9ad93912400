"""Memory for bodies: it follows what has arrived, and all requests together have a limit."""

import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from endpoints import INFER, WIDTH, LocalServer, binary_request, local_server, make_checkpoint, wait_for

from ray_app.config.serve import EndpointConfig
from ray_app.errors import ConfigError

MIB = 2**20
GOOD, GOOD_HEADERS = binary_request(np.full((1, WIDTH), 0.5))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("bodies") / "checkpoint")
    limits = {"max_queue": 200, "max_body_mib": 4.0, "max_json_mib": 4.0, "max_bodies_mib": 6.0}
    with local_server(checkpoint, **limits) as it:
        yield it


def announce(server: LocalServer, length: int, sent: bytes) -> socket.socket:
    """A connection that announces a body and sends a part of it."""
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def test_a_body_that_is_announced_takes_what_has_arrived_of_it(server: LocalServer) -> None:
    tracemalloc.start()
    try:
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(announce(server, 4 * MIB, b"x"))
            wait_for(lambda: server.endpoint.bodies.held_bytes == 60)
            held = tracemalloc.get_traced_memory()[0]
            assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 200
    finally:
        tracemalloc.stop()
    assert held < 16 * MIB, "60 bodies of 4 MiB were announced"
    wait_for(lambda: server.endpoint.bodies.held_bytes == 0)


def test_bodies_beyond_the_memory_for_all_are_answered_429_and_others_are_answered(server: LocalServer) -> None:
    part = bytes(2 * MIB)
    with announce(server, 4 * MIB, part), announce(server, 4 * MIB, part):
        wait_for(lambda: server.endpoint.bodies.held_bytes == 4 * MIB)
        with announce(server, 4 * MIB, bytes(3 * MIB)) as late:
            assert late.recv(12) == b"HTTP/1.1 429"
        wait_for(lambda: server.endpoint.bodies.held_bytes == 4 * MIB)
        assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 200
        status, headers, data = server.ask("POST", INFER, bytes(3 * MIB), GOOD_HEADERS)
        assert (status, headers["retry-after"]) == (429, "1")
        assert b"the bodies of requests in progress take" in data
    wait_for(lambda: server.endpoint.bodies.held_bytes == 0)
    assert server.json("GET", "/v1/model")[1]["limits"]["max_bodies_bytes"] == 6 * MIB


@pytest.mark.parametrize(("body", "status"), [(GOOD, 200), (GOOD[:-1], 400), (b"{", 400), (bytes(5 * MIB), 413)])
def test_what_a_body_took_is_given_back_whatever_became_of_it(server: LocalServer, body: bytes, status: int) -> None:
    assert server.ask("POST", INFER, body, GOOD_HEADERS)[0] == status
    wait_for(lambda: server.endpoint.bodies.held_bytes == 0)


def test_one_body_has_room() -> None:
    with pytest.raises(ConfigError, match=r"--max-bodies-mib \(16\) must be at least --max-body-mib \(32\)"):
        EndpointConfig(max_bodies_mib=16)
