"""Pairs in memory, as stored. No Ray: what is held may be a worker's own copy, or a view of what a node shares.

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
    """Position of each pair in what was asked for."""
    event_BE: torch.Tensor
    """Event features as stored."""
    target_BD: torch.Tensor
    """Target features as stored."""

    def take(self, positions: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """(events, targets) of these positions."""
        at = torch.from_numpy(np.searchsorted(self.positions, positions))
        return self.event_BE[at], self.target_BD[at]

    def on(self, device: torch.device) -> "PairTensors":
        """The same pairs where a worker computes: on a GPU, unless they would take over a quarter of what is free.

        Weights, optimizer and activations come after them, and so do the pairs of the other part.
        """
        num_bytes = self.event_BE.nbytes + self.target_BD.nbytes
        if device.type != "cuda" or num_bytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        return replace(self, event_BE=self.event_BE.to(device), target_BD=self.target_BD.to(device))
