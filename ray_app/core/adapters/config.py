"""The settings of an adapter, as every checkpoint holds them.

Shapes: E = event width, D = target width.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ray_app.errors import ConfigError

MAX_SIZE = 2**31 - 1
"""Largest width."""
MAX_BLOCKS = 256
"""Largest depth."""
MAX_DIMS = 8
"""Most dimensions of a feature's shape."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """All that is needed to build an adapter; a missing key of a checkpoint has its default here."""

    strategy: str
    """Name of the adapter, a key of `ray_app.core.adapters.registry.STRATEGIES`."""
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
    """Shape of a target feature, where the strategy works on images or sequences."""
    depth: int = 1
    """Number of blocks or hidden layers, where the strategy has them."""
    patch: int = 16
    """Side of a patch of `conv`, in pixels."""
    rank: int = 64
    """Number of dimensions of the subspaces; for `ridge` the number of training pairs."""
    mean_start: bool = False
    """Adapters of sequences add to the mean training target of each position instead of their input."""
    image_tokens: int = 0
    """Tokens of a picture for a language model, where the strategy makes such."""
    language_model: tuple[int, ...] = ()
    """Sizes of that language model: `ray_app.core.adapters.lora.LanguageModelShape`."""
    vocabulary: tuple[int, ...] = ()
    """Ids of the tokens that a drafter may say, where the strategy is one."""

    def __post_init__(self) -> None:
        for name in ("event_dim", "target_dim", "hidden_dim", "depth", "patch", "rank"):
            most = MAX_BLOCKS if name == "depth" else MAX_SIZE
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1 and at most {most:,}")
        for shape, width in ((self.event_shape, self.event_dim), (self.target_shape, self.target_dim)):
            if shape and (len(shape) > MAX_DIMS or min(shape) < 1 or math.prod(shape) != width):
                raise ConfigError(f"a feature of {width} numbers has no shape {list(shape[:MAX_DIMS])}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout ({self.dropout}) must be in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """Invert `to_dict`. ConfigError: not of JSON's types, an unknown or missing key, a number out of range."""
        if not isinstance(values, dict):
            raise ConfigError(f"the adapter's settings are a {type(values).__name__}, not an object")
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ConfigError(
                f"unknown adapter setting {', '.join(sorted(unknown))[:200]}; known: {', '.join(sorted(known))}"
            )
        for field in fields(cls):
            if field.name in values and not _is_of_type(values[field.name], field.type):
                raise ConfigError(f"{field.name} is no {field.type} but a {type(values[field.name]).__name__}")
        try:
            shapes = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
            return cls(**{**values, **shapes})
        except TypeError as error:
            raise ConfigError(f"adapter settings are incomplete: {error}") from error


def _is_of_type(value: Any, kind: Any) -> bool:
    """True if a JSON value is what a field of this type is saved as."""
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is kind or (kind is float and type(value) is int)
