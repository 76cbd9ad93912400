"""`ray-app serve` as it runs: HAProxy, two replicas, tokens, a killed replica, new champions, an orderly end."""

import http.client
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http as triton
from endpoints import INFER, WIDTH, RayServer, binary_request, make_checkpoint
from serve_load import Load, processes, replicas

from ray_app.store.token_file import append_token

EVENT = np.full((2, WIDTH), 0.5, np.float32)
BODY, HEADERS = binary_request(EVENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray-serve")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RayServer]:
    secret = append_token(folder / "tokens", "test", ("infer", "admin"))
    checkpoint = make_checkpoint(folder / "checkpoint")
    flags = ["--token-file", str(folder / "tokens"), "--num-replicas", "2", "--traces", str(folder / "spans.jsonl")]
    made = RayServer(str(checkpoint), *flags, token=secret)
    yield made
    if made.process.poll() is None:
        made.stop()


def test_it_answers_tritonclient_with_a_token_and_no_one_without(server: RayServer) -> None:
    client = triton.InferenceServerClient(server.url)
    assert client.is_server_ready()
    event = triton.InferInput("event", list(EVENT.shape), "FP32")
    event.set_data_from_numpy(EVENT)
    headers = {"Authorization": f"Bearer {server.token}"}
    assert client.infer("alignment-adapter", [event], headers=headers).as_numpy("aligned").shape == EVENT.shape
    with pytest.raises(Exception, match="a valid token is needed"):
        client.infer("alignment-adapter", [event])
    client.close()
    assert "HAProxy" in "".join(server.said)
    assert server.ask("HEAD", "/v2/health/ready")[0] == 200


@pytest.mark.slow
def test_only_this_machine_can_reach_it(server: RayServer) -> None:
    """HAProxy's own mode binds replicas to all interfaces; here they are bound to the host that was asked for."""
    of_proxy: dict[int, str] = {}
    of_replicas: dict[int, str] = {}
    for process in [*replicas(server), *processes(server, "haproxy")]:
        with suppress(psutil.NoSuchProcess):  # HAProxy's process before a reload ends in its own time
            ports = of_proxy if process.name() == "haproxy" else of_replicas
            listening = (each for each in process.net_connections("tcp4") if each.status == psutil.CONN_LISTEN)
            ports |= {each.laddr.port: each.laddr.ip for each in listening}
    assert of_proxy[server.port] == "127.0.0.1"
    inner = {port: ip for port, ip in of_replicas.items() if 20_000 <= port < 32_000}
    assert len(inner) == 2
    assert set(inner.values()) == {"127.0.0.1"}


@pytest.mark.slow
def test_metrics_are_of_every_replica(server: RayServer) -> None:
    with Load(server, BODY, HEADERS) as load:
        time.sleep(1.0)
    assert not load.failures
    assert server.metric("align_requests_total", route="/v2/models/{model}/infer", code="200") >= load.codes[200]
    stats = server.json("GET", "/v1/stats")[1]
    assert stats["replicas"] == 2
    assert stats["requests"]["by_code"]["200"] >= load.codes[200], "no replica alone has answered so many"
    assert stats["pairs"] >= 2 * load.codes[200]
    text = server.ask("GET", "/metrics")[2].decode()
    names = {line.split('replica="')[1].split('"')[0] for line in text.splitlines() if "align_model_info{" in line}
    assert len(names) == 2
    assert text.count("# TYPE align_requests_total counter") == 1


@pytest.mark.slow
def test_in_a_flood_a_full_queue_refuses_before_the_body_is_sent(server: RayServer) -> None:
    head = [f"POST {INFER} HTTP/1.1", f"Host: {server.url}", f"Authorization: Bearer {server.token}"]
    head += [f"{name}: {value}" for name, value in {**HEADERS, "Content-Length": str(len(BODY))}.items()]
    callers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(600)]
    for caller in callers:
        caller.sendall("\r\n".join([*head, "", ""]).encode())
    refused, _, _ = select.select(callers, [], [], 5.0)
    assert refused, "the queues of two replicas have 32 slots"
    for caller in refused:
        assert caller.recv(12) == b"HTTP/1.1 429"
    for caller in callers:
        caller.close()
    assert server.ask("POST", INFER, BODY, HEADERS)[0] in (200, 429)


@pytest.mark.slow
def test_a_new_model_takes_over_on_every_replica_and_no_caller_sees_it(server: RayServer, folder: Path) -> None:
    first = server.json("GET", "/v1/model")[1]["version"]
    with Load(server, BODY, HEADERS) as load:
        time.sleep(0.5)
        make_checkpoint(folder / "next", seed=1)
        (folder / "checkpoint").rename(folder / "old")
        (folder / "next").rename(folder / "checkpoint")
        status, answer = server.json("POST", "/v1/reload")
        time.sleep(0.5)
        load.versions.clear()
        time.sleep(0.5)
    assert status == 200
    assert sorted(answer["replicas"]) == ["swapped", "swapped"]
    assert set(load.codes) == {200}
    assert not load.failures
    assert load.versions == {answer["version"]} != {first}


@pytest.mark.slow
def test_a_bad_model_is_refused_by_every_replica_and_no_caller_sees_it(server: RayServer, folder: Path) -> None:
    served = server.json("GET", "/v1/model")[1]["version"]
    with Load(server, BODY, HEADERS) as load:
        make_checkpoint(folder / "bad", seed=2)
        weights = folder / "bad" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        (folder / "checkpoint").rename(folder / "good")
        (folder / "bad").rename(folder / "checkpoint")
        status, problem = server.json("POST", "/v1/reload")
    assert (status, problem["code"]) == (409, "refused")
    assert "model.safetensors is damaged" in problem["detail"]
    assert set(load.codes) == {200}
    assert not load.failures
    assert load.versions == {served}
    (folder / "checkpoint").rename(folder / "refused")
    (folder / "good").rename(folder / "checkpoint")


@pytest.mark.slow
def test_a_killed_replica_costs_at_most_what_it_was_answering(server: RayServer) -> None:
    before = {process.pid for process in replicas(server)}
    with Load(server, BODY, HEADERS) as load:
        time.sleep(0.5)
        os.kill(min(before), signal.SIGKILL)
        time.sleep(3.0)
    lost = len(load.failures) + sum(n for code, n in load.codes.items() if code != 200)
    assert lost <= 4, f"{load.codes}, {load.failures}: 4 callers had one request each on its way"
    assert load.codes[200] > 20
    deadline = time.monotonic() + 400
    while len(replicas(server)) < 2:
        assert time.monotonic() < deadline, "Ray Serve did not replace it"
        time.sleep(0.2)


@pytest.mark.slow
def test_it_ends_at_sigterm_without_losing_a_request(server: RayServer, folder: Path) -> None:
    """A request that is half sent when the signal comes is answered."""
    connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(4)]
    half = len(BODY) // 2
    for connection in connections:
        connection.putrequest("POST", INFER)
        length = {"content-length": str(len(BODY)), "authorization": f"Bearer {server.token}"}
        for name, value in {**HEADERS, **length}.items():
            connection.putheader(name, value)
        connection.endheaders(BODY[:half])
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    for connection in connections:
        connection.send(BODY[half:])
    assert [connection.getresponse().status for connection in connections] == [200] * 4
    assert server.process.wait(400) == 0
    spans = [json.loads(line) for line in (folder / "spans.jsonl").read_text().splitlines()]
    assert any(span["name"] == "POST /v2/models/{model}/infer" for span in spans)
