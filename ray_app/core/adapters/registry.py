"""All adapters from the event side's features to the target side's, by name, and how one is built.

Shapes: E = event width, D = target width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.conv import Conv
from ray_app.core.adapters.lowrank import LowRank
from ray_app.core.adapters.mlp import Bottleneck, LightweightAlignmentModule, LightweightReference, Linear
from ray_app.core.adapters.ridge import Ridge
from ray_app.core.adapters.token import (
    TokenAttention,
    TokenBottleneck,
    TokenCausal,
    TokenMultilayer,
    TokenWide,
)
from ray_app.errors import ConfigError

STRATEGIES: dict[str, type[Adapter]] = {
    "lightweight": LightweightAlignmentModule,
    "lightweight_reference": LightweightReference,
    "linear": Linear,
    "bottleneck": Bottleneck,
    "conv": Conv,
    "lowrank": LowRank,
    "ridge": Ridge,
    "token_bottleneck": TokenBottleneck,
    "token_multilayer": TokenMultilayer,
    "token_wide": TokenWide,
    "token_attention": TokenAttention,
    "token_causal": TokenCausal,
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """All that is needed to build an adapter; written into every checkpoint. What lacks there has its default."""

    strategy: str
    """Key of `STRATEGIES`."""
    event_dim: int
    """Width of an event feature, E."""
    target_dim: int
    """Width of a target feature, D."""
    hidden_dim: int = 512
    """Width of the hidden layers, channels of `conv`; `linear` has none."""
    dropout: float = 0.1
    """Dropout probability, where the strategy has dropout."""
    event_shape: tuple[int, ...] = ()
    """Shape of an event feature, where the strategy works on images or sequences."""
    target_shape: tuple[int, ...] = ()
    """Shape of a target feature, there too."""
    depth: int = 1
    """Blocks or hidden layers, where the strategy has them."""
    patch: int = 16
    """Side of a patch of `conv`, in pixels."""
    rank: int = 64
    """Dimensions of the subspaces; of `ridge` its training pairs."""
    mean_start: bool = False
    """Adapters of sequences add to the mean training target of each position, and not to their input."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"there is no strategy '{self.strategy}'; there are: {', '.join(STRATEGIES)}")
        for name in ("event_dim", "target_dim", "hidden_dim", "depth", "patch", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout ({self.dropout}) must be in [0, 1)")
        STRATEGIES[self.strategy].check(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """The inverse of `to_dict`. An unknown or a missing key raises `ConfigError`."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ConfigError(
                f"unknown adapter setting {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
            )
        try:
            shapes = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
            return cls(**{**values, **shapes})
        except TypeError as error:
            raise ConfigError(f"adapter settings are incomplete: {error}") from error


def build_adapter(config: AdapterConfig, seed: int) -> Adapter:
    """A new adapter on the CPU; equal seeds give equal weights, and the global generator is not touched.

    One that needs a start is not usable before `Adapter.begin` has been given it.
    """
    with torch.device("meta"):
        adapter = STRATEGIES[config.strategy](config)
    adapter = adapter.to_empty(device="cpu")
    with torch.no_grad():
        adapter.reset_parameters(torch.Generator().manual_seed(seed))
    return adapter


def num_parameters(adapter: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(parameter.numel() for parameter in adapter.parameters())
