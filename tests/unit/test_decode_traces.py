"""Traces of `decode`: `replay` draws the same passes from them, and the same time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from ray_app.commands.decode.command import run_decode
from ray_app.commands.decode.files import trace
from ray_app.commands.replay.rows import replayed_row
from ray_app.config.decode import DecodeConfig
from ray_app.config.speculative import ReplayConfig
from ray_app.drafters.cost import StepTimes, row_cost
from ray_app.drafters.recorded_states import answers
from ray_app.drafters.replay import DRAFTERS, RowReplay, replay_fold
from ray_app.store.traces import read_traces

VOCABULARY = len(tiny_models.SPECIAL) + len(tiny_models.WORDS)


def config(folder: Path, name: str, **changed: Any) -> DecodeConfig:
    settings: dict[str, Any] = {
        "source": (folder / "prompts.jsonl",),
        "target": folder / "target",
        "drafter": ("hybrid",),
        "out": folder / name,
        "num_speculative_tokens": 4,
        "max_new_tokens": 16,
        "draft_length": "fixed",
        "watch": True,
    }
    return DecodeConfig(**{**settings, **changed})


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_replay_adds_a_row_s_times_up_to_what_was_measured() -> None:
    """Times by hand: three passes over 4 drafts, one without any, 2 ms of the loop, and the drafter's own time."""
    passes = [[4, 4, 4, 4, 1.0, 20.0], [4, 4, 1, 5, 1.0, 25.0], [4, 0, 0, 1, 1.0, 10.0], [4, 3, 3, 4, 1.0, 21.0]]
    way = {
        "passes": passes,
        "bookkeeping_ms": 2.0,
        "draft_ms": 4.0,
        "learn_ms": 0.5,
        "own_ms": {},
        "total_ms": 5.0 + 30.0 + 4.0 + 76.0 + 2.0 + 0.5,
        "encode_ms": 5.0,
        "prefill_ms": 30.0,
    }
    line = {
        "row": 0,
        "sequence": "",
        "question": "q",
        "given_draft_tokens": [],
        "target_tokens": list(range(5, 17)),
        "target_text": "",
        "temperature": 0.0,
        "t_start_us": None,
        "t_end_us": None,
        "drafters": {"hybrid": way},
        "plain": {"encode_ms": 5.0, "prefill_ms": 30.0, "total_ms": 5.0 + 30.0 + 120.0},
    }
    cfg = DecodeConfig(
        source=(Path("p.jsonl"),), target=Path("t"), out=Path("o"), num_speculative_tokens=4, draft_length="fixed"
    )
    timing = trace(cfg, line, "hybrid")["timing_ms"]
    times = StepTimes(
        timing["target_prefill"],
        timing["target_per_token"],
        timing["verify"]["4"],
        timing["verify"]["0"],
        event_start_ms=0.0,
        event_step_ms=0.0,
        own_ms=timing["drafting"]["hybrid"],
    )
    row = RowReplay(12, (4, 4, 0, 3), (4, 1, 0, 3), (), 0, 0, seconds=9.0)  # another machine's time
    cost = row_cost(row, times, gamma=4, num_event_tokens=0, device="same")
    assert cost.plain_ms == pytest.approx(line["plain"]["total_ms"])
    assert cost.continuous_ms == pytest.approx(way["total_ms"])


def test_replay_predicts_the_passes_and_the_time_of_every_row(tmp_path: Path) -> None:
    """Drafters that learn again from the run's traces draft the same, and measured times add up to the row's own."""
    tiny_models.save_drafter(tmp_path / "target", seed=0)
    lines = [{"sequence": f"drive{n // 10}", "question": f"What is w{n % 3} ?"} for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run_decode(config(tmp_path, "learn", max_rows=10))
    learn = tmp_path / "learn" / "traces" / "hybrid.jsonl"
    names = ("hybrid", "ngram", "positional", "previous_window")
    run_decode(config(tmp_path, "out", drafter=names, learn_from=(learn,), max_rows=20))
    learnt = answers(read_traces(learn, VOCABULARY, 2))
    for name in names:
        file = read_traces(tmp_path / "out" / "traces" / f"{name}.jsonl", VOCABULARY, 2)
        rows = replay_fold(
            DRAFTERS[name](), learnt, answers(file), gamma=4, vocabulary=VOCABULARY, clock=time.perf_counter
        )
        cfg = ReplayConfig(traces=(file.path,), num_speculative_tokens=4, vocabulary=VOCABULARY)
        for line, each, row in zip(rows_of(tmp_path / "out"), file.traces, rows, strict=True):
            way, plain = line["drafters"][name], line["plain"]
            assert len(row.drafted) == way["num_passes"], name
            cost = replayed_row(cfg, name, each, row, each.timing_ms, 0, 0).cost
            assert cost
            assert cost.plain_ms == pytest.approx(plain["total_ms"])
            if len(line["target_tokens"]) < 16:  # else the last pass asked for fewer tokens than `replay` does
                assert cost.continuous_ms - plain["prefill_ms"] == pytest.approx(way["total_ms"] - way["prefill_ms"])
