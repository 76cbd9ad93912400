"""The client against a real endpoint, and across a network that loses things."""

import base64
import contextlib
import hashlib
import io
import pickle
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoints import WIDTH, LocalServer, local_server, make_checkpoint
from mlflow_process import free_port
from PIL import Image
from weak_network import Fate, certificate, weak_network

from ray_app.client import AlignmentClient
from ray_app.client_wire import Wire, check_arrays, octets
from ray_app.errors import ConfigError, EndpointBusy, EndpointError, EndpointUnreachable, InputError
from ray_app.store.checkpoint import load_checkpoint

RNG = np.random.default_rng(0)
EVENT = RNG.integers(1, 256, (3, WIDTH), dtype=np.uint8)
TARGET = RNG.integers(1, 256, (3, WIDTH), dtype=np.uint8)
WIRES: tuple[Wire, ...] = ("binary", "json")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(make_checkpoint(tmp_path_factory.mktemp("client") / "checkpoint"), max_batch=8) as it:
        yield it


@pytest.fixture
def client(server: LocalServer) -> Iterator[AlignmentClient]:
    with AlignmentClient(f"http://{server.url}") as it:
        yield it


def expected(server: LocalServer, event: Any) -> Any:
    adapter = load_checkpoint(Path(server.endpoint.cfg.checkpoint)).adapter
    with torch.no_grad():
        return adapter(torch.from_numpy(event.astype(np.float32))).numpy()


@pytest.mark.parametrize("wire", WIRES)
def test_aligned_features_and_verdicts_are_the_adapters(
    server: LocalServer, client: AlignmentClient, wire: Wire
) -> None:
    aligned = expected(server, EVENT / np.float32(255))
    np.testing.assert_allclose(client.align(EVENT, wire=wire).aligned_BD, aligned, rtol=1e-5, atol=1e-5)
    a, b = aligned.astype(np.float64), TARGET.astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    theta = float(np.median(cosines)) + 1e-5
    answer = client.verify(EVENT, TARGET, theta=theta, wire=wire)
    np.testing.assert_allclose(answer.cos_sim_B, cosines, atol=1e-6)
    assert answer.accepted_B is not None
    assert answer.accepted_B.tolist() == (cosines > theta).tolist()
    assert answer.aligned_BD is None
    assert answer.version == server.endpoint.model.version
    assert re.fullmatch("[0-9a-f]{32}", answer.request_id)
    both = client.verify(EVENT, TARGET, aligned=True, wire=wire)
    np.testing.assert_allclose(both.aligned_BD, aligned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", ">f4"])
def test_every_type_arrives_as_what_it_is(server: LocalServer, client: AlignmentClient, dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = (EVENT / np.float32(255)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    seen = expected(server, values)
    for wire in WIRES:
        np.testing.assert_allclose(client.align(values, wire=wire).aligned_BD, seen, rtol=1e-5, atol=1e-5)


def test_arrays_are_sent_from_where_they_lie_and_read_where_they_stay(client: AlignmentClient) -> None:
    assert np.shares_memory(octets(check_arrays("event", EVENT)), EVENT)
    aligned = client.verify(EVENT, TARGET, aligned=True)
    assert aligned.aligned_BD is not None
    assert aligned.cos_sim_B is not None
    whole = memoryview(aligned.aligned_BD.base)  # type: ignore[arg-type]
    assert np.shares_memory(whole, aligned.aligned_BD)
    strided = np.concatenate([EVENT, EVENT], axis=1)[:, ::2]
    assert octets(check_arrays("event", strided)).nbytes == EVENT.nbytes


def test_the_other_forms_of_v1(client: AlignmentClient) -> None:
    stream = io.BytesIO()
    Image.fromarray(EVENT[0].reshape(16, 16, 3)).save(stream, "PNG")
    picture = {"png": base64.b64encode(stream.getvalue()).decode()}
    answer = client.v1("align", {"event": picture, "return": ["aligned_image"]})
    drawn = Image.open(io.BytesIO(base64.b64decode(answer["pairs"][0]["aligned_image"])))
    assert drawn.size == (16, 16)
    assert client.model()["adapter"]["event_dim"] == WIDTH
    assert client.ready()


@pytest.mark.parametrize("wire", WIRES)
def test_a_refusal_is_given_in_the_endpoints_words(client: AlignmentClient, wire: Wire) -> None:
    with pytest.raises(
        EndpointError, match=r"'event' is 5 wide, the model takes 768\. \(HTTP 422, request \w+\)"
    ) as caught:
        client.align(EVENT[:, :5], wire=wire)
    assert (caught.value.status, caught.value.code) == (422, "width")
    assert client.retries == 0
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status, again.code) == (str(caught.value), 422, "width")
    with pytest.raises(EndpointError, match="NaN"):
        client.align(np.full((1, WIDTH), np.nan, np.float32), wire=wire)
    with pytest.raises(EndpointError, match="theta"):
        client.verify(EVENT, TARGET, theta=3.0, wire=wire)


def test_what_cannot_be_sent_is_said_before(client: AlignmentClient) -> None:
    with pytest.raises(InputError, match="float64; the endpoint takes uint8"):
        client.align(EVENT.astype(np.float64))
    with pytest.raises(InputError, match=r"shape \(768,\)"):
        client.align(EVENT[0])
    with pytest.raises(ConfigError, match=r"is not an endpoint.s address"):
        AlignmentClient("127.0.0.1:8000")
    with pytest.raises(ConfigError, match="positive"):
        AlignmentClient("http://127.0.0.1:8000", timeout_s=0)


def test_a_token_is_sent_and_never_shown(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"loop:infer:{hashlib.sha256(b'secret').hexdigest()}\n")
    tokens.chmod(0o600)
    with local_server(make_checkpoint(tmp_path / "checkpoint"), token_file=tokens) as server:
        with AlignmentClient(f"http://{server.url}", token="secret") as client:
            assert client.align(EVENT).aligned_BD is not None
            assert "secret" not in repr(client)
        with AlignmentClient(f"http://{server.url}", token="wrong") as client:
            with pytest.raises(EndpointError) as caught:
                client.align(EVENT)
            assert caught.value.status == 401
            assert client.ready()


@pytest.mark.parametrize("fates", [("drop",), ("half",), ("502",), ("404",), ("drop", "half", "502", "404")])
def test_a_lost_request_is_sent_again(server: LocalServer, fates: tuple[Fate, ...]) -> None:
    with weak_network(server.port, *fates) as network, AlignmentClient(f"http://127.0.0.1:{network.port}") as client:
        answer = client.align(EVENT)
        assert answer.aligned_BD is not None
        assert answer.aligned_BD.shape == (3, WIDTH)
        assert client.retries == len(fates)
        client.align(EVENT)
        assert network.connections == len(fates) + 1  # the last one stays open


def test_the_endpoints_own_404_is_final(server: LocalServer) -> None:
    with AlignmentClient(f"http://{server.url}", model_name="another") as client:
        with pytest.raises(EndpointError, match="there is no model of this name") as caught:
            client.align(EVENT)
        assert (caught.value.status, client.retries) == (404, 0)


def test_pixels_of_another_range_are_refused_in_the_endpoints_words(client: AlignmentClient) -> None:
    for wire in WIRES:
        with pytest.raises(EndpointError, match=r"pixels of this model are values from 0 to 1: divide by 255"):
            client.verify(EVENT.astype(np.float32), TARGET, wire=wire)


def test_the_time_limit_spans_all_attempts(server: LocalServer) -> None:
    with AlignmentClient(f"http://127.0.0.1:{free_port()}", timeout_s=0.6) as client:
        with pytest.raises(EndpointUnreachable, match=r"within 0\.6 s; the last attempt: .*Connection refused"):
            client.align(EVENT)
        assert not client.ready()
    with (
        weak_network(server.port, *["silence"] * 9) as network,
        AlignmentClient(f"http://127.0.0.1:{network.port}", timeout_s=0.6) as client,
        pytest.raises(EndpointUnreachable, match="timed out"),
    ):
        client.align(EVENT)
    assert network.connections == 1, "the first attempt used up the time"


@pytest.mark.parametrize("framing", [b"Content-Length: 100000", b"Transfer-Encoding: chunked"])
def test_an_answer_that_drips_in_ends_at_the_time_limit(framing: bytes) -> None:
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
            while not over.wait(0.02):
                connection.sendall(b"1\r\n.\r\n" if b"chunked" in framing else b".")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with AlignmentClient(url, timeout_s=0.5) as client, pytest.raises(EndpointUnreachable, match="timed out"):
                client.align(EVENT)
        finally:
            over.set()
            thread.join()


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    with local_server(checkpoint, max_batch=3, max_queue=3, batch_wait_timeout_ms=100) as server:
        clients = [AlignmentClient(f"http://{server.url}", timeout_s=20) for _ in range(6)]
        threads = [threading.Thread(target=client.align, args=(EVENT[:2],)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(400)
        refused = server.metric("align_rejected_total", reason="busy")
        assert refused == sum(client.retries for client in clients) > 0
        assert server.metric("align_requests_total", code="200", route="/v2/models/{model}/infer") == 6


def test_a_queue_that_stays_full_is_reported_when_the_time_is_over(tmp_path: Path) -> None:
    with local_server(make_checkpoint(tmp_path / "checkpoint"), max_batch=3, max_queue=2) as server:
        url, batcher = f"http://{server.url}", server.endpoint.batcher
        predict, started, release = batcher._predict, threading.Event(), threading.Event()

        def held_back(works: Any) -> Any:
            started.set()
            assert release.wait(60)
            return predict(works)

        batcher._predict = held_back  # type: ignore[method-assign]
        threads = [threading.Thread(target=AlignmentClient(url, timeout_s=60).align, args=(EVENT[:2],)) for _ in "12"]
        threads[0].start()
        assert started.wait(60)
        threads[1].start()
        while batcher.queued_rows < 2:
            assert threads[1].is_alive()
        with (
            AlignmentClient(url, timeout_s=0.9) as hasty,  # a second is what Retry-After says
            pytest.raises(
                EndpointBusy, match=r"2 pairs wait and 0 requests arrive, the limit is 2; .* \(HTTP 429, request"
            ),
        ):
            hasty.align(EVENT[:2])
        release.set()
        for thread in threads:
            thread.join(400)


def test_tls_is_spoken_and_verified(server: LocalServer, tmp_path: Path) -> None:
    context, cert = certificate(tmp_path)
    with weak_network(server.port, tls=context) as network:
        url = f"https://127.0.0.1:{network.port}"
        with AlignmentClient(url, ca_file=str(cert)) as client:
            assert client.align(EVENT).aligned_BD is not None
        with AlignmentClient(url) as client, pytest.raises(EndpointUnreachable, match="ca_file"):
            client.align(EVENT)


def test_threads_share_a_client(server: LocalServer, client: AlignmentClient) -> None:
    aligned = expected(server, EVENT / np.float32(255))
    wrong: list[int] = []

    def ask(row: int) -> None:
        for _ in range(10):
            found = client.align(EVENT[row : row + 1]).aligned_BD
            if found is None or not np.allclose(found, aligned[row : row + 1], atol=1e-5):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(row % 3,)) for row in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    assert not wrong
