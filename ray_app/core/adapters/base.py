"""The base class of adapters, and the parts that several share.

Shapes: B = pairs, E = event width, D = target width, H = hidden width, R = subspace rank.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.slices import WHOLE, FeatureSlice, TensorSlice, draw_uniform

InitStats = Mapping[str, Tensor]
"""Statistics of the training part by name: see `ray_app.core.adapters.initialization`."""
InitRequirement = Literal["nothing", "means", "subspaces", "pairs"]
"""Kind of statistics that a strategy needs before its first step; each includes the ones before it."""
OUTPUT_INIT_SCALE = 1e-3
"""Share of a principal direction's spread that an output layer starts with after PCA."""


class Adapter(nn.Module):
    """Maps event features to aligned features."""

    HIDDEN_DIM: ClassVar[int] = 512
    """Default hidden width."""
    DEPTH: ClassVar[int] = 1
    """Default number of blocks or hidden layers."""
    SETTINGS: ClassVar[frozenset[str]] = frozenset({"hidden_dim", "depth", "dropout"})
    """Fields of `AdapterConfig` that change it, apart from the features."""
    REQUIRES: ClassVar[InitRequirement] = "nothing"
    """Statistics that `initialize_from` needs."""
    PCA_REQUIRES: ClassVar[InitRequirement] = "nothing"
    """Statistics that `initialize_from` needs with `pca`, if the strategy has such a start."""

    DIVISIBLE: ClassVar[frozenset[str]] = frozenset()
    """Sides of a pair, `event` and `target`, of which a worker may hold a slice; none: features must be whole."""
    part: FeatureSlice = WHOLE
    """Slice of the features that this adapter works on."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        """Raise ConfigError if the strategy does not work on such features."""

    @classmethod
    def columns(cls, config: AdapterConfig, part: FeatureSlice) -> tuple[slice, slice]:
        """Columns of the event and of the target feature that an adapter of this part works on."""
        widths = {"event": config.event_dim, "target": config.target_dim}
        event, target = (
            part.of(widths[side]) if side in cls.DIVISIBLE else slice(0, widths[side]) for side in widths
        )
        return event, target

    def slices(self) -> dict[str, TensorSlice]:
        """Parameters of which this adapter holds a part, by name; none if it is whole."""
        return {}

    @abstractmethod
    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        """Return aligned features (B, D). `noise` is needed in training mode if there is dropout."""

    def initialize_from(self, stats: InitStats, *, pca: bool) -> None:
        """Start from statistics of the training part; `pca`: layers start at the principal subspaces too."""

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise weights as torch does, from this generator: uniform within ± 1/√(inputs)."""
        slices = self.slices()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight = slices.get(f"{name}.weight")
                inputs = math.prod(weight.shape[1:]) if weight else module.weight[0].numel()
                bound = 1.0 / math.sqrt(inputs)
                draw_uniform(module.weight, bound, generator, weight)
                assert module.bias is not None
                draw_uniform(module.bias, bound, generator, slices.get(f"{name}.bias"))
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


class NoisyDropout(nn.Module):
    """Dropout whose noise is passed in."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer

    def forward(self, x_BH: Tensor, noise: BatchNoise | None) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x_BH
        assert noise is not None, "an adapter with dropout is trained with its noise passed in"
        keep_BH = noise.uniform(self.layer, math.prod(x_BH.shape[1:]), x_BH.device).view_as(x_BH) >= self.probability
        return x_BH * keep_BH.to(x_BH.dtype) / (1.0 - self.probability)


class HiddenLayer(nn.Module):
    """activation(norm(Wx + b)), H → H."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm, self.activation = nn.Linear(width, width), nn.LayerNorm(width), activation

    def forward(self, x_BH: Tensor) -> Tensor:
        return self.activation(self.norm(self.linear(x_BH)))


def hidden_layers(config: AdapterConfig, activation: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """Build the layers after the first; none at the default depth of 1."""
    return nn.Sequential(*(HiddenLayer(config.hidden_dim, activation) for _ in range(config.depth - 1)))


def init_input_layer(layer: nn.Linear, stats: InitStats, columns: slice, part: FeatureSlice) -> None:
    """Set the first rows to read the whitened coordinates of the event feature in its principal subspace."""
    basis_ER, scale_R = stats["event_basis"][columns], stats["event_scale"]
    rows = min(layer.out_features, basis_ER.shape[1])
    layer.weight[:rows] = (basis_ER[:, :rows] / scale_R[:rows]).T
    layer.bias[:rows] = -part.all_reduce(layer.weight[:rows] @ stats["event_mean"][columns])


def init_output_layer(layer: nn.Linear, stats: InitStats, columns: slice, residual: float) -> None:
    """Set the bias to the mean target, less the residual connection's mean event, and the columns to the subspace.

    Only the first columns are not zero, each a thousandth of a principal direction's spread: training starts at the
    mean. `columns`: those of the target feature that the layer computes.
    """
    basis_DR, scale_R = stats["target_basis"][columns], stats["target_scale"]
    hidden = min(layer.in_features, basis_DR.shape[1])
    layer.weight.zero_()
    layer.weight[:, :hidden] = OUTPUT_INIT_SCALE * basis_DR[:, :hidden] * scale_R[:hidden]
    layer.bias.copy_(stats["target_mean"][columns])
    if residual:
        layer.bias.sub_(residual * stats["event_mean"][columns])
