"""A checkpoint of the reference project (a `.pt` with a pickled config) as an adapter, without running its pickle.

The reference computes scale · (mlp(x) + 0.1 · x), mlp: Linear, LayerNorm, GELU, Dropout, Linear, as our strategy
`lightweight_reference` does.

Shapes: E = event width, D = target width, H = hidden width.
"""

import pickle
import struct
import zipfile
import zlib
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
from ray_app.store.atomic import sha256_file
from ray_app.store.manifest import PIXELS, Features, FeatureSpec

CONFIG_CLASSES = ("LightweightAlignmentConfig", "AlignmentConfig")
"""The only classes that a file may ask for; a stand-in is given for them, whatever module they are in."""
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
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of what torch.save wrote before torch 1.6: not a zip archive, but pickles one after the other."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error, struct.error)
"""Exceptions of a read from a damaged or odd archive."""
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    AssertionError,
    AttributeError,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)
"""Exceptions of torch's restricted unpickler on a stream that torch.save did not write."""


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


class _PickledConfig:
    """Replaces the reference's config class: keeps the fields and does nothing."""

    __slots__ = ("fields",)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.fields = dict(state)


def read_reference_checkpoint(path: Path) -> ReferenceCheckpoint:
    """CheckpointError, before anything is unpickled, if the file is damaged or asks for anything but the config."""
    _check_archive(path)
    document = _load(path)
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, not a dict with config and weights.")
    for key in ("config", "model_state_dict"):
        if key not in document:
            held = ", ".join(map(str, document)) or "nothing"
            raise CheckpointError(
                f"{path} has no '{key}' (it holds: {held}), so it is no checkpoint of the reference."
            )
    settings = _settings(path, document["config"])
    config = _adapter_config(path, settings)
    adapter = meta_adapter(config)
    weights = _weights(path, document["model_state_dict"], adapter)
    adapter.load_state_dict(weights, assign=True)
    return ReferenceCheckpoint(
        adapter=adapter.eval(),
        features=Features(event=_feature(config.event_dim), target=_feature(config.target_dim)),
        settings={key: value for key, value in settings.items() if isinstance(value, str | int | float | None)},
        left_out=tuple(str(key) for key in document if key not in ("config", "model_state_dict")),
        sha256=sha256_file(path),
    )


def _check_archive(path: Path) -> None:
    """CheckpointError unless this is a whole archive of torch.save. Reads every byte: torch does not verify sums."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; name a .pt file of the reference.")
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
        if start == LEGACY:
            raise CheckpointError(
                f"{path} was written by torch before 1.6, as bare pickles; save it again with a newer torch."
            )
        if not zipfile.is_zipfile(path):
            if start.startswith(b"PK\x03\x04"):
                raise CheckpointError(f"{path} is truncated: the directory at its end is missing. Copy it again.")
            raise CheckpointError(f"{path} is not a torch checkpoint, which is a zip archive of torch.save.")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(record.filename.endswith("/data.pkl") for record in records):
                raise CheckpointError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl.")
            if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
                raise CheckpointError(f"{path}: {packed[0]} is compressed, which torch.save never does.")
            damaged = archive.testzip()
    except ZIP_ERRORS as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}.") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not hold.")


def _load(path: Path) -> Any:
    """Return the file's values. Refuses, by name, every class that it asks for but the config's."""
    try:
        asked = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint: {_first_line(error)}.") from error
    if foreign := [name for name in asked if name.rpartition(".")[2] not in CONFIG_CLASSES]:
        raise CheckpointError(
            f"{path} asks for {', '.join(foreign)}; nothing was loaded, because only plain values, tensors and "
            f"{' or '.join(CONFIG_CLASSES)} are accepted."
        )
    try:
        with torch.serialization.safe_globals([(_PickledConfig, name) for name in asked]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint: {_first_line(error)}.") from error


def _settings(path: Path, config: Any) -> dict[str, Any]:
    """Return the fields of the config, pickled or plain."""
    fields = getattr(config, "fields", None) if isinstance(config, _PickledConfig) else config
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: config is a {type(config).__name__} without fields; it must name the widths.")
    return fields


def _adapter_config(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """CheckpointError unless the settings describe what `lightweight_reference` computes."""
    for key in DIMS:
        if type(settings.get(key)) is not int:
            raise CheckpointError(f"{path}: config.{key} is {settings.get(key)!r}; it must be a whole number.")
    for key, value in FIXED.items():
        if settings.get(key, value) != value:
            raise CheckpointError(
                f"{path}: config.{key} is {settings[key]!r}; only {value!r} can be imported (as {STRATEGY})."
            )
    event_dim, target_dim, hidden_dim = (settings[key] for key in DIMS)
    residual, dropout = settings.get("use_residual", True), settings.get("dropout", 0.1)
    if residual != (event_dim == target_dim):
        raise CheckpointError(
            f"{path}: config.use_residual is {residual!r} with event_dim {event_dim} and target_dim {target_dim}; "
            f"{STRATEGY} has a residual connection exactly where the two are equal, and no learned one."
        )
    if not isinstance(dropout, int | float):
        raise CheckpointError(f"{path}: config.dropout is {dropout!r}; it must be a number.")
    try:
        return AdapterConfig(STRATEGY, event_dim, target_dim, hidden_dim, float(dropout))
    except ConfigError as error:
        raise CheckpointError(f"{path}: config cannot be used: {error}.") from error


def _weights(path: Path, state: Any, adapter: Adapter) -> dict[str, Tensor]:
    """Return the reference's weights under our names. CheckpointError names a missing, extra or unfit key."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: model_state_dict is a {type(state).__name__}, not a dict of tensors.")
    if missing := [key for key in KEYS if key not in state]:
        raise CheckpointError(f"{path}: model_state_dict has no {', '.join(missing)}.")
    if foreign := [str(key) for key in state if key not in KEYS]:
        raise CheckpointError(f"{path}: model_state_dict has {', '.join(foreign)}, which {STRATEGY} does not have.")
    expected = adapter.state_dict()
    weights: dict[str, Tensor] = {}
    for theirs, ours in KEYS.items():
        tensor = state[theirs]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in FLOATS:
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {theirs} is {kind}; it must be a tensor of float32, float16 or bfloat16.")
        if tensor.shape != expected[ours].shape:
            raise CheckpointError(
                f"{path}: {theirs} has shape {list(tensor.shape)}, the config asks for {list(expected[ours].shape)}."
            )
        if not tensor.is_contiguous():  # an expanded tensor claims more memory than the file has bytes
            raise CheckpointError(f"{path}: {theirs} is not contiguous, as the weights of a module are.")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {theirs} holds NaN or infinite numbers.")
        weights[ours] = tensor.detach().to(torch.float32)
    return weights


def _feature(width: int) -> FeatureSpec:
    return PIXELS if width == PIXELS.width else FeatureSpec(dtype="float32", shape=(width,), scale=1.0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
