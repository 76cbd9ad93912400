"""LoRA factors on a language model of transformers: passed in before each pass, or added to its weights.

Shapes: L = layers, R = rank, I, O = inputs and outputs of a linear map.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ray_app.core.adapters.lora import LORA_SCALE, LanguageModelShape


class LowRankLinear(nn.Module):
    """A frozen linear map with LoRA factors that are passed in before each pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.factors: tuple[Tensor, Tensor] | None = None
        """Down (R, I) and up (O, R)."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.factors is not None
        down, up = self.factors
        plain: Tensor = self.linear(x)
        return plain + LORA_SCALE * F.linear(F.linear(x, down), up)


class LowRankLayers:
    """Layers whose linear maps are `LowRankLinear` now."""

    def __init__(self, layers: Iterable[nn.Module], shape: LanguageModelShape) -> None:
        self._maps: dict[str, list[LowRankLinear]] = {}
        for layer in layers:
            for name in shape.linear_maps():
                parent, key = name.split(".")
                module = LowRankLinear(getattr(getattr(layer, parent), key))
                setattr(getattr(layer, parent), key, module)
                self._maps.setdefault(key, []).append(module)

    def use(self, down: nn.ParameterDict, up: nn.ParameterDict) -> None:
        """Pass factors in, down (L, R, I) and up (L, O, R) of each map."""
        for key, modules in self._maps.items():
            for module, both in zip(modules, zip(down[key].unbind(), up[key].unbind(), strict=True), strict=True):
                module.factors = both


@torch.no_grad()
def merge_changes(layers: Iterable[nn.Module], changes: Mapping[str, Tensor]) -> None:
    """Add changes (L, O, I) to the weights of each linear map, by its name in transformers."""
    each = list(layers)
    for name, change_LOI in changes.items():
        for layer, change_OI in zip(each, change_LOI, strict=True):
            layer.get_submodule(name).weight += change_OI
