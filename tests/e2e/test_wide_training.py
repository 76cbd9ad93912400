"""Workers that divide features of the reference's width, 150,528, over gloo on this machine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_processes import train_here, train_on_processes

from ray_app import write_store
from ray_app.config.train import TrainConfig
from ray_app.runs.event_log import entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.checkpoint import load_checkpoint, replay_golden

pytestmark = pytest.mark.slow
WIDTH, PAIRS = 150_528, 48


@pytest.fixture
def wide_store(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    causes = draw.random((PAIRS, 4), np.float32)
    event, target = (
        (causes @ draw.random((4, WIDTH), np.float32) * 40 + draw.random((PAIRS, WIDTH), np.float32) * 90).astype(
            np.uint8
        )
        for _ in range(2)
    )
    write_store(tmp_path / "store", event=event, target=target, sequence=[f"drive {n // 8}" for n in range(PAIRS)])
    return tmp_path / "store"


def test_two_workers_train_the_reference_s_adapter_as_one_does(wide_store: Path, tmp_path: Path) -> None:
    """154 million weights. Losses to 1e-5, accepted pairs equal, weights on average to a hundredth of a step.

    Nothing is clipped: the norm of one worker's gradient, a float32 sum over 77 million numbers, is off by parts in
    ten thousand. Float32 sums over 150,528 columns differ from those of halves by parts in a million, and where a
    gradient is as small as that AdamW's step may have the other sign.
    """
    settings: dict[str, Any] = {"strategy": "lightweight", "num_epochs": 2, "batch_size": 16, "grad_clip": 1e6}
    alone = TrainConfig(store=wide_store, out=tmp_path / "one", **settings)
    divided = TrainConfig(store=wide_store, out=tmp_path / "two", num_workers=2, **settings)
    train_here(alone)
    train_on_processes(divided)
    for kind in ("step", "epoch"):
        lines = [[line for line in entries(cfg.folder) if line["kind"] == kind] for cfg in (divided, alone)]
        assert len(lines[0]) == len(lines[1])
        for one, other in zip(*lines, strict=True):
            if kind == "step":
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            else:
                assert one["val"]["cosine_accept_rate"] == other["val"]["cosine_accept_rate"]
    found, expected = (load_checkpoint(RunDir(cfg.folder).checkpoint("epoch_0002")) for cfg in (divided, alone))
    replay_golden(found)
    for name, weight in expected.adapter.state_dict().items():
        difference = (found.adapter.state_dict()[name] - weight).abs().mean()
        assert difference < 0.01 * alone.learning_rate, f"{name}: {difference:.1e}"
