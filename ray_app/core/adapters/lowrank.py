"""`lowrank`: a small network between the leading principal subspaces of both sides.

aligned = mean target + target basis · core(whitened event coordinates). The bases and means come from the training
part and are buffers: saved, not trained.

Shapes: B = pairs, E = event width, D = target width, R = rank of both subspaces, H = hidden width.
"""

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter, InitStats, NoisyDropout
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError

LOWRANK_BUFFERS = ("target_mean", "target_basis", "target_scale", "event_mean", "event_basis", "event_scale")
"""Names of the statistics in `InitStats`; scales are standard deviations along the basis vectors."""


class LowRank(Adapter):
    """The mean target plus a small network between the subspaces, whose last layer starts at zero."""

    HIDDEN_DIM = 256
    DEPTH = 1
    SETTINGS = Adapter.SETTINGS | {"rank"}
    REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        rank, hidden = config.rank, config.hidden_dim
        self.target_mean: Tensor
        self.target_basis: Tensor
        self.target_scale: Tensor
        self.event_mean: Tensor
        self.event_basis: Tensor
        self.event_scale: Tensor
        for side, width in (("target", config.target_dim), ("event", config.event_dim)):
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_basis", torch.zeros(width, rank))
            self.register_buffer(f"{side}_scale", torch.ones(rank))
        self.input = nn.Linear(rank, hidden)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(config.depth))
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.depth))
        self.output = nn.Linear(hidden, rank)

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        if config.rank > (most := min(config.event_dim, config.target_dim)):
            raise ConfigError(f"--rank ({config.rank}) is above the width of a feature ({most}); try {most}")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        coordinates_BR = event_BE @ self.event_basis - self.event_mean @ self.event_basis
        return self.target_mean + self.core(coordinates_BR, noise) @ self.target_basis.T

    def core(self, coordinates_BR: Tensor, noise: BatchNoise | None = None) -> Tensor:
        """Map event coordinates to target coordinates, both (B, R), in the units of the features."""
        h_BH = self.dropout(self.input(coordinates_BR / self.event_scale), noise)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h_BH = h_BH + nn.functional.gelu(block(norm(h_BH)))
        return self.output(h_BH) * self.target_scale

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        for name in LOWRANK_BUFFERS:
            nn.init.constant_(getattr(self, name), float(name.endswith("scale")))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:  # noqa: ARG002
        for name in LOWRANK_BUFFERS:  # without a copy: nothing writes to them
            setattr(self, name, stats[name])
