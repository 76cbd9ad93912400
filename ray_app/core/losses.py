"""Losses per pair, so that any division of a batch adds up to the same mean.

Shapes: B = pairs at hand (may be 0), D = feature width. Losses are float32, under autocast too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ray_app.core.adapter import Adapter
from ray_app.core.noise import BatchNoise

EPSILON = 1e-8
"""Smallest norm that is divided by: an adapter's output may be zero early on."""
INITIAL_TEMPERATURE = 0.07
"""Where the learned temperature of the contrastive loss starts (CLIP, arXiv 2103.00020)."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How the losses of a pair are added."""

    mse: float = 1.0
    """Weight of the mean squared error."""
    cosine: float = 0.5
    """Weight of 1 − cosine."""
    contrastive: float = 0.0
    """Weight of the symmetric contrastive loss."""
    mse_space: Literal["raw", "unit"] = "raw"
    """`raw`: on the features themselves. `unit`: on unit vectors, as the reference (about 1e-6)."""


def mse_per_pair(aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Mean over D of the squared difference, shape (B,)."""
    return (aligned_BD - target_BD).square().mean(dim=1)


def cosine_per_pair(aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Cosine of each pair, shape (B,), safe to differentiate at zero vectors."""
    return nn.functional.cosine_similarity(aligned_BD, target_BD, dim=1, eps=EPSILON)


def contrastive_per_pair(aligned_BD: Tensor, target_BD: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE in the manner of CEIA, shape (B,) (InfoNCE: arXiv 1807.03748).

    A pair's negatives are the other pairs at hand: on W workers, those of the same worker.
    """
    aligned_BD = nn.functional.normalize(aligned_BD, dim=1, eps=EPSILON)
    target_BD = nn.functional.normalize(target_BD, dim=1, eps=EPSILON)
    logits_BB = aligned_BD @ target_BD.T / log_temperature.exp()
    own_B = logits_BB.diagonal()
    return (logits_BB.logsumexp(dim=1) + logits_BB.logsumexp(dim=0)) / 2 - own_B


class AlignmentObjective(nn.Module):
    """An adapter with its losses: what is trained, and what DDP wraps."""

    def __init__(self, adapter: Adapter, weights: LossWeights) -> None:
        super().__init__()
        self.adapter, self.weights = adapter, weights
        self.log_temperature: nn.Parameter | None = None
        if weights.contrastive > 0:
            self.log_temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE).log())

    def forward(self, event_BE: Tensor, target_BD: Tensor, noise: BatchNoise | None = None) -> dict[str, Tensor]:
        """`loss`, `mse`, `cos_sim` and, if weighted, `contrastive`, each (B,); only `loss` has a gradient."""
        aligned_BD = self.adapter(event_BE, noise)
        with torch.autocast(aligned_BD.device.type, enabled=False):
            return self.losses(aligned_BD.float(), target_BD.float())

    def losses(self, aligned_BD: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """The same of aligned features."""
        cos_B = cosine_per_pair(aligned_BD, target_BD)
        if self.weights.mse_space == "raw":
            mse_B = mse_per_pair(aligned_BD, target_BD)
        else:  # |a/|a| − b/|b||² / D = 2 (1 − cos) / D
            mse_B = 2.0 * (1.0 - cos_B) / target_BD.shape[1]
        loss_B = self.weights.mse * mse_B + self.weights.cosine * (1.0 - cos_B)
        parts = {"mse": mse_B.detach(), "cos_sim": cos_B.detach()}
        if self.log_temperature is not None:
            contrastive_B = contrastive_per_pair(aligned_BD, target_BD, self.log_temperature)
            loss_B = loss_B + self.weights.contrastive * contrastive_B
            parts["contrastive"] = contrastive_B.detach()
        return {"loss": loss_B, **parts}
