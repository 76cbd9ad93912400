"""The losses of pairs whose features are divided over workers: from sums over each worker's columns.

Every worker has the whole batch and ends up with the same losses, so nothing is added over pairs afterwards.

Shapes: A, B = pairs, D = columns of this worker.
"""

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.losses import EPSILON, AlignmentObjective, LossWeights


class SlicedObjective(AlignmentObjective):
    """The objective of an adapter that holds a slice of the features; images and sequences must be whole."""

    def __init__(self, adapter: Adapter, weights: LossWeights, mean_target_D: Tensor | None = None) -> None:
        """`mean_target_D`: mean training target, this worker's columns."""
        super().__init__(adapter, weights, mean_target_D=mean_target_D)
        assert not self.token_width, "the cosine of a sequence is a mean over its tokens"
        self.part = adapter.part

    def cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> Tensor:
        return cosine_of(*self.part.sum(torch.stack(products(aligned_BD, target_BD))))

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of all parameters: those of slices added over workers, the others counted once."""
        divided = {f"adapter.{name}" for name in self.adapter.slices()}
        own, common = (
            nn.utils.get_total_norm(
                [p.grad for name, p in self.named_parameters() if p.grad is not None and (name in divided) == is_own]
            )
            for is_own in (True, False)
        )
        return (self.part.all_reduce(own.square()) + common.square()).sqrt()

    def _mse_and_cosine(self, aligned_BD: Tensor, target_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Both from one all-reduce."""
        error_B = (aligned_BD - target_BD).square().sum(dim=1)
        error_B, *sums = self.part.sum(torch.stack([error_B, *products(aligned_BD, target_BD)]))
        return error_B / self.adapter.config.target_dim, cosine_of(*sums)

    def _cosine_matrix(self, aligned_AD: Tensor, target_BD: Tensor) -> Tensor:
        dot_AB = aligned_AD @ target_BD.T
        parts = dot_AB.flatten(), aligned_AD.square().sum(dim=1), target_BD.square().sum(dim=1)
        dot, aligned_A, target_B = self.part.sum(torch.cat(parts)).split([len(part) for part in parts])
        return cosine_of(dot.view_as(dot_AB), aligned_A[:, None], target_B)


def products(a_BD: Tensor, b_BD: Tensor) -> list[Tensor]:
    """Sums of a · b, a · a and b · b over the columns, each (B,)."""
    return [(a_BD * b_BD).sum(dim=1), a_BD.square().sum(dim=1), b_BD.square().sum(dim=1)]


def cosine_of(dot: Tensor, a_square: Tensor, b_square: Tensor) -> Tensor:
    """Cosine from sums over all columns, safe to differentiate at zero vectors."""
    a_norm, b_norm = (square.clamp(min=EPSILON**2).sqrt() for square in (a_square, b_square))
    return dot / (a_norm * b_norm)
