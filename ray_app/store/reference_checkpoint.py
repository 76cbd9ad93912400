"""A checkpoint of the reference project (a `.pt` with a pickled config) as an adapter, without running its pickle.

The reference computes scale · (mlp(x) + 0.1 · x), mlp: Linear, LayerNorm, GELU, Dropout, Linear, as our strategy
`lightweight_reference` does.

Shapes: E = event width, D = target width, H = hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import meta_adapter
from ray_app.errors import CheckpointError, ConfigError
from ray_app.parsing.pickle_tree import Call, type_name
from ray_app.store.atomic import sha256_file
from ray_app.store.manifest import PIXELS, Features, FeatureSpec
from ray_app.store.torch_archive import TorchArchive, items_of, open_torch_archive

CONFIG_CLASSES = ("LightweightAlignmentConfig", "AlignmentConfig")
"""The only classes that a file may ask for, in whatever module; only the fields are read."""
STRATEGY = "lightweight_reference"
KEYS = {
    "adapter.mlp.0.weight": "input.weight",
    "adapter.mlp.0.bias": "input.bias",
    "adapter.mlp.1.weight": "norm.weight",
    "adapter.mlp.1.bias": "norm.bias",
    "adapter.mlp.4.weight": "output.weight",
    "adapter.mlp.4.bias": "output.bias",
    "scale": "scale",
}
"""Name of a weight in the reference: its name here."""
DIMS = ("event_dim", "target_dim", "hidden_dim")
FIXED: dict[str, Any] = {"adapter_type": "mlp", "num_layers": 2, "use_layer_norm": True, "use_whitening": False}
"""Settings of the reference and the one value of each that this strategy computes, which is its default too."""


@dataclass(frozen=True, slots=True)
class ReferenceCheckpoint:
    """Contents of a reference file in our form."""

    adapter: Adapter
    """Adapter in evaluation mode, on the CPU."""
    features: Features
    """Pixels where the width is that of an image, else floats of the config's width."""
    settings: dict[str, Any]
    """Plain values of the reference's config."""
    left_out: tuple[str, ...]
    """Keys of the file that are not carried over, such as the optimizer's state."""
    sha256: str
    """Checksum of the file."""


def read_reference_checkpoint(path: Path) -> ReferenceCheckpoint:
    """CheckpointError, before anything is unpickled, if the file is damaged or asks for anything but the config."""
    with open_torch_archive(path) as archive:
        return _converted(path, archive, archive.tree(lambda name: name.name in CONFIG_CLASSES))


def _converted(path: Path, archive: TorchArchive, document: Any) -> ReferenceCheckpoint:
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type_name(document)}, not a dict with config and weights.")
    for key in ("config", "model_state_dict"):
        if key not in document:
            held = ", ".join(str(key)[:40] for key in list(document)[:20]) or "nothing"
            raise CheckpointError(
                f"{path} has no '{key}' (it holds: {held}), so it is no checkpoint of the reference."
            )
    settings = _settings(path, document["config"])
    config = _adapter_config(path, settings)
    try:
        adapter = meta_adapter(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: config cannot be used: {error}.") from error
    weights = _weights(path, archive, items_of(document["model_state_dict"]), adapter)
    adapter.load_state_dict(weights, assign=True)
    return ReferenceCheckpoint(
        adapter=adapter.eval(),
        features=Features(event=_feature(config.event_dim), target=_feature(config.target_dim)),
        settings={key: value for key, value in settings.items() if isinstance(value, str | int | float | None)},
        left_out=tuple(str(key)[:40] for key in document if key not in ("config", "model_state_dict")),
        sha256=sha256_file(path),
    )


def _settings(path: Path, config: Any) -> dict[str, Any]:
    """Return the fields of the config, pickled or plain."""
    fields = config.state if isinstance(config, Call) and config.name.name in CONFIG_CLASSES else config
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: config is a {type_name(config)} without fields; it must name the widths.")
    return fields


def _adapter_config(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """CheckpointError unless the settings describe what `lightweight_reference` computes."""
    for key in DIMS:
        if type(settings.get(key)) is not int:
            raise CheckpointError(f"{path}: config.{key} is {shown(settings.get(key))}; it must be a whole number.")
    for key, value in FIXED.items():
        setting = settings.get(key, value)
        if type(setting) is not type(value) or setting != value:
            raise CheckpointError(
                f"{path}: config.{key} is {shown(setting)}; only {value!r} can be imported (as {STRATEGY})."
            )
    event_dim, target_dim, hidden_dim = (settings[key] for key in DIMS)
    residual, dropout = settings.get("use_residual", True), settings.get("dropout", 0.1)
    if residual is not (event_dim == target_dim):
        raise CheckpointError(
            f"{path}: config.use_residual is {shown(residual)} with event_dim {event_dim} and target_dim "
            f"{target_dim}; {STRATEGY} has a residual connection exactly where the two are equal, and no learned one."
        )
    if not isinstance(dropout, int | float):
        raise CheckpointError(f"{path}: config.dropout is {shown(dropout)}; it must be a number.")
    try:
        return AdapterConfig(STRATEGY, event_dim, target_dim, hidden_dim, float(dropout))
    except (ConfigError, OverflowError) as error:
        raise CheckpointError(f"{path}: config cannot be used: {error}.") from error


def _weights(path: Path, archive: TorchArchive, state: Any, adapter: Adapter) -> dict[str, Tensor]:
    """Return the reference's weights under our names. CheckpointError names a missing, extra or unfit key."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: model_state_dict is a {type_name(state)}, not a dict of tensors.")
    if missing := [key for key in KEYS if key not in state]:
        raise CheckpointError(f"{path}: model_state_dict has no {', '.join(missing)}.")
    if foreign := [str(key) for key in state if key not in KEYS]:
        raise CheckpointError(
            f"{path}: model_state_dict has {', '.join(foreign)[:500]}, which {STRATEGY} does not have."
        )
    expected = adapter.state_dict()
    weights: dict[str, Tensor] = {}
    for theirs, ours in KEYS.items():
        tensor = archive.tensor(state[theirs], theirs)
        if tensor.shape != expected[ours].shape:
            raise CheckpointError(
                f"{path}: {theirs} has shape {list(tensor.shape)}, the config asks for {list(expected[ours].shape)}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {theirs} holds NaN or infinite numbers.")
        weights[ours] = tensor.to(torch.float32)
    return weights


def _feature(width: int) -> FeatureSpec:
    return PIXELS if width == PIXELS.width else FeatureSpec(dtype="float32", shape=(width,), scale=1.0)


def shown(value: Any) -> str:
    """Text of a plain value, of another its kind."""
    return repr(value)[:40] if isinstance(value, str | int | float | None) else type_name(value)
