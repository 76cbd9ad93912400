"""Alignment metrics as exact counts, so that ranks add and no average is averaged.

Shapes: B, N = pairs, D = feature width, T = thresholds, K = histogram bins.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.core.thresholds import THETA, THETAS, rate_key
from ray_app.errors import InputError

PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
"""Percentiles of the reference."""
BIN_WIDTH = 1e-4
"""Percentiles are read from a histogram of this bin width over [−1, 1]: their error is at most half of it."""
NUM_BINS = 20_000


def cos_sim(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Cosine of each pair, shape (B,), float32, in [−1, 1]. A zero vector raises InputError."""
    a_BD, b_BD = a_BD.float(), b_BD.float()
    dot_B = (a_BD * b_BD).sum(dim=1)
    norm_B = torch.linalg.vector_norm(a_BD, dim=1) * torch.linalg.vector_norm(b_BD, dim=1)
    if (zero := torch.nonzero(norm_B == 0)).numel():
        raise InputError(f"pair {int(zero[0])} of the batch has a zero vector, whose cosine has no meaning")
    return (dot_B / norm_B).clamp(-1.0, 1.0)


@dataclass(frozen=True, slots=True)
class AlignmentCounts:
    """Sums over one shard; `a + b` merges them; divide once, at the end."""

    pairs: int = 0
    """Number of pairs."""
    cos_sum: float = 0.0
    """Sum of cosines, float64."""
    cos_sum_sq: float = 0.0
    """Sum of squared cosines, float64."""
    cos_min: float = float("inf")
    """Smallest cosine."""
    cos_max: float = float("-inf")
    """Largest cosine."""
    accepted: tuple[int, ...] = (0,) * len(THETAS)
    """Pairs with cos_sim > θ (strict), for each of `THETAS`."""
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    """Pairs in each bin of `BIN_WIDTH`, shape (K,)."""

    @staticmethod
    def of(cos_B: Tensor | NDArray[Any]) -> "AlignmentCounts":
        """Counts of some cosines, shape (B,). One that is not finite raises InputError."""
        cos = np.asarray(cos_B.detach().cpu() if isinstance(cos_B, Tensor) else cos_B)
        if not np.isfinite(cos).all():
            raise InputError(f"{np.count_nonzero(~np.isfinite(cos))} of {cos.size} cosines are not finite")
        if not cos.size:
            return AlignmentCounts()
        wide = cos.astype(np.float64)
        bins = np.clip(np.floor((wide + 1.0) / BIN_WIDTH).astype(np.int64), 0, NUM_BINS - 1)
        return AlignmentCounts(
            pairs=cos.size,
            cos_sum=float(wide.sum()),
            cos_sum_sq=float((wide * wide).sum()),
            cos_min=float(wide.min()),
            cos_max=float(wide.max()),
            accepted=tuple(int((cos > cos.dtype.type(theta)).sum()) for theta in THETAS),
            histogram=np.bincount(bins, minlength=NUM_BINS),
        )

    def __add__(self, other: "AlignmentCounts") -> "AlignmentCounts":
        return AlignmentCounts(
            pairs=self.pairs + other.pairs,
            cos_sum=self.cos_sum + other.cos_sum,
            cos_sum_sq=self.cos_sum_sq + other.cos_sum_sq,
            cos_min=min(self.cos_min, other.cos_min),
            cos_max=max(self.cos_max, other.cos_max),
            accepted=tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True)),
            histogram=self.histogram + other.histogram,
        )

    def pack(self) -> tuple[Tensor, Tensor]:
        """Two float64 vectors for all_reduce: one to SUM, one to MAX. Counts below 2⁵³ stay exact."""
        sums = [self.pairs, self.cos_sum, self.cos_sum_sq, *self.accepted]
        return (
            torch.cat([torch.tensor(sums, dtype=torch.float64), torch.from_numpy(self.histogram).double()]),
            torch.tensor([-self.cos_min, self.cos_max], dtype=torch.float64),
        )

    @staticmethod
    def unpack(sums: Tensor, maxima: Tensor) -> "AlignmentCounts":
        """The inverse of `pack`."""
        head, histogram = sums[: 3 + len(THETAS)].tolist(), sums[3 + len(THETAS) :]
        return AlignmentCounts(
            pairs=round(head[0]),
            cos_sum=head[1],
            cos_sum_sq=head[2],
            cos_min=-float(maxima[0]),
            cos_max=float(maxima[1]),
            accepted=tuple(round(a) for a in head[3:]),
            histogram=histogram.round().long().cpu().numpy(),
        )

    def accept_rate(self, theta: float = THETA) -> float:
        """Share of pairs with cos_sim > θ, which is one of `THETAS`."""
        return self.accepted[THETAS.index(theta)] / self.pairs

    def percentile(self, percent: float) -> float:
        """Cosine that `percent` of the pairs are below: the middle of its bin, clipped to min and max."""
        rank = percent / 100 * (self.pairs - 1)
        bin_number = int(np.searchsorted(np.cumsum(self.histogram), np.floor(rank), side="right"))
        middle = -1.0 + (bin_number + 0.5) * BIN_WIDTH
        return float(np.clip(middle, self.cos_min, self.cos_max))

    def means(self) -> dict[str, Any]:
        """cos_sim_mean, _std (population), _min, _max, cosine_accept_rate by θ, percentiles. Needs a pair."""
        assert self.pairs, "no pairs, no means"
        mean = self.cos_sum / self.pairs
        return {
            "pairs": self.pairs,
            "cos_sim_mean": mean,
            "cos_sim_std": max(self.cos_sum_sq / self.pairs - mean * mean, 0.0) ** 0.5,
            "cos_sim_min": self.cos_min,
            "cos_sim_max": self.cos_max,
            "cosine_accept_rate": {
                rate_key(theta): n / self.pairs for theta, n in zip(THETAS, self.accepted, strict=True)
            },
            "percentiles": {f"P{percent}": self.percentile(percent) for percent in PERCENTILES},
        }


def retrieval(similarity_NN: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """R@k: share of rows whose own column is among the k largest. Ties count against the row.

    `chance_R@1` is 1 / N. `similarity_NN`: row = aligned feature, column = target.
    """
    own_N1 = similarity_NN.diagonal()[:, None]
    ahead_N = (similarity_NN >= own_N1).sum(dim=1) - 1
    rates = {f"R@{k}": float((ahead_N < k).double().mean()) for k in ks}
    return {**rates, "chance_R@1": 1.0 / len(similarity_NN)}
