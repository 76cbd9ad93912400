"""All adapters by name, and how one is built."""

import torch
from torch import nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.conv import Conv
from ray_app.core.adapters.drafting import ConstantTokens, EagleHead, EarlyExitLayers, EventTokens
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.core.adapters.lowrank import LowRank
from ray_app.core.adapters.mlp import (
    Bottleneck,
    LightweightAlignmentModule,
    LightweightReference,
    Linear,
    WideAdapter,
)
from ray_app.core.adapters.ridge import Ridge
from ray_app.core.adapters.slices import WHOLE, FeatureSlice
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
"""Adapters that align features."""
FOR_LANGUAGE_MODELS: dict[str, type[Adapter]] = {
    "image_tokens": ImageTokens,
    "early_exit": EarlyExitLayers,
    "eagle_head": EagleHead,
    "event_tokens": EventTokens,
    "constant_tokens": ConstantTokens,
}
"""Adapters that a language model trains: it reads their outputs, or they change it."""


def meta_adapter(config: AdapterConfig, part: FeatureSlice = WHOLE) -> Adapter:
    """Build an adapter on torch's meta device: names and shapes of its tensors without their memory.

    `part`: slice of the features that it works on, where the strategy may be divided.
    ConfigError: there is no such strategy, it does not work on such features, or they are too large.
    """
    kind = (STRATEGIES | FOR_LANGUAGE_MODELS).get(config.strategy)
    if kind is None:
        raise ConfigError(f"there is no strategy '{config.strategy}'; there are: {', '.join(STRATEGIES)}")
    kind.check(config)
    try:
        with torch.device("meta"):
            return kind(config, part) if issubclass(kind, WideAdapter) else kind(config)
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:  # a width beyond what torch can count
        raise ConfigError(f"there is no {config.strategy} adapter of these settings: {error}") from error


def build_adapter(config: AdapterConfig, seed: int, part: FeatureSlice = WHOLE) -> Adapter:
    """Build a new adapter on the CPU; equal seeds give equal weights, and the global generator is not touched.

    Workers with a `part` of the features hold parts of the very weights of a whole adapter.
    A strategy with `REQUIRES` is usable only after `Adapter.initialize_from`.
    """
    adapter = meta_adapter(config, part).to_empty(device="cpu")
    with torch.no_grad():
        adapter.reset_parameters(torch.Generator().manual_seed(seed))
    return adapter


def num_parameters(adapter: nn.Module) -> int:
    """Count the trained numbers."""
    return sum(parameter.numel() for parameter in adapter.parameters())
