"""Workers that divide the features, as threads of this process: sums without a network, the same bits on each."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.slices import FeatureSlice, gather

T = TypeVar("T")
PATIENCE_S = 60.0


class Sums:
    """Sums over the threads of one group."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=PATIENCE_S)
        self.given: list[Tensor | None] = [None] * count
        self.numbers = [0] * count
        """Numbers that each worker has given."""

    def of_worker(self, index: int) -> FeatureSlice:
        def all_reduce(own: Tensor) -> Tensor:
            self.given[index] = own
            self.numbers[index] += own.numel()
            self.barrier.wait()
            total = reduce(torch.add, [given.clone() for given in self.given if given is not None])
            self.barrier.wait()
            return total

        return FeatureSlice(index, len(self.given), all_reduce)


def on_workers(count: int, work: Callable[[FeatureSlice], T]) -> list[T]:
    """What `work` returns on each of so many workers; its error is raised here."""
    sums = Sums(count)

    def alone(index: int) -> T:
        try:
            return work(sums.of_worker(index))
        except BaseException:
            sums.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        started = [threads.submit(alone, index) for index in range(count)]
        return [each.result() for each in started]


def whole_weights(adapter: Adapter) -> dict[str, Tensor]:
    """Weights of the whole adapter; all its workers call this together."""
    slices, weights = adapter.slices(), adapter.state_dict()
    divided = {name: torch.cat(list(gather(weights[name], place, adapter.part))) for name, place in slices.items()}
    return {name: divided.get(name, weight).clone() for name, weight in weights.items()}
