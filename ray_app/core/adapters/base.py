"""What every adapter is, and the parts that several share.

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

InitStats = Mapping[str, Tensor]
"""What the training part gives before the first step, by name: see `ray_app.core.adapters.initialization`."""
InitRequirement = Literal["nothing", "means", "subspaces", "pairs"]
"""How much of a start a strategy cannot do without; each includes the ones before it."""
OUTPUT_INIT_SCALE = 1e-3
"""Share of a principal direction's spread that an output layer with a PCA start begins with."""


class Adapter(nn.Module):
    """Event features in, aligned features out."""

    HIDDEN_DIM: ClassVar[int] = 512
    """Hidden width where none is asked for."""
    DEPTH: ClassVar[int] = 1
    """Blocks or hidden layers where none are asked for."""
    SETTINGS: ClassVar[frozenset[str]] = frozenset({"hidden_dim", "depth", "dropout"})
    """Of an `AdapterConfig` what changes it, beside its features."""
    REQUIRES: ClassVar[InitRequirement] = "nothing"
    """What `begin` must be given."""
    PCA_REQUIRES: ClassVar[InitRequirement] = "nothing"
    """What `begin` must be given for a PCA start, where the strategy has one."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        """ConfigError where the features are not what this strategy works on."""

    @abstractmethod
    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        """Aligned features (B, D). `noise` is needed in training mode where there is dropout."""

    def initialize_from(self, start: InitStats, *, pca: bool) -> None:
        """Takes over what the training part gives; `pca`: layers at the principal subspaces too."""

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weights as torch initialises them, from this generator: uniform within ± 1/√(inputs)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = 1.0 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                assert module.bias is not None
                module.bias.uniform_(-bound, bound, generator=generator)
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
    """Those beyond the first; without parameters at the default depth of 1."""
    return nn.Sequential(*(HiddenLayer(config.hidden_dim, activation) for _ in range(config.depth - 1)))


def init_input_layer(layer: nn.Linear, start: InitStats) -> None:
    """Its first rows read the whitened coordinates of the event feature in its principal subspace."""
    basis_ER, scale_R = start["event_basis"], start["event_scale"]
    rows = min(layer.out_features, basis_ER.shape[1])
    layer.weight[:rows] = (basis_ER[:, :rows] / scale_R[:rows]).T
    layer.bias[:rows] = -(layer.weight[:rows] @ start["event_mean"])


def init_output_layer(layer: nn.Linear, start: InitStats, residual: float) -> None:
    """Bias at the mean target, less what a residual connection brings of the mean event; columns in the subspace.

    Only the first columns speak, each a thousandth of a principal direction's spread: training begins at the mean.
    """
    basis_DR, scale_R = start["target_basis"], start["target_scale"]
    columns = min(layer.in_features, basis_DR.shape[1])
    layer.weight.zero_()
    layer.weight[:, :columns] = OUTPUT_INIT_SCALE * basis_DR[:, :columns] * scale_R[:columns]
    layer.bias.copy_(start["target_mean"])
    if residual:
        layer.bias.sub_(residual * start["event_mean"])
