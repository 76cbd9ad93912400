"""Dynamic batching: requests that wait while a forward pass runs go into the next one together.

No request waits while the worker is idle (unless `wait_s` is set), and the queue is bounded in rows. `@serve.batch`
counts requests instead of rows, always waits its full timeout for a batch that is not full, and an exception in its
`batch_size_fn` stops it for good.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..protocol.errors import ApiError
from .predict import InferenceRequest, InferenceResult

SMOOTHING = 0.1
"""Weight of the newest forward pass in the moving average of their times."""
ARRIVAL_S = 1.0
"""How long an arriving body holds a slot in the queue: a slow sender loses it."""
STUCK_S = 60.0
"""A forward pass that takes longer is taken for stuck."""

Predict = Callable[[Sequence[InferenceRequest]], list[InferenceResult | ApiError]]


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request in the queue."""

    work: InferenceRequest
    """Its input."""
    deadline: float
    """Latest time to start its forward pass, on the clock of time.monotonic."""
    answer: asyncio.Future[InferenceResult]
    """Set when the answer is known."""
    arrived: float = field(default_factory=time.monotonic)
    """Time of arrival, on the same clock."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Times of one forward pass, for the metrics."""

    rows: int
    """Pairs in the batch."""
    queued_s: tuple[float, ...]
    """Seconds that each request waited."""
    compute_s: float
    """Seconds of the forward pass."""


class Batcher:
    """Admits, queues and batches requests in one event loop; forward passes run in one thread."""

    def __init__(
        self,
        predict: Predict,
        *,
        max_rows: int,
        max_queued_rows: int,
        wait_s: float = 0.0,
        observe: Callable[[BatchTimes], None] = lambda _: None,
    ) -> None:
        self._predict, self._observe = predict, observe
        self._max_rows, self._max_queued_rows, self._wait_s = max_rows, max_queued_rows, wait_s
        self._queue: deque[QueuedRequest] = deque()
        self._thread = ThreadPoolExecutor(1, "forward")
        self._worker: asyncio.Task[None] | None = None
        self._started: float | None = None
        self._arriving: dict[object, float] = {}
        self.queued_rows = 0
        self.batch_s = 0.05

    def full(self) -> bool:
        """True if the queue is at its limit. An arriving request counts as one row, whatever its size."""
        expired = time.monotonic() - ARRIVAL_S
        while self._arriving and next(iter(self._arriving.values())) < expired:
            del self._arriving[next(iter(self._arriving))]
        return self.queued_rows + len(self._arriving) >= self._max_queued_rows

    def queue_full_error(self) -> ApiError:
        """Error 429, with an estimate of when to try again."""
        batches = 1 + self.queued_rows / self._max_rows
        seconds = max(1, math.ceil(batches * self.batch_s))
        waiting = f"{self.queued_rows} pairs wait and {len(self._arriving)} requests arrive"
        detail = f"{waiting}, the limit is {self._max_queued_rows}; try again in {seconds} s."
        return ApiError(429, "busy", detail, {"retry-after": str(seconds)})

    @contextmanager
    def reserve_slot(self) -> Iterator[None]:
        """Hold a slot in the queue while a body arrives. ApiError 429 if the queue is full, before it is read."""
        if self.full():
            raise self.queue_full_error()
        self._arriving[key := object()] = time.monotonic()
        try:
            yield
        finally:
            self._arriving.pop(key, None)

    async def answer(self, work: InferenceRequest, timeout_s: float) -> InferenceResult:
        """Return the model's answer. ApiError 429: the queue is full; 504: too late; others: the input is wrong.

        Ray Serve cancels this call when the client disconnects; the work is then dropped from the queue.
        """
        if self.full():
            raise self.queue_full_error()
        loop = asyncio.get_running_loop()
        waiting = QueuedRequest(work, time.monotonic() + timeout_s, loop.create_future())
        self._queue.append(waiting)
        self.queued_rows += work.rows
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            async with asyncio.timeout(timeout_s):
                return await waiting.answer
        except TimeoutError:
            raise deadline_error(timeout_s) from None

    def healthy(self) -> bool:
        """False if a forward pass is stuck."""
        return self._started is None or time.monotonic() - self._started < STUCK_S

    def close(self) -> None:
        """Stop the thread after the current forward pass."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            if self._wait_s and self.queued_rows < self._max_rows:
                await asyncio.sleep(self._wait_s)
            batch = self._next_batch()
            if not batch:
                continue
            self._started = started = time.monotonic()
            try:
                answers = await loop.run_in_executor(self._thread, self._predict, [w.work for w in batch])
            except Exception as error:  # a bug: report it to every caller, keep the worker
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            finally:
                self._started = None
            took = time.monotonic() - started
            self.batch_s += SMOOTHING * (took - self.batch_s)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, ApiError):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)
            self._observe(
                BatchTimes(sum(w.work.rows for w in batch), tuple(started - w.arrived for w in batch), took)
            )

    def _next_batch(self) -> list[QueuedRequest]:
        """Take the requests that fit from the head of the queue; drop those that were cancelled or are late."""
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
    """Error 504 with the time limit."""
    return ApiError(504, "deadline", f"no answer within {timeout_s:g} s; allow more time, or send fewer pairs.")
