"""Pairs as in-memory tensors: a private copy, or a zero-copy view of Ray's object store.

Shapes: B = pairs held, E, D = widths of the event and the target feature.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PairTensors:
    """Some pairs in memory, as stored, sorted by position."""

    positions: NDArray[np.int64]
    """Position of each pair in its part."""
    event_BE: torch.Tensor
    """Event features as stored."""
    target_BD: torch.Tensor
    """Target features as stored."""

    def take(self, positions: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (events, targets) of these positions."""
        rows = torch.from_numpy(np.searchsorted(self.positions, positions))
        return self.event_BE[rows], self.target_BD[rows]

    def cut(self, columns: tuple[slice, slice]) -> "PairTensors":
        """View some columns of the events and of the targets."""
        event, target = columns
        return replace(self, event_BE=self.event_BE[:, event], target_BD=self.target_BD[:, target])

    def on(self, device: torch.device) -> "PairTensors":
        """Move the pairs to a GPU, unless they would take over a quarter of its free memory.

        Weights, optimizer, activations and the pairs of the other part need memory after them.
        """
        num_bytes = self.event_BE.nbytes + self.target_BD.nbytes
        if device.type != "cuda" or num_bytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        return replace(self, event_BE=self.event_BE.to(device), target_BD=self.target_BD.to(device))
