"""The queue before the forward pass: what goes into one pass, who is let in, and whose work is not done."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from serve.model.batcher import Batcher, BatchTimes
from serve.model.predict import InferenceRequest
from serve.protocol.errors import ApiError


def work(rows: int = 1) -> InferenceRequest:
    return InferenceRequest(torch.zeros(rows, 2))


async def drive(batcher: Batcher, works: list[InferenceRequest], timeout_s: float = 5.0) -> list[Any]:
    return await asyncio.gather(*(batcher.answer(w, timeout_s) for w in works), return_exceptions=True)


def test_bodies_on_their_way_count_as_waiting_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.model.batcher.ARRIVAL_S", 3600.0)
    batcher = Batcher(list, max_rows=4, max_queued_rows=4)
    with batcher.reserve_slot(), batcher.reserve_slot(), batcher.reserve_slot():
        assert not batcher.full()
        with batcher.reserve_slot():
            assert batcher.full()
            assert "0 pairs wait and 4 requests arrive, the limit is 4" in batcher.queue_full_error().detail
            monkeypatch.setattr("serve.model.batcher.ARRIVAL_S", 0.0)
            assert not batcher.full(), "who sends a byte now and then keeps no place"
    assert not batcher.full()


def test_requests_that_wait_go_into_the_next_forward_pass_together() -> None:
    batches: list[int] = []

    def predict(works: Any) -> Any:
        time.sleep(0.02)
        return list(works)

    def observe(times: BatchTimes) -> None:
        batches.append(times.rows)

    batcher = Batcher(predict, max_rows=4, max_queued_rows=64, observe=observe)
    works = [work() for _ in range(9)]
    assert asyncio.run(drive(batcher, works)) == works
    assert batches == [4, 4, 1]
    batches.clear()
    works = [work(n) for n in (3, 2, 4, 1)]
    assert asyncio.run(drive(batcher, works)) == works
    assert batches == [3, 2, 4, 1], "a request is never cut, and a batch never larger than its limit"


def test_what_is_wrong_with_one_request_costs_that_one_alone() -> None:
    problem = ApiError(422, "not_finite", "NaN")

    def predict(works: Any) -> Any:
        return [problem if w.rows == 2 else w for w in works]

    batcher = Batcher(predict, max_rows=8, max_queued_rows=64)
    works = [work(1), work(2), work(1)]
    assert asyncio.run(drive(batcher, works)) == [works[0], problem, works[2]]


def test_a_bug_reaches_its_callers_and_the_worker_continues() -> None:
    calls = []

    def predict(works: Any) -> Any:
        calls.append(len(works))
        if len(calls) == 1:
            raise RuntimeError("defect")
        return list(works)

    async def twice() -> tuple[list[Any], list[Any]]:
        return await drive(batcher, [work()]), await drive(batcher, [work(), work()])

    batcher = Batcher(predict, max_rows=8, max_queued_rows=64)
    first, second = asyncio.run(twice())
    assert isinstance(first[0], RuntimeError)
    assert all(isinstance(answer, InferenceRequest) for answer in second)
    assert batcher.queued_rows == 0


def test_a_full_queue_refuses_with_a_time_that_grows_with_it() -> None:
    def predict(works: Any) -> Any:
        time.sleep(0.05)
        return list(works)

    async def overload() -> list[Any]:
        batcher.batch_s = 2.0
        return await drive(batcher, [work(4) for _ in range(5)])

    batcher = Batcher(predict, max_rows=4, max_queued_rows=8)
    answers = asyncio.run(overload())
    refused = [a for a in answers if isinstance(a, ApiError)]
    assert len(refused) == 3, "two wait, the rest is refused before the first forward pass begins"
    assert {p.status for p in refused} == {429}
    assert {p.headers["retry-after"] for p in refused} == {"6"}, "8 rows before it and its own batch, 2 s each"


def test_work_whose_caller_is_late_or_gone_is_not_done() -> None:
    done: list[Any] = []
    started, release = threading.Event(), threading.Event()

    def predict(works: Any) -> Any:
        started.set()
        assert release.wait(60)
        done.extend(works)
        return list(works)

    async def impatient() -> list[Any]:
        first = asyncio.create_task(batcher.answer(work(), 60.0))
        await asyncio.to_thread(started.wait)
        late = asyncio.create_task(batcher.answer(work(), 0.01))
        gone = asyncio.create_task(batcher.answer(work(), 60.0))
        await asyncio.sleep(0.02)
        gone.cancel()
        release.set()
        return await asyncio.gather(first, late, gone, return_exceptions=True)

    batcher = Batcher(predict, max_rows=1, max_queued_rows=8)
    first, late, gone = asyncio.run(impatient())
    assert isinstance(first, InferenceRequest)
    assert isinstance(late, ApiError)
    assert late.status == 504
    assert isinstance(gone, asyncio.CancelledError)
    assert len(done) == 1
