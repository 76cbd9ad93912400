"""One queue, one worker thread: requests that wait while a forward pass runs go into the next one together.

Nothing waits while the worker is idle (unless `wait_s` says so), and the wait is bounded by what may stand in the
queue. `@serve.batch` counts requests where rows matter, always waits its time out for a batch that is not full, and
an exception in its `batch_size_fn` stops it for good.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..protocol.errors import ApiError
from .predict import Answer, InferenceRequest

SMOOTHING = 0.1
"""Weight of the newest batch in the mean time of one."""
ARRIVAL_S = 1.0
"""So long a body that arrives keeps its place in the queue: who sends a byte now and then keeps none."""
STUCK_S = 60.0
"""A forward pass that takes longer is not coming back."""

Predict = Callable[[Sequence[InferenceRequest]], list[Answer | ApiError]]
Leaving = Callable[[], Coroutine[Any, Any, None]]
"""Ends when the caller goes away."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request in the queue."""

    work: InferenceRequest
    """What it asks."""
    deadline: float
    """On the clock of time.monotonic."""
    answer: asyncio.Future[Answer]
    """Where its caller waits."""
    arrived: float = field(default_factory=time.monotonic)
    """On the same clock."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One forward pass, for the metrics."""

    rows: int
    """Pairs in it."""
    queued_s: tuple[float, ...]
    """How long each request waited."""
    compute_s: float
    """How long it took."""


class Batcher:
    """Admits, queues, computes. Lives in one event loop; the forward pass runs in its own thread."""

    def __init__(
        self,
        predict: Predict,
        *,
        max_rows: int,
        max_queued_rows: int,
        wait_s: float = 0.0,
        observe: Callable[[BatchTimes], None] = lambda _: None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._predict, self._observe = predict, observe
        self._max_rows, self._max_queued_rows, self._wait_s = max_rows, max_queued_rows, wait_s
        self._queue: deque[QueuedRequest] = deque()
        self._thread = ThreadPoolExecutor(1, "forward", prepare)
        self._worker: asyncio.Task[None] | None = None
        self._began: float | None = None
        self._arriving: dict[object, float] = {}
        self.queued_rows = 0
        self.batch_s = 0.05

    def full(self) -> bool:
        """Whether as many rows wait, and requests arrive, as may. Large requests need no more room than small."""
        late = time.monotonic() - ARRIVAL_S
        while self._arriving and next(iter(self._arriving.values())) < late:
            del self._arriving[next(iter(self._arriving))]
        return self.queued_rows + len(self._arriving) >= self._max_queued_rows

    def queue_full_error(self) -> ApiError:
        """429, with the time after which it is worth asking again."""
        batches = 1 + self.queued_rows / self._max_rows
        seconds = max(1, math.ceil(batches * self.batch_s))
        waits = f"{self.queued_rows} pairs wait and {len(self._arriving)} requests arrive"
        detail = f"{waits}, the limit is {self._max_queued_rows}; try again in {seconds} s."
        return ApiError(429, "busy", detail, {"retry-after": str(seconds)})

    @contextmanager
    def reserve_slot(self) -> Iterator[None]:
        """Keeps a place in the queue for a request whose body is still on its way."""
        self._arriving[key := object()] = time.monotonic()
        try:
            yield
        finally:
            self._arriving.pop(key, None)

    async def answer(self, work: InferenceRequest, timeout_s: float, gone: Leaving | None = None) -> Answer:
        """The model's answer. Problem 429: the queue is full. Problem 504: not in time. Others: what is wrong.
        CancelledError: `gone` ended, so that nobody waits for it any more.
        """
        if self.full():
            raise self.queue_full_error()
        loop = asyncio.get_running_loop()
        waiting = QueuedRequest(work, time.monotonic() + timeout_s, loop.create_future())
        self._queue.append(waiting)
        self.queued_rows += work.rows
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        leaving = loop.create_task(gone()) if gone else None
        if leaving:
            leaving.add_done_callback(lambda it: it.cancelled() or it.exception() or waiting.answer.cancel())
        try:
            async with asyncio.timeout(timeout_s):
                return await waiting.answer
        except TimeoutError:
            raise deadline_error(timeout_s) from None
        finally:
            if leaving:
                leaving.cancel()

    def healthy(self) -> bool:
        """Whether the worker still comes back from its forward passes."""
        return self._began is None or time.monotonic() - self._began < STUCK_S

    def close(self) -> None:
        """Lets the thread go."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            if self._wait_s and self.queued_rows < self._max_rows:
                await asyncio.sleep(self._wait_s)
            batch = self._next_batch()
            if not batch:
                continue
            self._began = began = time.monotonic()
            try:
                answers = await loop.run_in_executor(self._thread, self._predict, [w.work for w in batch])
            except Exception as error:  # a defect of ours: every caller hears of it, the worker goes on
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            finally:
                self._began = None
            took = time.monotonic() - began
            self.batch_s += SMOOTHING * (took - self.batch_s)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, ApiError):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)
            self._observe(BatchTimes(sum(w.work.rows for w in batch), tuple(began - w.arrived for w in batch), took))

    def _next_batch(self) -> list[QueuedRequest]:
        """The requests at the head of the queue that fit; those whose callers are gone are dropped."""
        batch: list[QueuedRequest] = []
        rows = 0
        while self._queue and (not batch or rows + self._queue[0].work.rows <= self._max_rows):
            waiting = self._queue.popleft()
            self.queued_rows -= waiting.work.rows
            if not waiting.answer.done() and time.monotonic() < waiting.deadline:
                batch.append(waiting)
                rows += waiting.work.rows
        return batch


def deadline_error(timeout_s: float) -> ApiError:
    """504 with the time that was granted."""
    return ApiError(504, "deadline", f"no answer within {timeout_s:g} s; grant more time, or send fewer pairs.")
