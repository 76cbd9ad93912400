"""`ridge`: the best linear map in closed form, as the yardstick of what linear can do.

Kernel form: with event features X and targets Y of the training part, their means taken off, the map is
x ↦ mean + (x − mean) Xᵀ (X Xᵀ + λI)⁻¹ Y. It has no trained number: `initialization.py` solves it, with λ chosen
on the validation part. Both sides of the training part are kept as stored, since the map is of their rank.

Shapes: B = pairs, N = training pairs, E = event width, D = target width.
"""

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter, InitStats
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise

KERNEL_CHUNK = 256
"""Training pairs that are converted to float32 at a time."""
RIDGE_BUFFERS = ("target_mean", "event_mean", "event_pairs", "target_pairs", "event_unit", "target_unit", "inverse")


class Ridge(Adapter):
    """The linear map; its `rank` is the number of training pairs."""

    SETTINGS = frozenset()
    REQUIRES = "pairs"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        n = config.rank
        self.target_mean: Tensor
        self.event_mean: Tensor
        self.event_pairs: Tensor
        self.target_pairs: Tensor
        self.event_unit: Tensor
        self.target_unit: Tensor
        self.inverse: Tensor
        for side, width in (("target", config.target_dim), ("event", config.event_dim)):
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_pairs", torch.zeros(n, width))
            self.register_buffer(f"{side}_unit", torch.ones(1))
        self.register_buffer("inverse", torch.zeros(n, n))

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        centred_BE, kind = event_BE - self.event_mean, event_BE.dtype
        kernel = [
            centred_BE @ (rows.to(kind) * self.event_unit - self.event_mean).T
            for rows in self.event_pairs.split(KERNEL_CHUNK)
        ]
        weights_BN = torch.cat(kernel, dim=1) @ self.inverse
        # Σ w (y − mean) = Σ w y − mean Σ w
        aligned_BD = self.target_mean * (1.0 - weights_BN.sum(dim=1, keepdim=True))
        for part_BN, rows in zip(
            weights_BN.split(KERNEL_CHUNK, dim=1), self.target_pairs.split(KERNEL_CHUNK), strict=True
        ):
            aligned_BD = aligned_BD + (part_BN * self.target_unit) @ rows.to(kind)
        return aligned_BD

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:  # noqa: ARG002
        for name in RIDGE_BUFFERS:
            torch.nn.init.constant_(getattr(self, name), float(name.endswith("unit")))

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:  # noqa: ARG002
        for name in RIDGE_BUFFERS:
            setattr(self, name, stats[name])
