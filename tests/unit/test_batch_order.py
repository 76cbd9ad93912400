"""The order of training: every pair once an epoch, and the same global batches for any number of workers."""

import numpy as np
import pytest
import torch

from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors


@pytest.mark.parametrize(("pairs", "batch"), [(100, 8), (64, 8), (5, 8), (1, 4), (4166, 32)])
def test_an_epoch_holds_every_pair_once(pairs: int, batch: int) -> None:
    lanes = ShardedBatchOrder(pairs, batch, seed=3)
    batches = list(lanes.epoch(0, 0, 1))
    assert len(batches) == lanes.steps
    assert sorted(np.concatenate([b.positions for b in batches]).tolist()) == list(range(pairs))
    assert all(b.global_rows == len(b.positions) for b in batches)


@pytest.mark.parametrize("world", range(1, 9))
def test_the_global_batches_do_not_depend_on_the_number_of_workers(world: int) -> None:
    lanes = ShardedBatchOrder(43, 8, seed=0)
    alone = [b.positions.tolist() for b in lanes.epoch(2, 0, 1)]
    divided = zip(*(lanes.epoch(2, rank, world) for rank in range(world)), strict=True)
    for whole, parts in zip(alone, divided, strict=True):
        assert [p for part in parts for p in part.positions] == whole
        starts = [part.first_row for part in parts]
        assert starts == np.minimum(np.arange(world) * 8 // world, len(whole)).tolist()
        assert {part.global_rows for part in parts} == {len(whole)}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_a_worker_holds_exactly_the_pairs_that_it_needs(world: int) -> None:
    lanes = ShardedBatchOrder(43, 8, seed=0)
    everything = []
    for rank in range(world):
        needed = {int(p) for epoch in range(5) for b in lanes.epoch(epoch, rank, world) for p in b.positions}
        assert sorted(needed) == lanes.held(rank, world).tolist()
        everything += sorted(needed)
    assert sorted(everything) == list(range(43))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([b.positions for b in ShardedBatchOrder(50, 8, seed).epoch(epoch, 0, 1)]).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_pairs_too_many_for_what_is_free_on_a_gpu_stay_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held = PairTensors(np.arange(4), torch.zeros(4, 10, dtype=torch.uint8), torch.zeros(4, 10, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * 80 - 1, 1000))
    assert held.on(torch.device("cuda")) is held
    assert held.on(torch.device("cpu")) is held


def test_the_lanes_are_permuted_independently_of_each_other() -> None:
    """Of 40 pairs of a lane two independent orders agree in one place on average, and far from all."""
    order = ShardedBatchOrder(8 * 40, 8, seed=5)
    place_of = {int(pair): (lane, n) for lane, pairs in enumerate(order.lanes()) for n, pair in enumerate(pairs)}
    drawn = np.array([[place_of[int(pair)][1] for pair in batch.positions] for batch in order.epoch(1, 0, 1)])
    assert [place_of[int(pair)][0] for pair in next(iter(order.epoch(1, 0, 1))).positions] == list(range(8))
    for a in range(8):
        for b in range(a):
            assert (drawn[:, a] == drawn[:, b]).sum() < 8, (a, b)
    assert (drawn[:, 0] == np.arange(40)).sum() < 8, "nor is a lane left in the order it was dealt"
