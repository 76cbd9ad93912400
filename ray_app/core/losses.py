"""Losses per pair, so that any division of a batch adds up to the same mean.

Shapes: B = pairs of this worker (may be 0), G = pairs of the global batch, D = feature width. Losses are float32,
under autocast too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.sequences import next_position_cosine, sequence_cosine, sequence_cosines, sequence_mse
from ray_app.core.augmentation import Augmentation
from ray_app.core.metrics import THETA

EPSILON = 1e-8
"""Smallest norm that is divided by: an adapter's output may be zero early on."""
INITIAL_TEMPERATURE = 0.07
"""Initial value of the learned temperature of the contrastive loss (CLIP, arXiv 2103.00020)."""

GatherPairs = Callable[[Tensor], tuple[Tensor, int]]
"""From a worker's rows (B, D) to those of all workers (G, D), with gradients, and the place of its first one."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the losses of a pair."""

    mse: float = 1.0
    """Weight of the mean squared error."""
    cosine: float = 0.5
    """Weight of 1 − cosine."""
    contrastive: float = 0.0
    """Weight of the symmetric contrastive loss."""
    mse_space: Literal["raw", "unit"] = "raw"
    """`raw`: on the features themselves. `unit`: on unit vectors, as the reference (about 1e-6)."""
    accept: float = 0.0
    """Weight of the soft rejection at θ: sigmoid((θ − cosine) / temperature)."""
    accept_thetas: tuple[float, ...] = (THETA,)
    """Each θ of the soft rejection; their losses are averaged."""
    accept_temperature: float = 0.05
    """Width of the transition: cosines this far from θ on either side still differ in loss."""
    centred: float = 0.0
    """Weight of 1 − centred cosine: the mean training target taken off both sides."""
    next_position: float = 0.0
    """For sequences: weight of 1 − cosine of each aligned token with the target's next one."""


def mse_per_pair(aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Mean over D of the squared difference, shape (B,)."""
    return (aligned_BD - target_BD).square().mean(dim=1)


def cosine_per_pair(aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Cosine of each pair, shape (B,), safe to differentiate at zero vectors."""
    return nn.functional.cosine_similarity(aligned_BD, target_BD, dim=1, eps=EPSILON)


def rejection_per_pair(cos_B: Tensor, thetas: tuple[float, ...], temperature: float) -> Tensor:
    """Soft rejection of each pair, between 0 and 1, mean over the thetas, shape (B,)."""
    return torch.stack([torch.sigmoid((theta - cos_B) / temperature) for theta in thetas]).mean(dim=0)


def contrastive_per_pair(cos_BG: Tensor, cos_GB: Tensor, first: int, log_temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE in the manner of CEIA, shape (B,) (InfoNCE: arXiv 1807.03748).

    Row = aligned feature, column = target: `cos_BG` those of this worker with all targets, `cos_GB` all of them with
    its targets. `first`: place of its first pair in the global batch, whose other pairs are a pair's negatives.
    """
    logits_BG, logits_GB = cos_BG / log_temperature.exp(), cos_GB / log_temperature.exp()
    own_B = logits_BG.diagonal(first)
    return (logits_BG.logsumexp(dim=1) + logits_GB.logsumexp(dim=0)) / 2 - own_B


class AlignmentObjective(nn.Module):
    """An adapter with its losses: what is trained, and what DDP wraps."""

    def __init__(
        self,
        adapter: Adapter,
        weights: LossWeights,
        augmentation: Augmentation | None = None,
        mean_target_D: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.adapter, self.weights, self.augmentation = adapter, weights, augmentation
        shape = adapter.config.target_shape
        self.token_width = shape[1] if len(shape) == 2 else None
        self.log_temperature: nn.Parameter | None = None
        if weights.contrastive > 0:
            self.log_temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE).log())
        assert mean_target_D is not None or not weights.centred, "the centred cosine needs the mean training target"
        self.mean_target: Tensor | None
        self.register_buffer("mean_target", mean_target_D, persistent=False)
        self.gather_pairs: GatherPairs = lambda own_BD: (own_BD, 0)
        """Brings the pairs of all workers together, where there are several."""

    def forward(self, event_BE: Tensor, target_BD: Tensor, noise: BatchNoise | None = None) -> dict[str, Tensor]:
        """`loss`, `mse`, `cos_sim` and, if weighted, `contrastive`, each (B,); only `loss` has a gradient."""
        if self.training and self.augmentation is not None:
            assert noise is not None, "augmentation has its noise passed in"
            event_BE, target_BD = self.augmentation(event_BE, target_BD, noise)
        aligned_BD = self.adapter(event_BE, noise)
        with torch.autocast(aligned_BD.device.type, enabled=False):
            return self.losses(aligned_BD.float(), target_BD.float())

    def cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        """Cosine of each pair, shape (B,); of sequences the mean over the target's tokens."""
        if self.token_width:
            return sequence_cosine(aligned_BD, target_BD, self.token_width)
        return cosine_per_pair(aligned_BD, target_BD)

    def losses(self, aligned_BD: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """Losses of aligned features, with the keys of `forward`."""
        # The order of these four decides the order in which autograd adds their gradients, and so the last bits.
        weights, width = self.weights, self.token_width
        centred_B = self._centred_cosine(aligned_BD, target_BD) if weights.centred else None
        contrastive_B = self._contrastive(aligned_BD, target_BD) if self.log_temperature is not None else None
        mse_B, cos_B = self._mse_and_cosine(aligned_BD, target_BD)
        if weights.mse_space == "unit":  # |a/|a| − b/|b||² / D = 2 (1 − cos) / D
            mse_B = 2.0 * (1.0 - cos_B) / self.adapter.config.target_dim
        loss_B = weights.mse * mse_B + weights.cosine * (1.0 - cos_B)
        parts = {"mse": mse_B.detach(), "cos_sim": cos_B.detach()}
        if weights.accept:
            rejected_B = rejection_per_pair(cos_B, weights.accept_thetas, weights.accept_temperature)
            loss_B = loss_B + weights.accept * rejected_B
        if centred_B is not None:
            loss_B = loss_B + weights.centred * (1.0 - centred_B)
        if weights.next_position:
            assert width, "only sequences have a next position"
            loss_B = loss_B + weights.next_position * (1.0 - next_position_cosine(aligned_BD, target_BD, width))
        if contrastive_B is not None:
            loss_B = loss_B + weights.contrastive * contrastive_B
            parts["contrastive"] = contrastive_B.detach()
        return {"loss": loss_B, **parts}

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of all parameters."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def _mse_and_cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> tuple[Tensor, Tensor]:
        width = self.token_width
        mse_B = sequence_mse(aligned_BD, target_BD, width) if width else mse_per_pair(aligned_BD, target_BD)
        return mse_B, self.cosine(aligned_BD, target_BD)

    def _centred_cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        assert self.mean_target is not None
        return self.cosine(aligned_BD - self.mean_target, target_BD - self.mean_target)

    def _contrastive(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        assert self.log_temperature is not None
        aligned_GD, first = self.gather_pairs(aligned_BD)
        target_GD, _ = self.gather_pairs(target_BD)
        cos_BG = self._cosine_matrix(aligned_BD, target_GD)
        cos_GB = cos_BG if aligned_GD is aligned_BD else self._cosine_matrix(aligned_GD, target_BD)
        return contrastive_per_pair(cos_BG, cos_GB, first, self.log_temperature)

    def _cosine_matrix(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        """Cosine of each aligned feature (row) with each target (column); see `cosine`."""
        unit = nn.functional.normalize
        if self.token_width:
            return sequence_cosines(aligned_BD, target_BD, self.token_width)
        return unit(aligned_BD, dim=1, eps=EPSILON) @ unit(target_BD, dim=1, eps=EPSILON).T
