"""Weights of a local model folder: only safetensors, and only the files that hold the wanted keys.

A checkpoint of many files has an index, `model.safetensors.index.json`, from key to file. Of a model of 7 billion
weights an image tower is 0.3 billion: its keys share a prefix, and the rest is not read.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ray_app.encoders.model_folder import read_json
from ray_app.errors import InputError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BUFFER = "position_ids"
"""Last part of a key that old checkpoints have and no model needs: the numbers from 0 on."""
NUM_NAMED = 3


@dataclass(frozen=True)
class ModelWeights:
    """The keys of a folder's safetensors, and the file of each."""

    folder: Path
    """Folder of the model."""
    files: Mapping[str, str]
    """File name by key."""

    @staticmethod
    def of_folder(folder: Path) -> "ModelWeights":
        """Read the index, or the heads of the files. InputError: no safetensors, or a damaged file."""
        if (folder / INDEX).is_file():
            files = read_json(folder, INDEX).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise InputError(f"{folder / INDEX} has no weight_map from keys to file names.")
            if away := sorted({name for name in files.values() if not (folder / Path(name).name).is_file()}):
                raise InputError(f"{folder / Path(away[0]).name} is missing, and {INDEX} names it; copy it again.")
            return ModelWeights(folder, {key: Path(name).name for key, name in files.items()})
        found: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                found |= dict.fromkeys(file.keys(), path.name)
        if not found:
            pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
            raise InputError(
                f"{folder} has no weights in safetensors"
                + (
                    f". Pickles ({pickles[0]}) can run any code and are not read: convert them"
                    if pickles
                    else "; save"
                )
                + " with save_pretrained(..., safe_serialization=True)."
            )
        return ModelWeights(folder, found)

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors whose keys begin with `prefix`, without it. InputError: none, or a damaged file."""
        keys: dict[str, list[str]] = {}
        for key, name in self.files.items():
            if key.startswith(prefix) and not key.endswith(BUFFER):
                keys.setdefault(name, []).append(key)
        if not keys:
            raise InputError(f"{self.folder} has no weights named {prefix}…, which this encoder is made of.")
        tensors: dict[str, Tensor] = {}
        for name, wanted in sorted(keys.items()):
            with _opened(self.folder / name) as file:
                for key in sorted(wanted):
                    try:
                        tensors[key.removeprefix(prefix)] = file.get_tensor(key)
                    except SafetensorError as error:
                        raise InputError(f"{self.folder / name} has no {key}, which {INDEX} promises.") from error
        return tensors

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors whose keys begin with `prefix`, by whole key."""
        found: dict[str, tuple[int, ...]] = {}
        for name in sorted({name for key, name in self.files.items() if key.startswith(prefix)}):
            with _opened(self.folder / name) as file:
                here = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in here}
        return found


def update_digest(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and bytes of tensors, in the order of their names: files do not matter."""
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def require_keys(folder: Path, model: str, *, missing: list[str], surplus: list[str], other: list[str]) -> None:
    """InputError names keys that a model lacks, does not have, or has in another shape."""
    parts = [
        f"{len(keys)} {what}: {', '.join(keys[:NUM_NAMED])}{', …' if len(keys) > NUM_NAMED else ''}"
        for what, keys in (("missing", missing), ("too many", surplus), ("of another shape", other))
        if keys
    ]
    if parts:
        raise InputError(
            f"{folder}: its weights are not those of the {model} that config.json describes ({'; '.join(parts)}). "
            "Take the folder that the bare model was saved to."
        )


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give a module on the meta device its weights. InputError: other keys or shapes than it has."""
    own = module.state_dict()
    require_keys(
        folder,
        type(module).__name__,
        missing=sorted(own.keys() - tensors.keys()),
        surplus=sorted(tensors.keys() - own.keys()),
        other=sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape),
    )
    module.load_state_dict(dict(tensors), assign=True)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no whole file of safetensors: {error}") from error
