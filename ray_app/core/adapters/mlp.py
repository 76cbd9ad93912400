"""Adapters of fully connected layers at full width: the reference's two, and plainer ones.

Shapes: B = pairs, E = event width, D = target width, H = hidden width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import (
    OUTPUT_INIT_SCALE,
    Adapter,
    InitStats,
    NoisyDropout,
    hidden_layers,
    init_input_layer,
    init_output_layer,
)
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise


class LightweightAlignmentModule(Adapter):
    """The reference's diagram: two hidden layers with LayerNorm and ReLU, and the input added to the output.

    154,556,416 parameters at E = D = 150,528 and H = 512. Where E ≠ D there is nothing to add the input to,
    and the residual connection is off. `depth`: hidden layers after the first.
    """

    PCA_REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_dim
        self.input = nn.Linear(config.event_dim, hidden)
        self.input_norm = nn.LayerNorm(hidden)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.hidden = nn.Linear(hidden, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.deeper = hidden_layers(config, torch.relu)
        self.output = nn.Linear(hidden, config.target_dim)
        self.residual = config.event_dim == config.target_dim

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(torch.relu(self.input_norm(self.input(event_BE))), noise)
        h_BH = torch.relu(self.hidden_norm(self.hidden(h_BH)))
        aligned_BD = self.output(self.deeper(h_BH))
        return aligned_BD + event_BE if self.residual else aligned_BD

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            init_input_layer(self.input, stats)
            init_output_layer(self.output, stats, float(self.residual))


class LightweightReference(Adapter):
    """Model that the reference really ran: scale · (mlp(x) + 0.1 · x), of one hidden layer with LayerNorm and GELU.

    154,292,737 parameters at E = D = 150,528 and H = 512. Where E ≠ D the residual connection is off. `depth`: hidden
    layers.
    """

    RESIDUAL: ClassVar[float] = 0.1
    PCA_REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.event_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.deeper = hidden_layers(config, nn.functional.gelu)
        self.output = nn.Linear(config.hidden_dim, config.target_dim)
        self.scale = nn.Parameter(torch.ones(1))
        self.residual = config.event_dim == config.target_dim

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(nn.functional.gelu(self.norm(self.input(event_BE))), noise)
        aligned_BD = self.output(self.deeper(h_BH))
        return self.scale * (aligned_BD + self.RESIDUAL * event_BE if self.residual else aligned_BD)

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        nn.init.ones_(self.scale)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            init_input_layer(self.input, stats)
            init_output_layer(self.output, stats, self.RESIDUAL * self.residual)


class Linear(Adapter):
    """One linear map E → D. At full width it would have 22.7 billion weights: for narrow features."""

    PCA_REQUIRES = "subspaces"
    SETTINGS = frozenset()

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.event_dim, config.target_dim)

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        return self.output(event_BE)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        """Join `init_input_layer` and `init_output_layer` in one matrix: event coordinates to the target's."""
        if pca:
            rank = self.config.rank
            read_RE = (stats["event_basis"] / stats["event_scale"])[:, :rank].T
            self.output.weight.copy_(
                OUTPUT_INIT_SCALE * (stats["target_basis"] * stats["target_scale"])[:, :rank] @ read_RE
            )
            self.output.bias.copy_(stats["target_mean"] - self.output.weight @ stats["event_mean"])


class Bottleneck(Adapter):
    """E → H → D without a residual connection. `depth`: hidden layers."""

    PCA_REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.event_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.deeper = hidden_layers(config, nn.functional.gelu)
        self.output = nn.Linear(config.hidden_dim, config.target_dim)

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(nn.functional.gelu(self.norm(self.input(event_BE))), noise)
        return self.output(self.deeper(h_BH))

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            init_input_layer(self.input, stats)
            init_output_layer(self.output, stats, 0.0)
