"""Checkpoints: folders that appear whole or not at all, and are verified before anything is read.

    config.json  model.safetensors  golden.safetensors  metrics.json  provenance.json  MANIFEST.sha256

Training state (optimizer, position) is a folder of the same kind. Nothing is ever unpickled.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import meta_adapter
from ray_app.core.adapters.slices import WHOLE, FeatureSlice, TensorSlice
from ray_app.errors import CheckpointError, ConfigError
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_file, staged_folder, verify_folder
from ray_app.store.golden import TOLERANCE, assembled, golden_answers, relative_errors, run_golden
from ray_app.store.manifest import Features, require_same_features, require_target_features

MODEL = "model.safetensors"
GOLDEN = "golden.safetensors"
FORMAT = "ray_app checkpoint 1"
WHOLE_TENSORS: Mapping[str, TensorSlice] = {}
"""Default of `slices`: no tensor is wanted in part."""
SAFETENSORS_ERRORS = (OSError, SafetensorError, ValueError, RuntimeError, KeyError, AttributeError)
"""Exceptions of a read from a damaged file, or of a type that torch lacks."""


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A float32 tensor that is not whole in this process: it arrives row by row while it is written."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    blocks: Iterator[Tensor]
    """Its rows, some at a time, in order."""


Tensors = Mapping[str, Tensor] | Mapping[str, StreamedTensor]
"""Tensors by name, all of one kind."""


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
        """Raise CheckpointError unless the adapter aligns features, and these are those that it was trained on."""
        require_target_features(self.config.strategy, str(self.folder))
        require_same_features(self.features, features, str(self.folder))


def save_checkpoint(
    folder: Path,
    adapter: Adapter,
    *,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    features: Features,
    weights: Mapping[str, StreamedTensor] | None = None,
) -> str:
    """Write a checkpoint and return its identity. CheckpointError if the folder exists.

    The adapter may be training, on any device; it is not changed. `weights`: those of the whole adapter, where this
    one holds a part of them.
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
    with verifiable_folder(folder, documents) as partial:
        if weights is None:
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.state_dict().items()}
            write_tensors(partial / MODEL, whole)
        else:
            write_tensors(partial / MODEL, weights)
            whole = load_file(partial / MODEL)  # as views of the file
        write_tensors(partial / GOLDEN, golden_answers(assembled(adapter.config, whole), features.event))
    return sha256_file(folder / CHECKSUMS_FILE)


def load_checkpoint(folder: Path, part: FeatureSlice = WHOLE) -> Checkpoint:
    """Verify every file, then read. CheckpointError names the bad file.

    `part`: slice of the features that the adapter works on; of its weights no more than that is read.
    """
    sha256 = verify_folder(folder)
    config_json = read_document(folder / "config.json")
    if config_json.get("format") != FORMAT:
        found = config_json.get("format")
        found = found[:40] if isinstance(found, str) else None
        raise CheckpointError(f"{folder / 'config.json'}: format {found!r}, not {FORMAT!r}.")
    try:
        config = AdapterConfig.from_dict(config_json["adapter"])
        empty = meta_adapter(config, part)
        features = Features.model_validate(config_json["features"])
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: features.{place}: {first['msg']}") from error
    widths = (features.event.width, features.target.width)
    if widths != (config.event_dim, config.target_dim):
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be used: its features are {widths} wide, its adapter "
            f"{(config.event_dim, config.target_dim)}."
        )
    return Checkpoint(
        adapter=_adapter_from(folder / MODEL, empty),
        config=config,
        metrics=read_document(folder / "metrics.json"),
        provenance=read_document(folder / "provenance.json"),
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
        golden = read_tensors(path)
        event_GE, golden_GD = golden["event"], golden["aligned"]
        aligned_GD = run_golden(checkpoint.adapter, event_GE, checkpoint.features.event.scale)
        if not len(golden_GD) or aligned_GD.shape != golden_GD.shape:
            raise ValueError(f"{list(golden_GD.shape)} numbers, not {list(aligned_GD.shape)}")
    except (KeyError, ValueError, RuntimeError, IndexError, ConfigError) as error:
        raise CheckpointError(f"{path} does not fit its config.json: {error}") from error
    same_G = (aligned_GD == golden_GD).all(dim=1)  # all zeros have no relative error
    for row, relative in enumerate(relative_errors(aligned_GD, golden_GD).tolist()):
        if not (relative <= TOLERANCE or same_G[row]):
            raise CheckpointError(
                f"{path}: golden row {row} is answered with a relative error of {relative:.1e} (limit "
                f"{TOLERANCE:.0e}). The weights, the formula or config.json are not those that were saved; use "
                "another checkpoint, or the version of this program that saved it."
            )


def save_training_state(folder: Path, tensors: Tensors, meta: Mapping[str, Any]) -> str:
    """Write what resuming needs in addition to the weights: tensors by name, and JSON values."""
    return save_verifiable(folder, {"training_state.safetensors": tensors}, {"training_state.json": dict(meta)})


def load_training_state(
    folder: Path, slices: Mapping[str, TensorSlice] = WHOLE_TENSORS
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors by name, JSON values), verified. CheckpointError names the bad file.

    `slices`: tensors of which a part is wanted; no more is read.
    """
    verify_folder(folder)
    tensors = read_tensors(folder / "training_state.safetensors", slices)
    return tensors, read_document(folder / "training_state.json")


def save_verifiable(
    folder: Path, tensor_files: Mapping[str, Tensors], documents: Mapping[str, dict[str, Any]]
) -> str:
    """Write a folder for `verify_folder` of tensors and JSON objects by file name; return its identity.

    CheckpointError if it exists.
    """
    with verifiable_folder(folder, documents) as partial:
        for file, tensors in tensor_files.items():
            write_tensors(partial / file, tensors)
    return sha256_file(folder / CHECKSUMS_FILE)


@contextmanager
def verifiable_folder(folder: Path, documents: Mapping[str, dict[str, Any]]) -> Iterator[Path]:
    """Yield a folder to fill; at the end JSON objects by file name and all checksums are added for `verify_folder`.

    CheckpointError if it exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} already exists; nothing is overwritten.")
    with staged_folder(folder) as partial:
        yield partial
        for file, document in documents.items():
            (partial / file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        sums = "".join(f"{sha256_file(path)}  {path.name}\n" for path in sorted(partial.iterdir()))
        (partial / CHECKSUMS_FILE).write_text(sums, encoding="utf-8")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file; streamed tensors in their order, each as it arrives."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if len(whole) == len(tensors):
        save_file(whole, path)
        return
    header, end = {}, 0
    for name, tensor in tensors.items():
        first, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            assert isinstance(tensor, StreamedTensor), "tensors of one file are of one kind"
            for block in tensor.blocks:
                file.write(block.detach().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())


def _adapter_from(path: Path, empty: Adapter) -> Adapter:
    slices = empty.slices()
    expected = {key: list((slices.get(key) or tensor).shape) for key, tensor in empty.state_dict().items()}
    actual = tensor_shapes(path)  # before a number is read
    differing = sorted(k for k in expected | actual if expected.get(k) != actual.get(k))
    tensors = {} if differing else read_tensors(path, slices)
    differing += [key for key, weight in empty.named_parameters() if tensors and tensors[key].dtype != weight.dtype]
    if differing:
        raise CheckpointError(f"{path} does not fit its config.json: {', '.join(differing)[:500]} differ.")
    return assembled(empty.config, tensors, empty.part)


def read_document(path: Path) -> dict[str, Any]:
    """Return a JSON object of a checkpoint. CheckpointError: it is missing, no object, or cannot be read as JSON."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a safetensors file's tensors by name. CheckpointError: it is missing, or no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, no mapping
    except SAFETENSORS_ERRORS as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def read_tensors(path: Path, slices: Mapping[str, TensorSlice] = WHOLE_TENSORS) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name. CheckpointError: it is missing, or no such file.

    `slices`: tensors of which a part is wanted; no more is read.
    """
    try:
        if not slices:
            return load_file(path, backend="pread")
        with safe_open(path, framework="pt") as file:
            return {
                key: file.get_slice(key)[slices[key].place].clone() if key in slices else file.get_tensor(key).clone()
                for key in file.keys()  # noqa: SIM118, no mapping
            }
    except SAFETENSORS_ERRORS as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
