"""Decoders are processes: what is too slow ends with its process, others are answered, health sees a stuck one."""

import asyncio
import io
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import LocalServer, local_server, make_checkpoint
from PIL import Image

from ray_app.errors import InputError
from serve.decoding import pool
from serve.decoding.decoder import MAX_PIXELS, answer, decode
from serve.decoding.job import DecodeJob, read_message, write_message
from serve.decoding.pool import DecodePool, Decoder, environment
from serve.protocol.errors import ApiError

PICTURE = DecodeJob("image", 8, 8)
SHORT_S = 0.5


def png(width: int = 16, height: int = 16) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(out, "PNG")
    return out.getvalue()


def with_pool(use: Callable[[DecodePool], Awaitable[Any]], workers: int = 1, limit_s: float = 60.0) -> Any:
    """What a coroutine returns that uses a pool."""

    async def run() -> Any:
        it = DecodePool(workers, limit_s)
        try:
            return await use(it)
        finally:
            it.close()

    return asyncio.run(run())


def pids(it: DecodePool) -> list[int]:
    return [decoder._process.pid for decoder in it._decoders]


def refusal(error: BaseException) -> tuple[int, str]:
    assert isinstance(error, ApiError), repr(error)
    return error.status, error.code


def test_a_picture_comes_back_from_another_process() -> None:
    async def use(it: DecodePool) -> tuple[Any, list[int]]:
        return await it.decode(PICTURE, memoryview(png()), 60.0), pids(it)

    image, found = with_pool(use)
    assert image.shape == (3, 8, 8)
    np.testing.assert_array_equal(image[:, 0, 0], (1, 2, 3))
    assert found != [os.getpid()]
    assert len(found) == 1
    with pytest.raises(ProcessLookupError):  # the pool is closed
        os.kill(found[0], 0)


def test_a_decode_that_takes_too_long_ends_with_its_process() -> None:
    async def use(it: DecodePool) -> None:
        await it.decode(PICTURE, png(), 60.0)
        (stopped,) = pids(it)
        os.kill(stopped, signal.SIGSTOP)  # it cannot even be asked to end
        it._limit_s = SHORT_S
        with pytest.raises(ApiError) as refused:
            await it.decode(PICTURE, png(), 60.0)
        assert refusal(refused.value) == (422, "image")
        assert "takes longer than 0.5 s" in str(refused.value)
        it._limit_s = 60.0
        assert (await it.decode(PICTURE, png(), 60.0)).shape == (3, 8, 8)
        assert it.healthy()
        assert pids(it) != [stopped]

    with_pool(use)


def test_a_decoder_that_dies_is_replaced_and_its_request_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(it: DecodePool) -> None:
        await it.decode(PICTURE, png(), 60.0)
        ask = Decoder.ask

        def die(self: Decoder, job: DecodeJob, data: bytes) -> Any:
            self.kill()
            return ask(self, job, data)

        monkeypatch.setattr(Decoder, "ask", die)
        with pytest.raises(ApiError, match="the decoder died of it"):
            await it.decode(PICTURE, png(), 60.0)
        monkeypatch.setattr(Decoder, "ask", ask)
        await it.decode(PICTURE, png(), 60.0)
        for decoder in it._decoders:  # killed by somebody while it has nothing to do
            decoder.kill()
            decoder._process.wait()
        assert (await it.decode(PICTURE, png(), 60.0)).shape == (3, 8, 8)

    with_pool(use)


def test_a_caller_with_little_time_gets_504_and_costs_no_process() -> None:
    async def use(it: DecodePool) -> None:
        await it.decode(PICTURE, png(), 60.0)
        before = pids(it)
        os.kill(before[0], signal.SIGSTOP)
        for _ in range(2):  # the first has the process, the second waits for it
            with pytest.raises(ApiError) as late:
                await it.decode(PICTURE, png(), 0.05)
            assert refusal(late.value) == (504, "deadline")
        os.kill(before[0], signal.SIGCONT)
        assert (await it.decode(PICTURE, png(), 60.0)).shape == (3, 8, 8)
        assert pids(it) == before

    with_pool(use)


def test_more_than_may_wait_are_answered_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_WAITING", 2)

    async def use(it: DecodePool) -> list[Any]:
        return await asyncio.gather(*(it.decode(PICTURE, png(), 60.0) for _ in range(6)), return_exceptions=True)

    found = with_pool(use)
    answered = [one for one in found if not isinstance(one, BaseException)]
    assert len(answered) == 3
    assert {refusal(one) for one in found if isinstance(one, BaseException)} == {(429, "busy")}


def test_health_sees_a_process_that_does_not_end_and_one_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "KILL_S", 0.1)

    async def stuck(it: DecodePool) -> None:
        await it.decode(PICTURE, png(), 60.0)
        (decoder,) = it._decoders
        os.kill(decoder._process.pid, signal.SIGSTOP)
        it._limit_s = 0.1
        monkeypatch.setattr(Decoder, "kill", lambda _: None)
        with pytest.raises(ApiError):
            await it.decode(PICTURE, png(), 60.0)
        assert not it.healthy()
        decoder._process.kill()

    with_pool(stuck)
    monkeypatch.undo()
    monkeypatch.setattr(pool, "COMMAND", ("/bin/false",))

    async def no_start(it: DecodePool) -> None:
        for healthy in (True, True, False):
            with pytest.raises(ApiError) as refused:
                await it.decode(PICTURE, png(), 60.0)
            assert refusal(refused.value) == (503, "not_ready")
            assert it.healthy() is healthy

    with_pool(no_start)


def test_a_decoder_knows_no_secret_and_memory_is_bounded_by_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    assert "hidden" not in environment().values()

    async def use(it: DecodePool) -> str:
        await it.decode(PICTURE, png(), 60.0)
        return Path(f"/proc/{pids(it)[0]}/limits").read_text()

    line = next(line for line in with_pool(use).splitlines() if line.startswith("Max address space"))
    assert int(line.split()[3]) < resource.getpagesize() * 2**18 + 2**31


def test_what_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("serve.decoding.decoder.decode", hungry)
    head, image = answer(PICTURE, b"abc")
    assert (head["refused"], image) == ("the image takes more memory than 3 bytes may; make it smaller", b"")


def test_sizes_are_bounded_before_anything_is_drawn() -> None:
    with pytest.raises(InputError, match=r"4096 x 1025 pixels is larger than the limit of 4,194,304"):
        decode(DecodeJob("recording", 8, 8, sensor=(4096, 1025)), b"")
    with pytest.raises(InputError, match="the limit is 4,194,304"):
        decode(PICTURE, png(4096, 1025))
    assert decode(PICTURE, png(4096, MAX_PIXELS // 4096)).shape == (3, 8, 8)


def test_a_message_of_another_size_is_the_end() -> None:
    pipe = io.BytesIO()
    write_message(pipe, {"a": 1}, b"1234")
    assert read_message(io.BytesIO(pipe.getvalue()), 4) == ({"a": 1}, b"1234")
    for data, most in ((pipe.getvalue(), 3), (pipe.getvalue()[:-1], 4), (b"", 4), (b"{}\n", 4)):
        with pytest.raises(EOFError):
            read_message(io.BytesIO(data), most)


def test_stuck_recordings_keep_no_other_request_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoder is busy for good, and the endpoint answers numbers, health and its description."""
    monkeypatch.setattr(pool, "COMMAND", ("/bin/sh", "-c", "echo '{\"bytes\": 0}'; exec sleep 600"))
    with local_server(make_checkpoint(tmp_path / "c"), max_queue=64) as server:
        server.endpoint.decoders._limit_s = 20.0
        kept = [send_picture(server) for _ in range(8)]
        started = time.monotonic()
        numbers = {"event": [[0.5] * 768], "encoding": "base64"}
        assert server.json("POST", "/v1/align", numbers, timeout=15)[0] == 200
        assert server.json("GET", "/v2/health/ready", timeout=15)[0] == 200
        assert time.monotonic() - started < 15
        for connection in kept:
            connection.close()


def send_picture(server: LocalServer) -> Any:
    """Send a picture and do not wait for the answer."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/align", png(), {"content-type": "image/png"})
    return connection
