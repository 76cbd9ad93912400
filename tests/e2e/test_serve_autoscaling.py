"""Ray Serve sees every inference: it adds a replica in a flood, and cancels the request of a client that left."""

import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from endpoints import INFER, WIDTH, RayServer, binary_request, make_checkpoint, wait_for
from serve_load import Load, replicas

BODY, HEADERS = binary_request(np.full((1, WIDTH), 0.5))
LIMIT_S = 180.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("autoscaling") / "checkpoint")
    flags = ["--max-replicas", "2", "--cpus-per-replica", "0.5", "--batch-wait-timeout-ms", "1000"]
    server = RayServer(str(checkpoint), *flags)
    yield server
    server.stop()


def test_a_client_that_leaves_costs_no_forward_pass(server: RayServer) -> None:
    head = "".join(f"{name}: {value}\r\n" for name, value in {**HEADERS, "content-length": len(BODY)}.items())
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode() + BODY)
    wait_for(lambda: server.metric("align_queue_rows") == 1)
    client.close()
    wait_for(lambda: server.metric("align_requests_total", code="499") == 1)
    wait_for(lambda: server.metric("align_queue_rows") == 0)
    assert server.metric("align_pairs_total") == 0
    assert server.metric("align_batch_rows_count") == 0


def test_a_flood_of_binary_requests_brings_a_second_replica(server: RayServer) -> None:
    assert len(replicas(server)) == 1
    until = time.monotonic() + LIMIT_S
    with Load(server, BODY, HEADERS, callers=24) as load:
        while server.json("GET", "/v1/stats")[1]["replicas"] < 2:
            assert time.monotonic() < until, "Ray added no replica"
            time.sleep(0.5)
    assert not load.failures
    assert set(load.codes) <= {200, 429}
    assert load.codes[200] > 24
