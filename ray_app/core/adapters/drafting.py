"""Trained parts of drafters: an early exit of the target, a head on its last states, image tokens of event images.

Shapes: B = pairs, E = event width, N = image tokens, D = width of the language model, I = ids of the reduced head,
L = layers, X = N · D.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.lora import LanguageModelShape, lora_changes, lora_factors, reset_lora
from ray_app.core.adapters.lowrank import LowRank
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError

EAGLE_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
"""Names of the norms of an `EagleHead`: before attention, before the MLP, before the head."""


class EarlyExitLayers(Adapter):
    """LoRA factors of a target's first layers, and a head for the ids of `config.vocabulary`.

    `forward` returns its input: it aligns nothing, and the objective runs the layers.
    """

    SETTINGS = frozenset({"rank"})

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        shape = LanguageModelShape(*config.language_model)
        self.down, self.up = lora_factors(shape, config.rank)
        self.head = nn.Parameter(torch.empty(len(config.vocabulary), shape.width))

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        if len(config.language_model) != len(LanguageModelShape._fields) or not config.vocabulary:
            raise ConfigError("early_exit needs the shape of a language model and the ids of its head")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        return event_BE

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        reset_lora(self.down, self.up, generator)
        nn.init.zeros_(self.head)

    def changes(self) -> dict[str, Tensor]:
        """Return what is added to each linear map's weight, (L, O, I), by its name in transformers."""
        return lora_changes(LanguageModelShape(*self.config.language_model), self.down, self.up)


class EagleHead(Adapter):
    """Weights of EAGLE's layer (arXiv 2401.15077), and a head for the ids of `config.vocabulary`.

    `fc` joins a token's embedding and a state. `forward` returns its input: it aligns nothing, and the objective runs
    the layer.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        shape = LanguageModelShape(*config.language_model)
        width = shape.width
        sizes = {
            "fc": (width, 2 * width),
            "q_proj": (shape.queries, width),
            "k_proj": (shape.values, width),
            "v_proj": (shape.values, width),
            "o_proj": (width, shape.queries),
            "gate_proj": (shape.mlp, width),
            "up_proj": (shape.mlp, width),
            "down_proj": (width, shape.mlp),
            "head": (len(config.vocabulary), width),
        }
        self.maps = nn.ParameterDict({name: nn.Parameter(torch.empty(size)) for name, size in sizes.items()})
        self.norms = nn.ParameterDict({name: nn.Parameter(torch.empty(width)) for name in EAGLE_NORMS})

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        if len(config.language_model) != len(LanguageModelShape._fields) or not config.vocabulary:
            raise ConfigError("eagle_head needs the shape of a language model and the ids of its head")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        return event_BE

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        for weight in self.maps.values():
            bound = 1.0 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound, generator=generator)
        for norm in self.norms.values():
            nn.init.ones_(norm)


class EventTokens(Adapter):
    """Image tokens of an event feature, (B, X): `lowrank` between principal subspaces, from the mean tokens on."""

    HIDDEN_DIM = 256
    SETTINGS = LowRank.SETTINGS

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        width = config.image_tokens * LanguageModelShape(*config.language_model).width
        self.map = LowRank(replace(config, target_dim=width, target_shape=()))

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        if len(config.language_model) != len(LanguageModelShape._fields) or not config.image_tokens:
            raise ConfigError(f"{config.strategy} needs the shape of a language model and a number of image tokens")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        tokens_BX: Tensor = self.map(event_BE, noise)
        return tokens_BX

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.map.reset_parameters(generator)


class ConstantTokens(EventTokens):
    """The same for every pair: what `EventTokens` makes of the mean event feature. A baseline."""

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:
        return super().forward(self.map.event_mean.expand_as(event_BE), noise)
