"""Tokens per target pass of a drafter's part along answers, next to baselines, with paired intervals.

Shapes: N = answers, R = resamples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.core.bootstrap import interval95, resampled_means, resampled_units

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DraftEvaluation:
    """Counts of every answer, each of shape (N,) in the order of the answers."""

    sequences: tuple[str, ...]
    """Drive of each answer."""
    tokens_N: Counts
    """Tokens of each answer, which are the target's own whatever drafts."""
    passes_N: Counts
    """Target passes that it takes."""
    cos_N: Counts
    """Mean cosine of the shown and the target's image tokens."""
    baselines: dict[str, Counts]
    """Target passes with each baseline, at least with one."""
    seed: int = 0
    """Seed of the resampling."""

    def rate(self, passes_N: Counts) -> float:
        """Tokens per target pass of all answers."""
        return float(self.tokens_N.sum() / passes_N.sum())

    def resampled(self, passes_N: Counts) -> Counts:
        """Tokens per target pass in every resample of whole sequences, (R,): the same resamples for all passes."""
        _, units = resampled_units(self.sequences)
        means_RC = resampled_means(units, [self.tokens_N, passes_N], self.seed)
        return means_RC[:, 0] / means_RC[:, 1]

    def gain_over(self, passes_N: Counts) -> dict[str, Any]:
        """Difference in tokens per target pass to other passes of the same answers, with its paired interval."""
        drawn_R = self.resampled(self.passes_N) - self.resampled(passes_N)
        return {"difference": self.rate(self.passes_N) - self.rate(passes_N), "interval95": interval95(drawn_R)}

    def metrics(self) -> dict[str, Any]:
        """All metrics as JSON values; `gain` is over the best baseline, which each resample chooses again."""
        rates = {name: self.rate(passes_N) for name, passes_N in self.baselines.items()}
        best = max(rates, key=rates.__getitem__)
        best_R = np.max([self.resampled(passes_N) for passes_N in self.baselines.values()], axis=0)
        own_R, own = self.resampled(self.passes_N), self.rate(self.passes_N)
        return {
            "tokens_per_target_pass": own,
            "interval95": {"tokens_per_target_pass": interval95(own_R), "gain": interval95(own_R - best_R)},
            "baselines": rates,
            "best_baseline": best,
            "gain": own - rates[best],
            "cos_sim_mean": float(self.cos_N.mean()),
            "pairs": len(self.tokens_N),
            "unit": resampled_units(self.sequences)[0],
        }
