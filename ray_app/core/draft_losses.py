"""Losses of a drafter's distribution against the target's, position by position.

A drafter may say some tokens of the vocabulary only, the ids of a reduced head; the target's distribution is
renormalised over them. Acceptance α = Σ min(p, q) is the chance that a token drawn from q survives verification
(Leviathan et al., arXiv 2211.17192).

Shapes: B = pairs, L = positions of an answer, I = ids of the reduced head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GAMMA = 8
"""Drafted tokens of a pass where tokens per target pass are counted or learnt."""
LEAST = 1e-8
"""Probabilities are at least this where their logarithm is taken."""
LK_ETA = 3.0
"""How fast the hybrid loss turns from KL to acceptance (arXiv 2602.23881)."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Distributions of a drafter and of the target at each position of some answers."""

    log_q_BLI: Tensor
    """Logarithms of the drafter's probabilities."""
    p_BLI: Tensor
    """The target's probabilities, which sum to one at used positions."""
    chosen_BL: Tensor
    """Place of the target's own token among the ids; −1 where it is none of them."""
    used_BL: Tensor
    """Positions that an answer has, bool."""

    @property
    def right_BL(self) -> Tensor:
        """Positions at which the drafter's likeliest token is the target's own, bool."""
        return self.used_BL & (self.log_q_BLI.argmax(dim=2) == self.chosen_BL)


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """Weights of the losses of a position; a pair's loss is the mean over its answer's positions."""

    kl: float = 0.0
    """Weight of KL(p ‖ q): every token that the target may say counts."""
    reverse_kl: float = 0.0
    """Weight of KL(q ‖ p): what the drafter says should be likely."""
    acceptance: float = 0.0
    """Weight of 1 − α."""
    lk: float = 0.0
    """Weight of λ KL + (1 − λ)(1 − α) with λ = exp(−3 α), in which KL gives way to acceptance."""
    accepted_length: float = 0.0
    """Weight of the expected share of a draft that is not accepted."""
    cross_entropy: float = 0.0
    """Weight of −log q of the target's own token."""

    @property
    def needs_drafter(self) -> bool:
        """True if a loss has a weight, so that the drafter must be run."""
        return any(getattr(self, name) for name in DRAFT_LOSSES)


def acceptance_rate(each: Positions) -> Tensor:
    """Return α of each position, (B, L)."""
    return torch.minimum(each.p_BLI, each.log_q_BLI.exp()).sum(dim=2)


def kl(each: Positions) -> Tensor:
    """Return KL(p ‖ q) of each position, (B, L)."""
    return (torch.xlogy(each.p_BLI, each.p_BLI) - each.p_BLI * each.log_q_BLI).sum(dim=2)


def reverse_kl(each: Positions) -> Tensor:
    """Return KL(q ‖ p) of each position, (B, L); p is at least `LEAST`."""
    log_p_BLI = each.p_BLI.clamp(min=LEAST).log()
    return (each.log_q_BLI.exp() * (each.log_q_BLI - log_p_BLI)).sum(dim=2)


def acceptance(each: Positions) -> Tensor:
    """Return 1 − α of each position, (B, L)."""
    return 1.0 - acceptance_rate(each)


def lk(each: Positions) -> Tensor:
    """Return the hybrid of KL and acceptance of each position, (B, L); λ has no gradient."""
    rejected_BL = acceptance(each)
    share_BL = torch.exp(-LK_ETA * (1.0 - rejected_BL.detach()))
    return share_BL * kl(each) + (1.0 - share_BL) * rejected_BL


def accepted_length(each: Positions) -> Tensor:
    """Return the expected share of γ tokens drafted from each position that is not accepted, (B, L).

    Token k of a draft is accepted with Π α over tokens 1 to k, so early tokens weigh more than late ones. Behind the
    end of an answer nothing is lost.
    """
    used_BLK = F.pad(each.used_BL, (0, GAMMA - 1)).unfold(1, GAMMA, 1)
    alpha_BLK = F.pad(acceptance_rate(each), (0, GAMMA - 1)).unfold(1, GAMMA, 1)
    return ((1.0 - alpha_BLK.cumprod(dim=2)) * used_BLK).sum(dim=2) / GAMMA


def cross_entropy(each: Positions) -> Tensor:
    """Return −log q of the target's own token, (B, L); 0 where the drafter has no such token."""
    chosen_BL1 = each.chosen_BL.clamp(min=0)[:, :, None]
    return -each.log_q_BLI.gather(2, chosen_BL1)[:, :, 0] * (each.chosen_BL >= 0)


DRAFT_LOSSES: Mapping[str, Callable[[Positions], Tensor]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "acceptance": acceptance,
    "lk": lk,
    "accepted_length": accepted_length,
    "cross_entropy": cross_entropy,
}
"""Every loss by its name in `DraftWeights`."""


def draft_loss(each: Positions, weights: DraftWeights) -> Tensor:
    """Return the weighted losses of each pair, (B,): means over the positions of its answer."""
    total_BL = torch.zeros_like(each.used_BL, dtype=each.log_q_BLI.dtype)
    for name, loss in DRAFT_LOSSES.items():
        if weight := getattr(weights, name):
            total_BL = total_BL + weight * loss(each)
    return (total_BL * each.used_BL).sum(dim=1) / each.used_BL.sum(dim=1).clamp(min=1)
