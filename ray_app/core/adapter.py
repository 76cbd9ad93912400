"""Adapters from the event side's features to the target side's: one small class a strategy.

Shapes: B = pairs, E = event width, D = target width, H = hidden width.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ray_app.core.noise import BatchNoise
from ray_app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """All that is needed to build an adapter; written into every checkpoint."""

    strategy: str
    """Key of `STRATEGIES`."""
    event_dim: int
    """Width of an event feature."""
    target_dim: int
    """Width of a target feature."""
    hidden_dim: int = 512
    """Width of the hidden layers; `linear` has none."""
    dropout: float = 0.1
    """Dropout probability, where the strategy has dropout."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"there is no strategy '{self.strategy}'; there are: {', '.join(STRATEGIES)}")
        for name in ("event_dim", "target_dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout ({self.dropout}) must be in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """The inverse of `to_dict`. An unknown or a missing key raises `ConfigError`."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ConfigError(
                f"unknown adapter setting {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"adapter settings are incomplete: {error}") from error


class NoisyDropout(nn.Module):
    """Dropout whose noise is passed in."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer

    def forward(self, x_BH: Tensor, noise: BatchNoise | None) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x_BH
        assert noise is not None, "an adapter with dropout is trained with its noise passed in"
        keep_BH = noise.uniform(self.layer, x_BH.shape[1], x_BH.device) >= self.probability
        return x_BH * keep_BH.to(x_BH.dtype) / (1.0 - self.probability)


class Adapter(nn.Module):
    """Event features in, aligned features out."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        """Aligned features (B, D). `noise` is needed in training mode where there is dropout."""


class LightweightAlignmentModule(Adapter):
    """The reference's diagram: two hidden layers with LayerNorm and ReLU, and the input added to the output.

    154,556,416 parameters at E = D = 150,528 and H = 512. Where E ≠ D there is nothing to add the input to,
    and the residual connection is off.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_dim
        self.input = nn.Linear(config.event_dim, hidden)
        self.input_norm = nn.LayerNorm(hidden)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.hidden = nn.Linear(hidden, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, config.target_dim)
        self.residual = config.event_dim == config.target_dim

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(torch.relu(self.input_norm(self.input(event_BE))), noise)
        h_BH = torch.relu(self.hidden_norm(self.hidden(h_BH)))
        aligned_BD = self.output(h_BH)
        return aligned_BD + event_BE if self.residual else aligned_BD


class LightweightReference(Adapter):
    """What the reference really ran: scale · (mlp(x) + 0.1 · x), of one hidden layer with LayerNorm and GELU.

    154,292,737 parameters at E = D = 150,528 and H = 512. Where E ≠ D the residual connection is off.
    """

    RESIDUAL: ClassVar[float] = 0.1

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.event_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.output = nn.Linear(config.hidden_dim, config.target_dim)
        self.scale = nn.Parameter(torch.ones(1))
        self.residual = config.event_dim == config.target_dim

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        h_BH = self.dropout(nn.functional.gelu(self.norm(self.input(event_BE))), noise)
        aligned_BD = self.output(h_BH)
        return self.scale * (aligned_BD + self.RESIDUAL * event_BE if self.residual else aligned_BD)


class Linear(Adapter):
    """One linear map E → D. At full width it would have 22.7 billion weights: for narrow features."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.event_dim, config.target_dim)

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        return self.output(event_BE)


class Bottleneck(Adapter):
    """E → H → D without a residual connection: what passes, passes through H numbers."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.event_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = NoisyDropout(config.dropout, layer=0)
        self.output = nn.Linear(config.hidden_dim, config.target_dim)

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        return self.output(self.dropout(nn.functional.gelu(self.norm(self.input(event_BE))), noise))


STRATEGIES: dict[str, type[Adapter]] = {
    "lightweight": LightweightAlignmentModule,
    "lightweight_reference": LightweightReference,
    "linear": Linear,
    "bottleneck": Bottleneck,
}


def build_adapter(config: AdapterConfig, seed: int) -> Adapter:
    """A new adapter on the CPU; equal seeds give equal weights, and the global generator is not touched.

    Linear layers as torch initialises them: weight and bias uniform within ± 1/√(inputs).
    """
    with torch.device("meta"):
        adapter = STRATEGIES[config.strategy](config)
    adapter = adapter.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapter.modules():
            if isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LightweightReference):
                nn.init.ones_(module.scale)
    return adapter


def num_parameters(adapter: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(parameter.numel() for parameter in adapter.parameters())
