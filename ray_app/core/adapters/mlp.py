"""Adapters of fully connected layers at full width: the reference's two, and plainer ones.

Each may be divided over workers: then E and D are those of a worker's slice of the features, and the layers between
the first and the last are the same on all.

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
from ray_app.core.adapters.slices import WHOLE, FeatureSlice, TensorSlice


class WideAdapter(Adapter):
    """An adapter whose weights are nearly all in its last layer and, but for `linear`, in its first one."""

    DIVISIBLE = frozenset({"event", "target"})
    input: nn.Linear
    """First layer, E → H."""
    output: nn.Linear
    """Last layer, H → D."""

    def __init__(self, config: AdapterConfig, part: FeatureSlice = WHOLE) -> None:
        super().__init__(config)
        self.part = part
        self.event_columns, self.target_columns = self.columns(config, part)
        self.event_width, self.target_width = (
            columns.stop - columns.start for columns in (self.event_columns, self.target_columns)
        )

    def read(self, event_BE: Tensor) -> Tensor:
        """First layer, (B, H): a sum over all columns of the event features."""
        if self.part.count == 1:
            return self.input(event_BE)
        return self.part.sum(nn.functional.linear(event_BE, self.input.weight)) + self.input.bias

    def write(self, h_BH: Tensor) -> Tensor:
        """Last layer, (B, D)."""
        return self.output(self.part.share(h_BH))

    def slices(self) -> dict[str, TensorSlice]:
        if self.part.count == 1:
            return {}
        config, slices = self.config, {}
        inputs = config.event_dim
        if "event" in self.DIVISIBLE:
            inputs = config.hidden_dim
            place = slice(0, inputs), self.event_columns
            slices["input.weight"] = TensorSlice((inputs, config.event_dim), place)
        place = self.target_columns, slice(0, inputs)
        slices["output.weight"] = TensorSlice((config.target_dim, inputs), place)
        slices["output.bias"] = TensorSlice((config.target_dim,), place[:1])
        return slices


class LightweightAlignmentModule(WideAdapter):
    """The reference's diagram: two hidden layers with LayerNorm and ReLU, and the input added to the output.

    154,556,416 parameters at E = D = 150,528 and H = 512. Where E ≠ D there is nothing to add the input to,
    and the residual connection is off. `depth`: hidden layers after the first.
    """

    PCA_REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig, part: FeatureSlice = WHOLE) -> None:
        super().__init__(config, part)
        hidden = config.hidden_dim
        self.input = nn.Linear(self.event_width, hidden)
        self.input_norm = nn.LayerNorm(hidden)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.hidden = nn.Linear(hidden, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.deeper = hidden_layers(config, torch.relu)
        self.output = nn.Linear(hidden, self.target_width)
        self.residual = config.event_dim == config.target_dim

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(torch.relu(self.input_norm(self.read(event_BE))), noise)
        h_BH = torch.relu(self.hidden_norm(self.hidden(h_BH)))
        aligned_BD = self.write(self.deeper(h_BH))
        return aligned_BD + event_BE if self.residual else aligned_BD

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            init_input_layer(self.input, stats, self.event_columns, self.part)
            init_output_layer(self.output, stats, self.target_columns, float(self.residual))


class LightweightReference(WideAdapter):
    """Model that the reference really ran: scale · (mlp(x) + 0.1 · x), of one hidden layer with LayerNorm and GELU.

    154,292,737 parameters at E = D = 150,528 and H = 512. Where E ≠ D the residual connection is off. `depth`: hidden
    layers.
    """

    RESIDUAL: ClassVar[float] = 0.1
    PCA_REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig, part: FeatureSlice = WHOLE) -> None:
        super().__init__(config, part)
        self.input = nn.Linear(self.event_width, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.deeper = hidden_layers(config, nn.functional.gelu)
        self.output = nn.Linear(config.hidden_dim, self.target_width)
        self.scale = nn.Parameter(torch.ones(1))
        self.residual = config.event_dim == config.target_dim

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(nn.functional.gelu(self.norm(self.read(event_BE))), noise)
        aligned_BD = self.write(self.deeper(h_BH))
        scale = self.part.share(self.scale)
        return scale * (aligned_BD + self.RESIDUAL * event_BE if self.residual else aligned_BD)

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        nn.init.ones_(self.scale)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            init_input_layer(self.input, stats, self.event_columns, self.part)
            init_output_layer(self.output, stats, self.target_columns, self.RESIDUAL * self.residual)


class Linear(WideAdapter):
    """One linear map E → D. At full width it would have 22.7 billion weights: for narrow features.

    Workers divide its outputs; each holds whole event features.
    """

    DIVISIBLE = frozenset({"target"})
    PCA_REQUIRES = "subspaces"
    SETTINGS = frozenset()

    def __init__(self, config: AdapterConfig, part: FeatureSlice = WHOLE) -> None:
        super().__init__(config, part)
        self.output = nn.Linear(self.event_width, self.target_width)

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        return self.output(event_BE)

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        """Join `init_input_layer` and `init_output_layer` in one matrix: event coordinates to the target's."""
        if pca:
            rank = self.config.rank
            read_RE = (stats["event_basis"] / stats["event_scale"])[:, :rank].T
            basis_DR = stats["target_basis"][self.target_columns] * stats["target_scale"]
            self.output.weight.copy_(OUTPUT_INIT_SCALE * basis_DR[:, :rank] @ read_RE)
            mean_D = stats["target_mean"][self.target_columns]
            self.output.bias.copy_(mean_D - self.output.weight @ stats["event_mean"])


class Bottleneck(WideAdapter):
    """E → H → D without a residual connection. `depth`: hidden layers."""

    PCA_REQUIRES = "subspaces"

    def __init__(self, config: AdapterConfig, part: FeatureSlice = WHOLE) -> None:
        super().__init__(config, part)
        self.input = nn.Linear(self.event_width, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.deeper = hidden_layers(config, nn.functional.gelu)
        self.output = nn.Linear(config.hidden_dim, self.target_width)

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(nn.functional.gelu(self.norm(self.read(event_BE))), noise)
        return self.write(self.deeper(h_BH))

    @torch.no_grad()
    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        if pca:
            init_input_layer(self.input, stats, self.event_columns, self.part)
            init_output_layer(self.output, stats, self.target_columns, 0.0)
