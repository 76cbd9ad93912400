"""Damage of an event log that the next writer takes out: a block that is in it twice."""

import random
from pathlib import Path

import pytest

from ray_app.errors import StoreError
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries, format_line, without_repeated_block

LINES = [format_line({"kind": "step", "global_step": n, "time": 1e9 + 1.7 * n, "loss": 1 / n}) for n in range(1, 61)]
WHOLE = b"".join(LINES)


def test_a_block_that_is_in_an_event_log_twice_is_dropped() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        begin = rng.randrange(len(WHOLE))
        end = rng.randrange(begin, min(len(WHOLE), begin + 2000)) + 1
        if b"\n" in WHOLE[begin:end]:
            assert without_repeated_block(WHOLE[:end] + WHOLE[begin:]) == WHOLE, (begin, end)


def test_the_next_writer_continues_without_it(tmp_path: Path) -> None:
    (tmp_path / EVENT_LOG).write_bytes(WHOLE[:3000] + WHOLE[1000:])
    with pytest.raises(StoreError, match="is damaged"):
        entries(tmp_path)
    with EventLog(tmp_path) as log:
        assert log.last_step == 60
        log.step(61)
        with pytest.raises(StoreError, match="is being written by another process"):
            EventLog(tmp_path, patience_s=0.0)
    assert [line["global_step"] for line in entries(tmp_path)] == list(range(1, 62))
    assert (tmp_path / EVENT_LOG).read_bytes().startswith(WHOLE)


def test_other_damage_stays_and_is_named(tmp_path: Path) -> None:
    assert without_repeated_block(WHOLE) == WHOLE
    for damaged in (WHOLE[:2000] + bytes([WHOLE[2000] ^ 1]) + WHOLE[2001:], WHOLE[:1000] + WHOLE[3000:]):
        assert without_repeated_block(damaged) == damaged
        (tmp_path / EVENT_LOG).write_bytes(damaged)
        with pytest.raises(StoreError, match=r"events\.jsonl, line \d+ is damaged"):
            EventLog(tmp_path).__enter__()
