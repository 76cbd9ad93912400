"""The benchmark of event drafters on a tiny target: every row of its tables, and the same when it is repeated."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_target

from benchmarks.speculative import event_drafter, event_hybrid
from benchmarks.tables import speculative as tables
from ray_app.commands.demo.draft_training import DraftRecipe

pytestmark = pytest.mark.slow


def test_every_arm_is_measured_and_a_repeated_command_measures_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target.save_target(tmp_path)
    recipe = DraftRecipe(
        drives=12, per_drive=2, exit_layers=1, exit_rank=2, exit_epochs=1, event_rank=4, event_epochs=1, batch_size=4
    )
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(event_drafter, "RECIPE", recipe)
    monkeypatch.setattr(event_drafter, "TEST_DRIVES", 3)
    monkeypatch.setattr(event_drafter, "SEEDS", 2)
    monkeypatch.setattr(event_drafter, "save", lambda _, result: saved.append(result))
    words = ["event_drafter", str(target), "--work", str(tmp_path / "work")]
    words += ["--drives", "12", "--test-drives", "3", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", words)
    for _ in range(2):
        event_drafter.main()
    first, again = saved
    for key in ("all_seeds", "by_seed"):
        assert json.dumps(first[key]) == json.dumps(again[key])  # as text: a share of no gap is no number
    arms = first["all_seeds"]["tokens_per_target_pass"]
    assert arms["the frame itself"]["cosine"] == pytest.approx(1.0)
    assert arms["mean"]["cosine"] < 1.0
    assert first["parameters"]["drafter"] < first["parameters"]["target"]
    monkeypatch.setattr(event_hybrid, "save", lambda _, result: saved.append(result))
    monkeypatch.setattr("sys.argv", words[:4])
    event_hybrid.main()
    monkeypatch.setattr(tables, "read", lambda _: saved[-1])
    assert len(tables.event_hybrid().rows) == len(saved[-1]["tokens_per_target_pass"])
    hybrid = saved[-1]["tokens_per_target_pass"]["hybrid"]["mean"]
    assert hybrid == pytest.approx(arms["hybrid"]["mean"])
    monkeypatch.setattr(tables, "read", lambda _: first)
    assert len(tables.event_drafter().rows) == len(tables.EVENT_ARMS) == len(arms)
    assert len(tables.event_differences().rows) == len(first["all_seeds"]["differences"]) + 2
