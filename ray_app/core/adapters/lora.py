"""LoRA factors (arXiv 2106.09685) of the linear maps of a language model's layers.

Shapes: L = layers, R = rank, I, O = inputs and outputs of a linear map.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

LORA_SCALE = 2.0
"""Factor on the product of two LoRA factors (alpha / rank)."""


class LanguageModelShape(NamedTuple):
    """Sizes of a language model of Llama's kind."""

    layers: int
    """Layers, L."""
    width: int
    """Width of a token, D."""
    queries: int
    """Width of the queries of all heads."""
    values: int
    """Width of the values of all heads."""
    mlp: int
    """Width between the linear maps of the MLP."""

    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of each linear map that gets LoRA factors, by its name in transformers."""
        return {
            "self_attn.q_proj": (self.width, self.queries),
            "self_attn.v_proj": (self.width, self.values),
            "self_attn.o_proj": (self.queries, self.width),
            "mlp.up_proj": (self.width, self.mlp),
            "mlp.down_proj": (self.mlp, self.width),
        }


def lora_factors(shape: LanguageModelShape, rank: int) -> tuple[nn.ParameterDict, nn.ParameterDict]:
    """Return the factors down (L, R, I) and up (L, O, R) of every linear map, by the last part of its name."""
    down, up = nn.ParameterDict(), nn.ParameterDict()
    for name, (inputs, outputs) in shape.linear_maps().items():
        key = name.split(".")[1]
        down[key] = nn.Parameter(torch.empty(shape.layers, rank, inputs))
        up[key] = nn.Parameter(torch.empty(shape.layers, outputs, rank))
    return down, up


def reset_lora(down: nn.ParameterDict, up: nn.ParameterDict, generator: torch.Generator) -> None:
    """Draw the factors so that they change nothing yet."""
    for factor in down.values():
        bound = 1.0 / math.sqrt(factor.shape[2])
        factor.uniform_(-bound, bound, generator=generator)
    for factor in up.values():
        nn.init.zeros_(factor)


def lora_changes(shape: LanguageModelShape, down: nn.ParameterDict, up: nn.ParameterDict) -> dict[str, Tensor]:
    """Return what is added to each linear map's weight, (L, O, I), by its name in transformers."""
    names = {name.split(".")[1]: name for name in shape.linear_maps()}
    return {names[key]: LORA_SCALE * up[key] @ down[key] for key in down}
