"""Encoder: pictures in, tokens out. One class for every image model of transformers; others build on it.

Shapes: N = features of a batch, I = pictures of a feature, B = N · I pictures, C = 3 colours, h, w = pixels that the
model takes, T = tokens of a picture, P = those before the grid (class token, registers), W = width of a token.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ray_app.encoders.library import transformers
from ray_app.encoders.preprocessing import read_preprocessing
from ray_app.encoders.weights import ModelWeights, require_keys, update_digest
from ray_app.errors import InputError
from ray_app.store.manifest import EncoderRecord, FeatureSpec

BATCH_IMAGES = {"cpu": 4, "cuda": 32}
"""Pictures of one forward pass: on a CPU as many as its caches hold the work of."""
ComputeType = Literal["float32", "float16", "bfloat16"]
WITHOUT_EFFECT = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
"""Settings of config.json that change nothing of what an encoder computes."""
PARTS = {
    "clip": ("vision_config", "vision_model.", "clip_vision_model"),
    "siglip": ("vision_config", "vision_model.", "siglip_vision_model"),
}
"""Models of pictures and texts: section of config.json, prefix of the keys and kind of their picture side."""
STORED: dict[str, Literal["float32", "float16", "bfloat16"]] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


@dataclass(frozen=True)
class EncoderSettings:
    """Choices of what is taken from a model."""

    layer: int | None = None
    """Layer from the last one, -1; None: the model's own choice."""
    pool: str = "none"
    """Tokens of a picture that are kept: none (all), mean, cls, or rows x columns of means, such as 3x3."""
    projector: bool = False
    """Take the tokens behind the projector to the language model, where there is one."""
    dtype: ComputeType = "float32"
    """Number format of weights and forward pass."""
    num_images: int = 1
    """Pictures of one feature."""


@dataclass(frozen=True)
class GridTokens:
    """Tokens of pictures, and how they cover them."""

    tokens_BTW: Tensor
    """P tokens of the whole picture, then those of the grid, row by row."""
    grid: tuple[int, int]
    """Rows and columns of the grid."""

    @property
    def num_prefix(self) -> int:
        """P."""
        return self.tokens_BTW.shape[1] - self.grid[0] * self.grid[1]


class VisionModel:
    """Any model of transformers that takes `pixel_values`: CLIP, SigLIP, DINOv2, ViT, MobileNetV2 and others."""

    own_event_images = 1
    """Event images of a feature where no number is asked for."""
    own_frames = 1
    """Frames of a feature where no number is asked for."""
    keeps_prefix = True
    """True if the pool `none` keeps the tokens before the grid."""

    def __init__(self, folder: Path, config: dict[str, Any], settings: EncoderSettings, device: str = "cpu") -> None:
        """InputError: the folder is damaged, or its weights, preprocessing or settings do not fit its config."""
        self.folder, self.config, self.settings = folder, config, settings
        self.device, self.dtype = torch.device(device), getattr(torch, settings.dtype)
        self.layer = self.own_layer() if settings.layer is None else settings.layer
        self.projector = settings.projector
        self.forward_s = 0.0
        """Seconds in forward passes so far."""
        self.preprocess = read_preprocessing(folder)
        self._digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        self.name = self.build(ModelWeights.of_folder(folder))
        """Class of the model, for records and errors."""
        self.sha256 = self._digest.hexdigest()

    def own_layer(self) -> int:
        """Return the layer where none is asked for."""
        return -1

    def identity(self) -> dict[str, Any]:
        """Return the part of the config that decides what the encoder computes."""
        return {key: value for key, value in self.config.items() if key not in WITHOUT_EFFECT}

    def build(self, weights: ModelWeights) -> str:
        """Set up the model from the folder's weights and return its name."""
        if self.projector:
            raise InputError(
                f"{self.folder} is no model of pictures and language with a projector between them; leave out "
                "--projector."
            )
        kind = str(self.config.get("model_type"))
        section, prefix, part = PARTS.get(kind, ("", "", kind))
        self.model = self.tower(weights, self.config[section] if section else self.config, prefix, part)
        return type(self.model).__name__

    def tower(self, weights: ModelWeights, config: dict[str, Any], prefix: str, model_type: str) -> Any:
        """Return an image model of some settings, with the weights whose keys begin with `prefix`."""
        hf = transformers()
        try:
            hf_config = hf.AutoConfig.for_model(**{**config, "model_type": model_type})
            model_class = hf.MODEL_MAPPING[type(hf_config)]
        except Exception as error:  # the library's checks of a config raise errors of many kinds
            raise InputError(
                f"{self.folder}: its config is none of an image model of transformers "
                f"({model_type}: {' '.join(str(error).split())})."
            ) from error
        if model_class.main_input_name != "pixel_values":
            raise InputError(
                f"{self.folder} is a {model_class.__name__}, which takes {model_class.main_input_name}, not pictures."
            )
        tensors = self.tensors(weights, prefix)
        model, found = model_class.from_pretrained(
            None,
            config=hf_config,
            state_dict=tensors,
            dtype=self.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        require_keys(
            self.folder,
            model_class.__name__,
            missing=sorted(found["missing_keys"]),
            surplus=sorted(found["unexpected_keys"]),
            other=sorted(str(each[0]) for each in found["mismatched_keys"]),
        )
        return model.to(self.device).eval()

    def tensors(self, weights: ModelWeights, prefix: str) -> dict[str, Tensor]:
        """Read weights and count them in the encoder's checksum."""
        tensors = weights.read(prefix)
        self._digest.update(prefix.encode())
        update_digest(self._digest, tensors)
        return tensors

    def hidden(self, pixels_BChw: Tensor) -> GridTokens:
        """Return the tokens of the chosen layer."""
        states = self.model(pixels_BChw, output_hidden_states=self.layer != -1, return_dict=True)
        if self.layer == -1:
            return self.as_tokens(states.last_hidden_state, pixels_BChw)
        return self.as_tokens(self.chosen(states.hidden_states), pixels_BChw)

    def chosen(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Return the chosen hidden state. InputError: the model has fewer layers."""
        if -self.layer > len(hidden_states):
            raise InputError(
                f"--layer {self.layer}: {self.folder.name} ({self.name}) has {len(hidden_states)} layers."
            )
        return hidden_states[self.layer]

    def as_tokens(self, states: Tensor, pixels_BChw: Tensor) -> GridTokens:
        """Return states as tokens: a map of features row by row; of a sequence the last h·w / patch² are the grid."""
        if states.ndim == 4:
            return GridTokens(states.flatten(2).transpose(1, 2), (states.shape[2], states.shape[3]))
        patch = getattr(self.model.config, "patch_size", None)
        rows, columns = (side // patch if patch else 0 for side in pixels_BChw.shape[2:])
        if states.ndim != 3 or not 0 < rows * columns <= states.shape[1]:
            raise InputError(
                f"{self} gives states of shape {list(states.shape)} of {list(pixels_BChw.shape[2:])} pixels, no grid "
                "of tokens."
            )
        return GridTokens(states, (rows, columns))

    def tokens(self, pixels_BChw: Tensor) -> Tensor:
        """Return the kept tokens of each feature, (N, T, W), from N · I pictures in order."""
        kept_BTW = pooled(self.hidden(pixels_BChw), self.settings.pool, self.keeps_prefix, str(self))
        return kept_BTW.reshape(-1, self.settings.num_images * kept_BTW.shape[1], kept_BTW.shape[2])

    @torch.inference_mode()
    def encode_pixels(self, pixels_BChw: NDArray[np.float32]) -> Tensor:
        """Return the features (N, T, W) of preprocessed pictures, in float32 on the CPU, batch by batch."""
        step = max(BATCH_IMAGES[self.device.type] // self.settings.num_images, 1) * self.settings.num_images
        began = time.perf_counter()
        parts = [
            self.tokens(torch.from_numpy(pixels_BChw[first : first + step]).to(self.device, self.dtype)).float()
            for first in range(0, len(pixels_BChw), step)
        ]
        features = torch.cat(parts).cpu()
        self.forward_s += time.perf_counter() - began
        return features

    def encode(self, images: Sequence[Sequence[NDArray[np.uint8]]]) -> Tensor:
        """Return the features (N, T, W), float32, of N times I RGB pictures (H, W, 3)."""
        assert all(len(each) == self.settings.num_images for each in images), "as many pictures as the encoder takes"
        return self.encode_pixels(np.stack([self.preprocess(image) for each in images for image in each]))

    def record(self) -> EncoderRecord:
        """Return what a manifest says of this encoder."""
        return EncoderRecord(
            model=self.name,
            sha256=self.sha256,
            layer=self.layer,
            pool=self.settings.pool,
            projector=self.projector,
            dtype=self.settings.dtype,
            num_images=self.settings.num_images,
            preprocessing=self.preprocess.describe(),
        )

    def feature_spec(self, dtype: str) -> FeatureSpec:
        """Return the layout of its features, stored as bf16, fp16 or fp32, found by encoding grey pictures.

        InputError: it does not take such pictures.
        """
        height, width = self.preprocess.size
        try:
            grey = self.encode_pixels(np.zeros((self.settings.num_images, 3, height, width), np.float32))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self} does not take pictures of {height} x {width} pixels, as its preprocessor config makes them: "
                f"{str(error).splitlines()[0]}"
            ) from error
        _, tokens, token_width = grey.shape
        shape = (token_width,) if tokens == 1 else (tokens, token_width)
        return FeatureSpec(dtype=STORED[dtype], shape=shape, scale=1.0, encoder=self.record())

    def __str__(self) -> str:
        return f"{self.folder.name} ({self.name})"


def pooled(found: GridTokens, pool: str, keeps_prefix: bool, name: str) -> Tensor:
    """Return the kept tokens, (B, T, W). InputError: no class token, or more places than the grid has."""
    tokens_BTW, first = found.tokens_BTW, found.num_prefix
    if pool == "none":
        return tokens_BTW if keeps_prefix else tokens_BTW[:, first:]
    if pool == "cls":
        if not first:
            raise InputError(f"--pool cls: {name} has no class token; take none, mean, or a grid such as 3x3.")
        return tokens_BTW[:, :1]
    grid_BTW = tokens_BTW[:, first:]
    if pool == "mean":
        return grid_BTW.mean(dim=1, keepdim=True)
    match = re.fullmatch(r"(\d+)x(\d+)", pool)
    assert match, "checked by the settings' type"
    rows, columns = int(match[1]), int(match[2])
    if rows > found.grid[0] or columns > found.grid[1]:
        raise InputError(f"--pool {pool}: {name} has a grid of {found.grid[0]} x {found.grid[1]} tokens, take less.")
    map_BWhw = grid_BTW.transpose(1, 2).unflatten(2, found.grid)
    return F.adaptive_avg_pool2d(map_BWhw, (rows, columns)).flatten(2).transpose(1, 2)
