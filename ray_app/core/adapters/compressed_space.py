"""Pairs of a subspace adapter in a few numbers, from which its losses and metrics follow exactly.

With orthonormal bases, aligned = mean + target basis · c + ρ · event has products with a target y that are sums of
products of short vectors: nothing of width D is touched. A pair of 150,528 + 150,528 numbers becomes 3 R + 5.

Shapes: B = pairs, E = event width, D = target width, R = rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_app.core.adapters.base import InitStats
from ray_app.core.adapters.initialization import coordinates
from ray_app.core.adapters.lowrank import SubspaceAdapter

SCALARS = 5
"""|y|², mean · y, event · y, |event|², mean · event."""


def compress(event_BE: Tensor, target_BD: Tensor, start: InitStats) -> tuple[Tensor, Tensor]:
    """(event coordinates (B, R), what a target's products follow from (B, 2 R + 5)).

    Where E ≠ D there is no residual connection, and what would belong to it is 0.
    """
    mean_D, basis_DR = start["target_mean"], start["target_basis"]
    zeros_B = target_BD.new_zeros(len(target_BD))
    same = event_BE.shape == target_BD.shape
    scalars = [
        target_BD.square().sum(dim=1),
        target_BD @ mean_D,
        (event_BE * target_BD).sum(dim=1) if same else zeros_B,
        event_BE.square().sum(dim=1),
        event_BE @ mean_D if same else zeros_B,
    ]
    of_event_BR = event_BE @ basis_DR if same else target_BD.new_zeros(len(target_BD), basis_DR.shape[1])
    record = torch.cat([target_BD @ basis_DR, of_event_BR, torch.stack(scalars, dim=1)], dim=1)
    return coordinates(event_BE, start["event_mean"], start["event_basis"]), record


@dataclass(frozen=True, slots=True)
class Products:
    """Products of aligned features with their targets, each (B,), and the width they were taken over."""

    dot: Tensor
    """aligned · target."""
    aligned_sq: Tensor
    """|aligned|²."""
    target_sq: Tensor
    """|target|²."""
    centred_dot: Tensor
    """(aligned − mean) · (target − mean)."""
    centred_aligned_sq: Tensor
    """|aligned − mean|²."""
    centred_target_sq: Tensor
    """|target − mean|²."""


@dataclass(frozen=True, slots=True)
class MeanProducts:
    """What follows from the mean target alone: of width D, and so taken once and not in every step."""

    coordinates_R: Tensor
    """Its products with the target basis."""
    sq: Tensor
    """|mean|²."""

    @staticmethod
    def of(adapter: SubspaceAdapter) -> "MeanProducts":
        """Of an adapter whose mean and basis are in place; training does not move them."""
        mean_D = adapter.target_mean
        return MeanProducts(mean_D @ adapter.target_basis, mean_D.square().sum())


def products(adapter: SubspaceAdapter, mean: MeanProducts, core_BR: Tensor, record: Tensor) -> Products:
    """Of mean + basis · core + ρ · event with the recorded targets."""
    rank, rho = core_BR.shape[1], adapter.residual
    target_BR, event_BR, scalars = record[:, :rank], record[:, rank : 2 * rank], record[:, 2 * rank :]
    target_sq, mean_target, event_target, event_sq, mean_event = scalars.unbind(dim=1)
    moved_sq = core_BR.square().sum(dim=1) + 2 * rho * (core_BR * event_BR).sum(dim=1) + rho**2 * event_sq
    moved_mean = core_BR @ mean.coordinates_R + rho * mean_event
    moved_target = (core_BR * target_BR).sum(dim=1) + rho * event_target
    return Products(
        dot=mean_target + moved_target,
        aligned_sq=mean.sq + 2 * moved_mean + moved_sq,
        target_sq=target_sq,
        centred_dot=moved_target - moved_mean,
        centred_aligned_sq=moved_sq,
        centred_target_sq=target_sq - 2 * mean_target + mean.sq,
    )


def similarity(adapter: SubspaceAdapter, mean: MeanProducts, core_BR: Tensor, record: Tensor) -> Tensor:
    """Cosine of every aligned feature with every target, (B, B); only without a residual connection."""
    assert not adapter.residual
    rank = core_BR.shape[1]
    dot_BB = core_BR @ record[:, :rank].T + record[:, 2 * rank + 1]
    aligned_sq = mean.sq + 2 * core_BR @ mean.coordinates_R + core_BR.square().sum(dim=1)
    return dot_BB / (aligned_sq.sqrt()[:, None] * record[:, 2 * rank].sqrt())
