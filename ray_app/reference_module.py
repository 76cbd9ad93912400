"""The reference's `LightweightAlignmentModule`, for code that builds it from its config and loads its state dict."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.mlp import LightweightReference
from ray_app.errors import ConfigError
from ray_app.store.reference_checkpoint import DIMS, KEYS, STRATEGY


class LightweightAlignmentModule(LightweightReference):
    """Module that the reference trains: scale · (mlp(x) + 0.1 · x), event features (B, E) to aligned features (B, D).

        model = LightweightAlignmentModule(checkpoint["config"])
        model.load_state_dict(checkpoint["model_state_dict"])

    `config`: a dictionary, or an object with these fields: event_dim, target_dim, hidden_dim, and dropout if it is
    not 0.1. ConfigError: one is missing or out of range. A `.pt` file is read without its pickle by `ray-app
    import-checkpoint`; `ray_app.load` opens the result.
    """

    def __init__(self, config: Any) -> None:
        fields = dict(config) if isinstance(config, Mapping) else vars(config)
        if missing := [name for name in DIMS if not isinstance(fields.get(name), int)]:
            raise ConfigError(f"config.{missing[0]} is {fields.get(missing[0])!r}; it must be a whole number")
        dims = {name: fields[name] for name in DIMS}
        super().__init__(AdapterConfig(STRATEGY, **dims, dropout=float(fields.get("dropout", 0.1))))
        self.dropout: nn.Module = TorchDropout(self.config.dropout)  # type: ignore[assignment]  # drawn by torch

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under the reference's names, or under this project's."""
        return super().load_state_dict({KEYS.get(name, name): w for name, w in state_dict.items()}, strict, assign)


class TorchDropout(nn.Dropout):
    """Dropout from torch's own generator, called as `NoisyDropout` is."""

    def forward(self, input: Tensor, noise: None = None) -> Tensor:  # noqa: ARG002
        return super().forward(input)
