"""Bootstrap over units of pairs that are resampled together.

Windows of one drive are alike, so whole sequences are drawn; where there are fewer than three, contiguous blocks.

Shapes: N = pairs, U = units (sequences or blocks), C = columns, R = resamples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Resamples behind every interval."""
BLOCKS = 10
"""Contiguous blocks that are resampled where there are fewer than three sequences."""

Numbers = NDArray[np.float64]


def resampled_units(sequences: Sequence[str]) -> tuple[str, NDArray[np.int64]]:
    """(`sequence` or `block`, unit of each pair, shape (N,)): pairs of one unit are drawn together."""
    labels = np.unique(sequences, return_inverse=True)[1]
    if labels.max() >= 2:
        return "sequence", labels
    return "block", np.arange(len(labels)) * min(BLOCKS, len(labels)) // len(labels)


def resampled_means(units: NDArray[np.int64], columns: Sequence[NDArray[np.generic]], seed: int) -> Numbers:
    """Means of the columns, each of shape (N,), in every resample of the units: shape (R, C)."""
    sums_UC = np.stack([np.bincount(units, column) for column in (np.ones(len(units)), *columns)], axis=1)
    rng = np.random.default_rng(seed)
    drawn_RU = rng.multinomial(len(sums_UC), np.full(len(sums_UC), 1 / len(sums_UC)), size=RESAMPLES)
    totals_RC = drawn_RU @ sums_UC
    return totals_RC[:, 1:] / totals_RC[:, :1]


def interval95(values_R: Numbers) -> list[float]:
    """95 % interval of resampled values, shape (R,), by the percentile method."""
    low, high = np.quantile(values_R, (0.025, 0.975))
    return [float(low), float(high)]
