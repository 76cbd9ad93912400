"""Trained parts with which a language model sees: a projector from an image's features to tokens, and LoRA factors.

Shapes: B = pairs, E = event width, H = hidden width, N = image tokens, D = width of the language model, L = layers,
R = rank, I, O = inputs and outputs of one of its linear maps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError

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


class ImageTokens(Adapter):
    """Projector (E → H → N · D) and LoRA (arXiv 2106.09685) of a language model that answers questions.

    `forward` returns the image tokens. The first layer of the projector is a linear probe, which is solved and not
    trained; its outputs are scores of what can be seen.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        shape, rank = LanguageModelShape(*config.language_model), config.rank
        self.projector = nn.Sequential(
            nn.Linear(config.event_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.image_tokens * shape.width),
        )
        self.projector[0].requires_grad_(False)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, (inputs, outputs) in shape.linear_maps().items():
            key = name.split(".")[1]
            self.down[key] = nn.Parameter(torch.empty(shape.layers, rank, inputs))
            self.up[key] = nn.Parameter(torch.empty(shape.layers, outputs, rank))

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        if len(config.language_model) != len(LanguageModelShape._fields) or not config.image_tokens:
            raise ConfigError("image_tokens needs the shape of a language model and a number of image tokens")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        tokens: Tensor = self.projector(event_BE)
        return tokens

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        for factor in self.down.values():
            bound = 1.0 / math.sqrt(factor.shape[2])
            factor.uniform_(-bound, bound, generator=generator)
        for factor in self.up.values():
            nn.init.zeros_(factor)

    def changes(self) -> dict[str, Tensor]:
        """Return what is added to each linear map's weight, (L, O, I), by its name in transformers."""
        names = {name.split(".")[1]: name for name in LanguageModelShape(*self.config.language_model).linear_maps()}
        return {names[key]: LORA_SCALE * self.up[key] @ self.down[key] for key in self.down}
