"""Wide features divided over workers, and with them the weights that they meet (arXiv 1909.08053).

The columns of a first layer and the rows of a last one are cut along the features. What workers send each other is
small then: hidden activations, and sums over features. Ranks and devices are unknown here: the sum over workers is
passed in.

Shapes: W = width of a feature, N… = shape of a whole tensor, B = pairs, H = hidden width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_NUMBERS = 2**22
"""Numbers of a whole tensor that are in memory at a time, 16 MiB of float32."""


@dataclass(frozen=True, slots=True)
class FeatureSlice:
    """One of `count` slices of every feature, and the sum over the workers that hold the others."""

    index: int = 0
    """Number of this slice."""
    count: int = 1
    """Number of slices; 1: features are whole."""
    all_reduce: Callable[[Tensor], Tensor] = lambda own: own
    """Returns the sum of all workers' tensors, the same bits on each; the given one is not changed."""

    def of(self, width: int) -> slice:
        """Columns of a feature of this width; slices differ by at most one column."""
        return slice(self.index * width // self.count, (self.index + 1) * width // self.count)

    def sum(self, partial: Tensor) -> Tensor:
        """Sum of partial results, in float32. All workers compute the same with it: each has its whole gradient."""
        return _Summed.apply(partial.float(), self.all_reduce)

    def share(self, replica: Tensor) -> Tensor:
        """Return a value that all workers hold alike; its gradient is the sum of those of their slices."""
        return replica if self.count == 1 else _Shared.apply(replica, self.all_reduce)


WHOLE = FeatureSlice()


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, partial: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return all_reduce(partial)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replica: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.all_reduce = all_reduce
        return replica.view_as(replica)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.all_reduce(grad.float()).to(grad.dtype), None


class RowBlock(NamedTuple):
    """Some rows of a whole tensor."""

    shape: tuple[int, ...]
    """Shape of the block."""
    place: tuple[slice, ...]
    """Place of a worker's part in the block; empty if it has none of these rows."""
    rows: slice
    """Rows of the worker's part that are in the block."""


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Place of a worker's part in a whole tensor."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    place: tuple[slice, ...]
    """First and last index of the part, for each dimension."""

    def row_blocks(self) -> Iterator[RowBlock]:
        """Divide the whole tensor into blocks of rows, in order; the same on every worker."""
        num_rows, *rest = self.shape
        own, *columns = self.place
        height = max(1, BLOCK_NUMBERS // math.prod(rest))
        for first in range(0, num_rows, height):
            last = min(first + height, num_rows)
            low, high = max(first, own.start), min(last, own.stop)
            high = max(low, high)
            place = (slice(low - first, high - first), *columns)
            yield RowBlock((last - first, *rest), place, slice(low - own.start, high - own.start))


def draw_uniform(part: Tensor, bound: float, generator: torch.Generator, whole: TensorSlice | None) -> None:
    """Fill a tensor, or a worker's part of one, from ± `bound`: the numbers that the whole would have there."""
    if whole is None:
        part.uniform_(-bound, bound, generator=generator)
        return
    for block in whole.row_blocks():
        part[block.rows] = torch.empty(block.shape).uniform_(-bound, bound, generator=generator)[block.place]


def gather(part: Tensor, whole: TensorSlice, features: FeatureSlice) -> Iterator[Tensor]:
    """Yield the whole float32 tensor on every worker, some rows at a time, bit for bit.

    All workers take every block. Bits travel as whole numbers: a sum of floats would make 0 of −0.
    """
    for block in whole.row_blocks():
        bits = torch.zeros(block.shape, dtype=torch.int32, device=part.device)
        bits[block.place] = part[block.rows].view(torch.int32)
        yield features.all_reduce(bits).view(torch.float32)
