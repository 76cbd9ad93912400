"""Checkpoints: folders that appear whole or not at all, and are verified before anything is read.

    config.json  model.safetensors  golden.safetensors  metrics.json  provenance.json  MANIFEST.sha256

Training state (optimizer, position) is a folder of the same kind. Nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import meta_adapter
from ray_app.errors import CheckpointError, ConfigError
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_bytes, sha256_file, staged_folder, verify_folder
from ray_app.store.golden import TOLERANCE, assembled, golden_answers, relative_errors, run_golden
from ray_app.store.manifest import Features, require_same_features

MODEL = "model.safetensors"
GOLDEN = "golden.safetensors"
FORMAT = "ray_app checkpoint 1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint."""

    adapter: Adapter
    """Adapter in evaluation mode, on the CPU."""
    config: AdapterConfig
    """Settings the adapter was built from."""
    metrics: dict[str, Any]
    """Metrics measured when it was saved."""
    provenance: dict[str, Any]
    """Command, code, versions, machine and data it comes from."""
    features: Features
    """Type, shape and scale of the features it was trained on."""
    folder: Path
    """Folder it was read from."""
    sha256: str
    """SHA-256 of MANIFEST.sha256, so of all its bytes: the checkpoint's identity."""

    def require(self, features: Features) -> None:
        """Raise CheckpointError unless these are the features that the adapter was trained on."""
        require_same_features(self.features, features, str(self.folder))


def save_checkpoint(
    folder: Path,
    adapter: Adapter,
    *,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    features: Features,
) -> str:
    """Write a checkpoint and return its identity. CheckpointError if the folder exists.

    The adapter may be training, on any device; it is not changed.
    """
    documents = {
        "config.json": {
            "format": FORMAT,
            "adapter": adapter.config.to_dict(),
            "features": features.model_dump(mode="json"),
        },
        "metrics.json": dict(metrics),
        "provenance.json": dict(provenance),
    }
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.state_dict().items()}
    golden = golden_answers(assembled(adapter.config, weights), features.event)
    return _save(folder, {MODEL: weights, GOLDEN: golden}, documents)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify every file, then read. CheckpointError names the bad file."""
    sha256 = verify_folder(folder)
    config_json = _read_json(folder / "config.json")
    if config_json.get("format") != FORMAT:
        raise CheckpointError(f"{folder / 'config.json'}: format {config_json.get('format')!r}, not {FORMAT!r}.")
    try:
        config = AdapterConfig.from_dict(config_json["adapter"])
        empty = meta_adapter(config)
        features = Features.model_validate(config_json["features"])
    except (KeyError, ConfigError, ValidationError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error
    return Checkpoint(
        adapter=_adapter_from(folder / MODEL, empty),
        config=config,
        metrics=_read_json(folder / "metrics.json"),
        provenance=_read_json(folder / "provenance.json"),
        features=features,
        folder=folder,
        sha256=sha256,
    )


def replay_golden(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the adapter answers its golden inputs as it did when it was saved.

    Every number must be within `TOLERANCE` of its row's root mean square.
    """
    path = checkpoint.folder / GOLDEN
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint.folder} has no {GOLDEN}: an older version saved it, and nothing shows that it still "
            "answers as it did then. Train it again, or save it again with this version."
        )
    try:
        golden = load_file(path, backend="pread")
        event_GE, golden_GD = golden["event"], golden["aligned"]
        aligned_GD = run_golden(checkpoint.adapter, event_GE, checkpoint.features.event.scale)
        if not len(golden_GD) or aligned_GD.shape != golden_GD.shape:
            raise ValueError(f"{list(golden_GD.shape)} numbers, not {list(aligned_GD.shape)}")
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its config.json: {error}") from error
    same_G = (aligned_GD == golden_GD).all(dim=1)  # all zeros have no relative error
    for row, relative in enumerate(relative_errors(aligned_GD, golden_GD).tolist()):
        if not (relative <= TOLERANCE or same_G[row]):
            raise CheckpointError(
                f"{path}: golden row {row} is answered with a relative error of {relative:.1e} (limit "
                f"{TOLERANCE:.0e}). The weights, the formula or config.json are not those that were saved; use "
                "another checkpoint, or the version of this program that saved it."
            )


def save_training_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Write what resuming needs in addition to the weights: tensors by name, and JSON values."""
    return _save(folder, {"training_state.safetensors": tensors}, {"training_state.json": dict(meta)})


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors by name, JSON values), verified. CheckpointError names the bad file."""
    verify_folder(folder)
    return load_file(folder / "training_state.safetensors", backend="pread"), _read_json(
        folder / "training_state.json"
    )


def _save(
    folder: Path, tensor_files: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, dict[str, Any]]
) -> str:
    if folder.exists():
        raise CheckpointError(f"{folder} already exists; nothing is overwritten.")
    with staged_folder(folder) as partial:
        for file, tensors in tensor_files.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial / file)
        for file, document in documents.items():
            (partial / file).write_text(json.dumps(document, indent=1) + "\n")
        files = sorted((*tensor_files, *documents))
        sums = "".join(f"{sha256_file(partial / file)}  {file}\n" for file in files).encode()
        (partial / CHECKSUMS_FILE).write_bytes(sums)
    return sha256_bytes(sums)


def _adapter_from(path: Path, empty: Adapter) -> Adapter:
    expected = {key: tuple(tensor.shape) for key, tensor in empty.state_dict().items()}
    tensors = load_file(path, backend="pread")
    actual = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if expected != actual:
        differing = sorted(k for k in expected | actual if expected.get(k) != actual.get(k))
        raise CheckpointError(f"{path} does not fit its config.json: {', '.join(differing)} differ.")
    return assembled(empty.config, tensors)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
