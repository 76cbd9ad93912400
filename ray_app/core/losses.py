"""Losses per pair, so that any division of a batch adds up to the same mean.

Shapes: B = pairs at hand (may be 0), D = feature width. Losses are float32, under autocast too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ray_app.core.adapters.compressed_space import MeanProducts, products, similarity
from ray_app.core.adapters.lowrank import SubspaceAdapter
from ray_app.core.adapters.registry import Adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.sequences import next_position_cosine, sequence_cosine, sequence_mse
from ray_app.core.augmentation import Augmentation
from ray_app.core.metrics import THETA

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
    accept: float = 0.0
    """Weight of the soft rejection at θ: sigmoid((θ − cosine) / temperature)."""
    accept_thetas: tuple[float, ...] = (THETA,)
    """Each θ of it; their losses are averaged."""
    accept_temperature: float = 0.05
    """Cosines this far from θ on either side are still told apart."""
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
    """How surely a pair is not accepted, between 0 and 1, mean over the thetas, shape (B,)."""
    return torch.stack([torch.sigmoid((theta - cos_B) / temperature) for theta in thetas]).mean(dim=0)


def contrastive_per_pair(cos_BB: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE in the manner of CEIA, shape (B,) (InfoNCE: arXiv 1807.03748).

    `cos_BB`: row = aligned feature, column = target. A pair's negatives are the other pairs at hand: on W workers,
    those of the same worker.
    """
    logits_BB = cos_BB / log_temperature.exp()
    own_B = logits_BB.diagonal()
    return (logits_BB.logsumexp(dim=1) + logits_BB.logsumexp(dim=0)) / 2 - own_B


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What all losses are made of."""

    mse: Tensor
    """Mean squared difference of each pair, (B,)."""
    cos: Tensor
    """Cosine of each pair, (B,)."""
    centred: Tensor | None
    """Centred cosine of each pair, (B,), if weighted."""
    cos_BB: Tensor | None
    """Cosine of each aligned feature with each target, if the contrastive loss is weighted."""


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

    def forward(self, event_BE: Tensor, target_BD: Tensor, noise: BatchNoise | None = None) -> dict[str, Tensor]:
        """`loss`, `mse`, `cos_sim` and, if weighted, `contrastive`, each (B,); only `loss` has a gradient."""
        if self.training and self.augmentation is not None:
            assert noise is not None, "augmentation has its noise passed in"
            event_BE, target_BD = self.augmentation(event_BE, target_BD, noise)
        aligned_BD = self.align(event_BE, noise)
        with torch.autocast(aligned_BD.device.type, enabled=False):
            return self.losses(aligned_BD.float(), target_BD.float())

    def align(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        """What `losses` and `cosine` take as aligned."""
        return self.adapter(event_BE, noise)

    def cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        """Cosine of each pair, shape (B,); of sequences the mean over the target's tokens."""
        if self.token_width:
            return sequence_cosine(aligned_BD, target_BD, self.token_width)
        return cosine_per_pair(aligned_BD, target_BD)

    def measure(self, aligned_BD: Tensor, target_BD: Tensor) -> LossTerms:
        """All that the weighted losses need."""
        weights, width, centred_B, cos_BB = self.weights, self.token_width, None, None
        if weights.centred:
            assert self.mean_target is not None
            assert not width, "the mean target of sequences is not that of a start"
            centred_B = cosine_per_pair(aligned_BD - self.mean_target, target_BD - self.mean_target)
        if self.log_temperature is not None:
            unit = nn.functional.normalize
            cos_BB = unit(aligned_BD, dim=1, eps=EPSILON) @ unit(target_BD, dim=1, eps=EPSILON).T
        mse_B = sequence_mse(aligned_BD, target_BD, width) if width else mse_per_pair(aligned_BD, target_BD)
        return LossTerms(mse_B, self.cosine(aligned_BD, target_BD), centred_B, cos_BB)

    def losses(self, aligned_BD: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """The same of aligned features."""
        weights, found = self.weights, self.measure(aligned_BD, target_BD)
        mse_B = found.mse
        if weights.mse_space == "unit":  # |a/|a| − b/|b||² / D = 2 (1 − cos) / D
            mse_B = 2.0 * (1.0 - found.cos) / self.adapter.config.target_dim
        loss_B = weights.mse * mse_B + weights.cosine * (1.0 - found.cos)
        parts = {"mse": mse_B.detach(), "cos_sim": found.cos.detach()}
        if weights.accept:
            rejected_B = rejection_per_pair(found.cos, weights.accept_thetas, weights.accept_temperature)
            loss_B = loss_B + weights.accept * rejected_B
        if found.centred is not None:
            loss_B = loss_B + weights.centred * (1.0 - found.centred)
        if weights.next_position:
            assert self.token_width, "only sequences have a next position"
            next_B = next_position_cosine(aligned_BD, target_BD, self.token_width)
            loss_B = loss_B + weights.next_position * (1.0 - next_B)
        if found.cos_BB is not None and self.log_temperature is not None:
            contrastive_B = contrastive_per_pair(found.cos_BB, self.log_temperature)
            loss_B = loss_B + weights.contrastive * contrastive_B
            parts["contrastive"] = contrastive_B.detach()
        return {"loss": loss_B, **parts}


class CompressedObjective(AlignmentObjective):
    """The same of pairs in a few numbers (`compressed_space.py`): equal losses, without touching the full width.

    Takes event coordinates for features, records for targets, and gives core outputs for aligned features.
    """

    adapter: SubspaceAdapter
    _mean: MeanProducts | None = None

    def mean(self) -> MeanProducts:
        """Taken at the first pair: the adapter's mean and basis are loaded by then, and on their device."""
        if self._mean is None:
            self._mean = MeanProducts.of(self.adapter)
        return self._mean

    def align(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        return self.adapter.core(event_BE, noise)

    def cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        found = products(self.adapter, self.mean(), aligned_BD, target_BD)
        return _ratio(found.dot, found.aligned_sq, found.target_sq)

    def measure(self, aligned_BD: Tensor, target_BD: Tensor) -> LossTerms:
        found = products(self.adapter, self.mean(), aligned_BD, target_BD)
        centred_B = cos_BB = None
        if self.weights.centred:
            centred_B = _ratio(found.centred_dot, found.centred_aligned_sq, found.centred_target_sq)
        if self.log_temperature is not None:
            cos_BB = similarity(self.adapter, self.mean(), aligned_BD, target_BD)
        difference_sq = found.aligned_sq - 2 * found.dot + found.target_sq
        return LossTerms(
            difference_sq / self.adapter.config.target_dim,
            _ratio(found.dot, found.aligned_sq, found.target_sq),
            centred_B,
            cos_BB,
        )


def _ratio(dot_B: Tensor, a_sq_B: Tensor, b_sq_B: Tensor) -> Tensor:
    """dot / (|a| |b|), safe to differentiate at zero vectors."""
    return dot_B / (a_sq_B.clamp(min=EPSILON**2).sqrt() * b_sq_B.clamp(min=EPSILON**2).sqrt())
