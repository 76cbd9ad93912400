"""Hidden states of a capture become a pair store by one command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_app import cli
from ray_app.commands.prepare.capture import run_prepare_capture
from ray_app.config.prepare import PrepareCapture
from ray_app.errors import InputError
from ray_app.store.capture_store import SHARDS, Shard, claim_capture, publish_capture, state_key, write_shard
from ray_app.store.pair_store import PairStore

DRAFTED, SPOKEN = (3, 5, 0, 4), (4, 2, 3, 4)
"""Tokens of both answers in each window: of the third the drafter says nothing."""
EVENT_WIDTH, TARGET_WIDTH = 6, 8


def capture_of(folder: Path, *, features: bool = True) -> dict[str, torch.Tensor]:
    """A capture of four windows in two shards; returns its states."""
    claim_capture(folder, {"features": features, "question": "What?", "target": {"files": {"a": "0" * 64}}})
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    states: dict[str, torch.Tensor] = {}
    for row, (drafted, spoken) in enumerate(zip(DRAFTED, SPOKEN, strict=True)):
        states[state_key(row, "draft")] = torch.randn(drafted, EVENT_WIDTH).bfloat16()
        states[state_key(row, "target")] = torch.randn(spoken, TARGET_WIDTH).bfloat16()
        named = {"states": f"{SHARDS}/drive-{row // 2:04d}.safetensors"} if features else {}
        window = {"sequence": f"drive_{row // 2}", "t_start_us": row * 10**6, "t_end_us": (row + 1) * 10**6}
        tokens = {"draft_tokens": [7] * drafted, "target_tokens": [7] * spoken}
        rows.append({"row": row, "question": "What?", **window, **tokens, **named})
    for shard in range(2):
        mine = rows[2 * shard : 2 * shard + 2]
        kept = {key: state for key, state in states.items() if int(key.split(".")[0]) // 2 == shard}
        write_shard(folder, f"drive-{shard:04d}", Shard(mine, []), kept if features else {})
    publish_capture(folder, rows, [])
    return states


def test_each_place_that_both_answers_have_is_a_pair_of_vectors(tmp_path: Path) -> None:
    states = capture_of(tmp_path / "capture")
    result = run_prepare_capture(PrepareCapture(folder=tmp_path / "capture", out=str(tmp_path / "s")))
    assert (result["pairs"], result["sequences"], result["rejected"]) == (3 + 2 + 4, 2, 0)
    store = PairStore.open(tmp_path / "s")
    assert store.feature("event").shape == (EVENT_WIDTH,)
    assert store.manifest.source["capture"]["target"] == {"files": {"a": "0" * 64}}
    for row in (0, 1, 3):
        (mine,) = np.nonzero(store.index.t_start_us == row * 10**6)
        places = min(DRAFTED[row], SPOKEN[row])
        event_ND, target_ND = store.read_rows(mine)
        order = [int(np.argmin(np.abs(states[f"{row}.draft"][:places].float().numpy() - e).sum(1))) for e in event_ND]
        assert sorted(order) == list(range(places))
        np.testing.assert_array_equal(event_ND, states[f"{row}.draft"].float().numpy()[order])
        np.testing.assert_array_equal(target_ND, states[f"{row}.target"].float().numpy()[order])


def test_answers_are_pairs_of_sequences_as_long_as_they_are(tmp_path: Path) -> None:
    states = capture_of(tmp_path / "capture")
    words = ["prepare", "capture", str(tmp_path / "capture"), "--out", str(tmp_path / "s"), "--unit", "answer"]
    assert cli.run(words) == 0
    store = PairStore.open(tmp_path / "s")
    assert (store.manifest.pairs, store.feature("target").shape) == (3, (5, TARGET_WIDTH))
    (row,) = np.nonzero(store.index.t_start_us == 10**6)
    event_ND, target_ND = store.read_rows(row)
    for found, side, width in ((event_ND, "draft", EVENT_WIDTH), (target_ND, "target", TARGET_WIDTH)):
        tokens = found.reshape(-1, width)
        there = states[f"1.{side}"].float().numpy()
        np.testing.assert_array_equal(tokens[: len(there)], there)
        assert not tokens[len(there) :].any()


def test_captures_that_are_not_finished_damaged_or_without_states(tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        run_prepare_capture(PrepareCapture(folder=folder, out=str(tmp_path / "s")))

    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is no finished capture"):
        prepare(tmp_path / "empty")
    capture_of(tmp_path / "bare", features=False)
    with pytest.raises(InputError, match="bare has no states; capture them: ray-app capture … --features"):
        prepare(tmp_path / "bare")
    capture_of(tmp_path / "damaged")
    shard = tmp_path / "damaged" / SHARDS / "drive-0001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"drive-0001\.safetensors is missing or damaged"):
        prepare(tmp_path / "damaged")
    capture_of(tmp_path / "cut")
    traces = tmp_path / "cut" / "traces.jsonl"
    traces.write_bytes(traces.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"traces\.jsonl is damaged"):
        prepare(tmp_path / "cut")
