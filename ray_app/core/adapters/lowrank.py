"""Adapters that work between the leading principal subspaces of both sides, and so can be trained in them.

aligned = mean target + target basis · core(whitened event coordinates) + residual · event. The bases and means
come from the training part and are buffers: saved, not trained.

Shapes: B = pairs, E = event width, D = target width, R = rank of both subspaces, H = hidden width.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter, InitStats, NoisyDropout, hidden_layers
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError

if TYPE_CHECKING:
    from ray_app.core.adapters.registry import AdapterConfig

BUFFERS = ("target_mean", "target_basis", "target_scale", "event_mean", "event_basis", "event_scale")
"""What a start gives; scales are standard deviations along the basis vectors."""


class SubspaceAdapter(Adapter):
    """What the adapters of this file share: everything but the core."""

    SETTINGS = Adapter.SETTINGS | {"rank"}
    NEEDS = "subspaces"

    def __init__(self, config: "AdapterConfig") -> None:
        super().__init__(config)
        self.residual = 0.0
        self.target_mean: Tensor
        self.target_basis: Tensor
        self.target_scale: Tensor
        self.event_mean: Tensor
        self.event_basis: Tensor
        self.event_scale: Tensor
        for side, width in (("target", config.target_dim), ("event", config.event_dim)):
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_basis", torch.zeros(width, config.rank))
            self.register_buffer(f"{side}_scale", torch.ones(config.rank))

    @classmethod
    def check(cls, config: "AdapterConfig") -> None:
        if config.rank > (most := min(config.event_dim, config.target_dim)):
            raise ConfigError(f"--rank ({config.rank}) is above the width of a feature ({most}); try {most}")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        coordinates_BR = event_BE @ self.event_basis - self.event_mean @ self.event_basis
        aligned_BD = self.target_mean + self.core(coordinates_BR, noise) @ self.target_basis.T
        return aligned_BD + self.residual * event_BE if self.residual else aligned_BD

    @abstractmethod
    def core(self, coordinates_BR: Tensor, noise: BatchNoise | None = None) -> Tensor:
        """Event coordinates to target coordinates, both (B, R), in the units of the features."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        for name in BUFFERS:
            nn.init.constant_(getattr(self, name), float(name.endswith("scale")))

    @torch.no_grad()
    def initialize_from(self, start: InitStats, *, spectral: bool) -> None:  # noqa: ARG002
        for name in BUFFERS:  # without a copy: nothing writes to them
            setattr(self, name, start[name])


class LowRank(SubspaceAdapter):
    """The mean target plus a small network between the subspaces, whose last layer begins at zero."""

    HIDDEN_DIM = 256
    DEPTH = 1

    def __init__(self, config: "AdapterConfig") -> None:
        super().__init__(config)
        rank, hidden = config.rank, config.hidden_dim
        self.input = nn.Linear(rank, hidden)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(config.depth))
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.depth))
        self.output = nn.Linear(hidden, rank)

    def core(self, coordinates_BR: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(self.input(coordinates_BR / self.event_scale), noise)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h_BH = h_BH + nn.functional.gelu(block(norm(h_BH)))
        return self.output(h_BH) * self.target_scale

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)


class LightweightSubspace(SubspaceAdapter):
    """The reference's diagram with both full-width layers confined to the subspaces; else the same function.

    `lightweight` whose input layer is W · event basisᵀ and whose output layer is target basis · W gives the same
    answers: `widened` makes that one.
    """

    def __init__(self, config: "AdapterConfig") -> None:
        super().__init__(config)
        hidden = config.hidden_dim
        self.input = nn.Linear(config.rank, hidden)
        self.input_norm = nn.LayerNorm(hidden)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.hidden = nn.Linear(hidden, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.deeper = hidden_layers(config, torch.relu)
        self.output = nn.Linear(hidden, config.rank)
        self.residual = float(config.event_dim == config.target_dim)

    def core(self, coordinates_BR: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(torch.relu(self.input_norm(self.input(coordinates_BR / self.event_scale))), noise)
        h_BH = torch.relu(self.hidden_norm(self.hidden(h_BH)))
        return self.output(self.deeper(h_BH)) * self.target_scale

    def widened(self) -> dict[str, Tensor]:
        """The weights of a `lightweight` adapter that is the same function, by name."""
        reads_HE = (self.input.weight / self.event_scale) @ self.event_basis.T
        speaks_DR = self.target_basis * self.target_scale
        same = ("input_norm", "hidden", "hidden_norm", "deeper")
        kept = {key: value for key, value in self.state_dict().items() if key.split(".")[0] in same}
        return {
            **kept,
            "input.weight": reads_HE,
            "input.bias": self.input.bias - reads_HE @ self.event_mean,
            "output.weight": speaks_DR @ self.output.weight,
            "output.bias": self.target_mean + speaks_DR @ self.output.bias,
        }
