"""Trained parts with which a language model sees: a projector from an image's features to tokens, and LoRA factors.

Shapes: B = pairs, E = event width, H = hidden width, N = image tokens, D = width of the language model, L = layers,
I, O = inputs and outputs of one of its linear maps.
"""

import torch
from torch import Tensor, nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.lora import LanguageModelShape, lora_changes, lora_factors, reset_lora
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError


class ImageTokens(Adapter):
    """Projector (E → H → N · D) and LoRA (arXiv 2106.09685) of a language model that answers questions.

    `forward` returns the image tokens. The first layer of the projector is a linear probe, which is solved and not
    trained; its outputs are scores of what can be seen.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        shape = LanguageModelShape(*config.language_model)
        self.projector = nn.Sequential(
            nn.Linear(config.event_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.image_tokens * shape.width),
        )
        self.projector[0].requires_grad_(False)
        self.down, self.up = lora_factors(shape, config.rank)

    @classmethod
    def check(cls, config: AdapterConfig) -> None:
        if len(config.language_model) != len(LanguageModelShape._fields) or not config.image_tokens:
            raise ConfigError("image_tokens needs the shape of a language model and a number of image tokens")

    def forward(self, event_BE: Tensor, noise: BatchNoise | None = None) -> Tensor:  # noqa: ARG002
        tokens: Tensor = self.projector(event_BE)
        return tokens

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        reset_lora(self.down, self.up, generator)

    def changes(self) -> dict[str, Tensor]:
        """Return what is added to each linear map's weight, (L, O, I), by its name in transformers."""
        return lora_changes(LanguageModelShape(*self.config.language_model), self.down, self.up)
