"""Noise of one optimizer step, the same for every division of its global batch.

Shapes: R = rows that this worker holds, G = rows of the global batch, W = width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchNoise:
    """Names the rows of a global batch that are at hand, so that their dropout is that of the whole batch."""

    seed: int
    """Seed of the run."""
    step: int
    """Optimizer step, counted over all epochs."""
    first_row: int
    """Position of the first row at hand in the global batch."""
    rows: int
    """Rows at hand."""
    global_rows: int
    """Rows of the global batch."""

    def uniform(self, layer: int, width: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), shape (R, W): these rows of a (G, W) draw by (seed, step, layer)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.step, layer))
        draw_GW = torch.rand(self.global_rows, width, generator=generator)
        return draw_GW[self.first_row : self.first_row + self.rows].to(device)


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers (SplitMix64's finaliser after each)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
