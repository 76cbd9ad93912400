"""Pairs in memory, as stored. No Ray: what is held may be a worker's own copy, or a view of what a node shares.

Shapes: B = pairs held, E, D = widths of the event and the target feature.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Held:
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
