"""Baselines of a sweep's trials are those of the one evaluator."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_app.commands.train.shared_dataset import baselines_of
from ray_app.config.train import TrainConfig
from ray_app.core.evaluation import AlignmentEvaluator, Baselines, derangement
from ray_app.core.metrics import AlignmentCounts
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs


def test_baselines_and_lift_are_those_of_the_one_evaluator(small_store: Path) -> None:
    store = PairStore.open(small_store)
    split = split_pairs(store.index, TrainConfig(store=small_store, out=small_store).split_config)
    event, target = store.read_rows(split.val)
    mean = torch.from_numpy(store.read_rows(split.train)[1].mean(axis=0) / 255).float()
    baselines = baselines_of(store, split, event, target, mean)

    class Same(torch.nn.Module):
        def forward(self, event_BE: torch.Tensor) -> torch.Tensor:
            return event_BE

    evaluator = AlignmentEvaluator(Same().eval(), mean, 1 / 255, 1 / 255, images=True)  # type: ignore[arg-type]
    evaluator.add(torch.from_numpy(event), torch.from_numpy(target))
    sequences = store.index.sequence[split.val].tolist()
    result = evaluator.result(sequences, np.full(len(event), -1))
    for name, counts in baselines.fixed.items():
        assert counts.accept_rate() == float((result.baselines[name] > 0.8).mean())
    assert np.array_equal(baselines.others, derangement(sequences, 0))
    shuffled = AlignmentCounts.of(result.baselines["shuffled"])
    lift = baselines.lift(AlignmentCounts.of(result.after), shuffled)
    assert lift["lift"] == pytest.approx(result.lift())
    assert lift["baselines"]["shuffled"] == shuffled.accept_rate()


def test_a_constant_that_is_accepted_has_no_lift_over_itself_shuffled() -> None:
    half = AlignmentCounts.of(np.array([0.9, 0.1]))
    nothing = AlignmentCounts.of(np.array([0.1, 0.1]))
    assert Baselines({"white": nothing}, np.array([1, 0])).lift(half, half)["lift"] == 0.0
