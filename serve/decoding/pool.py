"""Decoder processes of a replica: a decode that takes too long is ended with its process, and others are answered.

A thread can neither be ended nor bounded in memory; a process can. Processes start with the first picture or
recording, and one that died or was killed is replaced with the next.
"""

import asyncio
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ApiError
from .job import DecodeJob, read_message, write_message

LOG = logging.getLogger("ray.serve")
NUM_DECODERS = 2
"""Processes of a replica, so that one slow decode does not keep all others waiting."""
MAX_WAITING = 32
"""Decodes that may wait for a process; more are answered 429."""
DECODE_S = 5.0
"""Longest decode: a hundred times what a body of 32 MiB takes."""
START_S = 60.0
"""Longest start of a process, on a machine that is busy."""
MAX_FAILED_STARTS = 3
"""After so many in a row the replica is not healthy."""
KILL_S = 10.0
"""A killed process that is not gone after this is taken for stuck."""
COMMAND = (sys.executable, "-P", "-m", "serve.decoding.decoder")


class Decoder:
    """One process, asked by one thread at a time."""

    def __init__(self) -> None:
        """Start it and wait until it is ready. OSError, EOFError: it does not start."""
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), start_new_session=True
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            read_message(self._from, 0)
        except BaseException:
            self.kill()
            self.close()
            raise

    def ask(self, job: DecodeJob, data: bytes | memoryview) -> tuple[dict[str, Any], bytes]:
        """Return the answer to a job. EOFError, OSError: the process died, or was killed."""
        write_message(self._to, asdict(job), data)
        return read_message(self._from, 3 * job.num_images * job.height * job.width)

    def alive(self) -> bool:
        """False if it has died."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it now, whatever it does; a thread that waits for it gets EOFError."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a process that was killed or died, and close the pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            with suppress(OSError):
                pipe.close()


class DecodePool:
    """Decodes in `workers` processes, from one event loop."""

    def __init__(self, workers: int = NUM_DECODERS, limit_s: float = DECODE_S) -> None:
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(workers, "decode")
        self._free = asyncio.Semaphore(workers)
        self._idle: list[Decoder] = []
        self._running: set[asyncio.Task[Any]] = set()
        self._decoders: set[Decoder] = set()
        self._waiting = 0
        self._stuck = 0
        self._failed_starts = 0

    def healthy(self) -> bool:
        """False if processes cannot be started, or a killed one is not gone: the replica has to be replaced."""
        return not self._stuck and self._failed_starts < MAX_FAILED_STARTS

    async def decode(self, job: DecodeJob, data: bytes | memoryview, timeout_s: float) -> NDArray[np.uint8]:
        """Return the images, (3 · num_images, height, width).

        ApiError 422: refused, or longer than the limit; 429: too many wait; 503: no process; 504: no time left.
        """
        deadline = time.monotonic() + timeout_s
        if self._waiting >= MAX_WAITING:
            raise ApiError(
                429, "busy", f"{self._waiting} pictures and recordings wait; try again in 1 s.", {"retry-after": "1"}
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise late(timeout_s) from None
        finally:
            self._waiting -= 1
        task = asyncio.create_task(self._run(job, data))
        self._running.add(task)
        task.add_done_callback(self._left)
        try:  # a client that leaves, or gives little time, ends no process
            return await asyncio.wait_for(asyncio.shield(task), deadline - time.monotonic())
        except TimeoutError:
            raise late(timeout_s) from None

    def _left(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        self._free.release()
        take_error(task)

    async def _run(self, job: DecodeJob, data: bytes | memoryview) -> NDArray[np.uint8]:
        decoder = await self._next()
        asked = asyncio.get_running_loop().run_in_executor(self._threads, decoder.ask, job, data)
        asked.add_done_callback(take_error)
        done, _ = await asyncio.wait({asked}, timeout=self._limit_s)
        if not done:
            await self._ended(decoder, asked)
            raise ApiError(422, job.kind, f"the {job.kind} takes longer than {self._limit_s:g} s to decode.")
        try:
            head, image = asked.result()
        except (OSError, EOFError, ValueError) as error:
            await self._ended(decoder, asked)
            raise ApiError(422, job.kind, f"the {job.kind} cannot be decoded: the decoder died of it.") from error
        self._idle.append(decoder)
        if "refused" in head:
            raise ApiError(422, job.kind, f"{head['refused']}.")
        return np.frombuffer(bytearray(image), np.uint8).reshape(-1, job.height, job.width)

    async def _next(self) -> Decoder:
        while self._idle:
            decoder = self._idle.pop()
            if decoder.alive():
                return decoder
            decoder.close()
            self._decoders.discard(decoder)
        return await self._started()

    async def _started(self) -> Decoder:
        """Start a process. ApiError 503: it does not start."""
        starting = asyncio.get_running_loop().run_in_executor(self._threads, Decoder)
        try:
            decoder = await asyncio.wait_for(starting, START_S)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            self._failed_starts += 1
            LOG.error("no decoder process starts: %r", error)
            raise ApiError(503, "not_ready", "no process for pictures and recordings starts; ask again.") from error
        self._failed_starts = 0
        self._decoders.add(decoder)
        return decoder

    async def _ended(self, decoder: Decoder, asked: "asyncio.Future[Any]") -> None:
        """Kill a process, and see that it and the thread that asked it are free again."""
        decoder.kill()
        await asyncio.wait({asked}, timeout=KILL_S)
        if not asked.done():
            self._stuck += 1
            LOG.error("a decoder process that was killed is not gone after %g s", KILL_S)
            return
        self._decoders.discard(decoder)
        await asyncio.get_running_loop().run_in_executor(self._threads, decoder.close)

    def close(self) -> None:
        """Kill all processes; decodes in progress are cancelled."""
        for task in self._running:
            task.cancel()
        for decoder in self._decoders:
            decoder.kill()
        for decoder in self._idle:
            decoder.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def environment() -> dict[str, str]:
    """Environment of a decoder: where Python finds its modules, and nothing of this process's secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
    modules = os.pathsep.join(path for path in sys.path if path)
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return {**kept, **one_thread, "PYTHONPATH": modules}


def take_error(future: "asyncio.Future[Any]") -> None:
    """Take an error for which no caller may wait for any more, so that asyncio does not log it as lost."""
    if not future.cancelled():
        future.exception()


def late(timeout_s: float) -> ApiError:
    """Error 504 with the time that was left."""
    return ApiError(
        504, "deadline", f"no image within {timeout_s:g} s; allow more time, or send a smaller recording."
    )
