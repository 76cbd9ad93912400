"""The metrics of speculative decoding by the field's names, as counts, and what they are worth in time.

Shapes: S = sequences or blocks of rows, M = metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Sums over target passes; `a + b` merges them; divide once, at the end."""

    num_drafts: int = 0
    """Target passes, those without a drafted token included."""
    num_draft_tokens: int = 0
    """Tokens drafted."""
    num_accepted_tokens: int = 0
    """Drafted tokens that the target accepted."""
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    """Number of drafts whose token at each place was accepted."""
    num_rejections: int = 0
    """Passes in which a drafted token was rejected: the tokens behind it were never judged."""

    @staticmethod
    def of(drafted: list[int], accepted: list[int], gamma: int) -> "DraftCounts":
        """Count of passes, each with so many drafted and accepted tokens, at most γ."""
        accepted_M = np.asarray(accepted, dtype=np.int64)
        return DraftCounts(
            num_drafts=len(drafted),
            num_draft_tokens=sum(drafted),
            num_accepted_tokens=int(accepted_M.sum()),
            num_accepted_tokens_per_pos=tuple(int((accepted_M > place).sum()) for place in range(gamma)),
            num_rejections=int((accepted_M < np.asarray(drafted, dtype=np.int64)).sum()),
        )

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        mine, yours = self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos
        places = max(len(mine), len(yours))
        mine, yours = (per_pos + (0,) * (places - len(per_pos)) for per_pos in (mine, yours))
        return DraftCounts(
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            tuple(a + b for a, b in zip(mine, yours, strict=True)),
            self.num_rejections + other.num_rejections,
        )

    @property
    def draft_acceptance_rate(self) -> float:
        """num_accepted_tokens / num_draft_tokens; 0 without a drafted token."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """τ = 1 + num_accepted_tokens / num_drafts: the token that the target adds to every pass is included."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def alpha(self) -> float:
        """α, the acceptance rate of verified tokens: num_accepted_tokens / (num_accepted_tokens + num_rejections).

        It differs from draft_acceptance_rate, which also counts tokens after a rejection.
        """
        judged = self.num_accepted_tokens + self.num_rejections
        return self.num_accepted_tokens / judged if judged else 0.0


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens per target pass, (1 − α^(γ+1)) / (1 − α), where each token is accepted with chance α, independently."""
    if not 0.0 <= alpha <= 1.0 or gamma < 0:
        raise InputError(f"α is a chance and γ a number of tokens; given: α = {alpha}, γ = {gamma}.")
    return float(gamma + 1) if alpha == 1.0 else (1.0 - alpha ** (gamma + 1)) / (1.0 - alpha)


def expected_improvement(alpha: float, gamma: int, cost_coefficient: float) -> float:
    """Return the speed-up of decoding, (1 − α^(γ+1)) / ((1 − α)(γc + 1)).

    c is the time of a drafted token over that of a target pass.
    """
    if cost_coefficient < 0.0:
        raise InputError(f"the cost coefficient is a ratio of times, at least 0; given: {cost_coefficient}.")
    return expected_tokens(alpha, gamma) / (gamma * cost_coefficient + 1.0)


def break_even_alpha(gamma: int, cost_per_pass: float) -> float | None:
    """Return the least α at which passes pay that cost `cost_per_pass` plain target steps each; None: at no α."""
    if cost_per_pass <= 1.0:
        return 0.0
    if cost_per_pass > gamma + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, gamma) < cost_per_pass else (low, middle)
    return high


def block_bootstrap(
    sums_SM: NDArray[np.floating],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    rng: np.random.Generator,
    num_samples: int = 1000,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the 95 % interval of `statistic` when whole sequences are resampled: rows of one are not independent.

    `sums_SM` holds each sequence's sums; `statistic` takes totals over sequences, shape (samples, M), and gives
    what is wanted for each. InputError: fewer than two sequences.
    """
    num_blocks = len(sums_SM)
    if num_blocks < 2:
        raise InputError(f"an interval over sequences needs at least two of them; there is {num_blocks}.")
    weights = rng.multinomial(num_blocks, np.full(num_blocks, 1.0 / num_blocks), size=num_samples)
    drawn = statistic(weights.astype(np.float64) @ np.asarray(sums_SM, dtype=np.float64))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high
