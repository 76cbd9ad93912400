"""Encoders of a replica: pictures that were sent become the features that its model was trained on.

Shapes: N = pairs of all requests, B = pairs of a request, I = pictures of a pair, M = pictures of all, W = width of a
feature, C = 3 colours, h, w = pixels that an encoder takes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ray_app.config.serve import EndpointConfig
from ray_app.encoders.base import VisionModel
from ray_app.encoders.registry import Side, load_sides
from ray_app.errors import ConfigError
from ray_app.store.manifest import Features, FeatureSpec

from ..protocol.inputs import Pictures, Rows

Encoders = Mapping[Side, VisionModel]
"""Encoder of each side that has one here."""
NO_ENCODERS: Encoders = MappingProxyType({})


def load_encoders(cfg: EndpointConfig, features: Features, device: str) -> Encoders:
    """Load the encoders whose folders are named, verified by the SHA-256 that the model's features have, and warm.

    ConfigError: no encoder made them. InputError: the folder holds another one.
    """
    named: dict[Side, Path | None] = {"event": cfg.event_encoder, "target": cfg.target_encoder}
    folders = {side: folder for side, folder in named.items() if folder}
    for side, folder in folders.items():
        spec: FeatureSpec = getattr(features, side)
        if spec.encoder is None:
            raise ConfigError(
                f"--{side}-encoder {folder}: the {side} features of {cfg.checkpoint} come from no encoder ({spec}); "
                "leave it out."
            )
    encoders = load_sides(folders, features, device)
    for encoder in distinct(encoders):
        encoder.feature_spec("fp32")
    return encoders


def distinct(encoders: Encoders) -> list[VisionModel]:
    """Return the encoders, each once."""
    return list({id(encoder): encoder for encoder in encoders.values()}.values())


def rows_within(seconds: float, encoders: Encoders, most: int) -> int:
    """Return the pairs of a pass whose pictures are encoded in so many seconds, by what the first one took."""
    pair_s = sum(encoder.forward_s for encoder in encoders.values())
    return max(1, min(most, int(seconds / pair_s))) if pair_s else most


def num_weights(encoders: Encoders) -> int:
    """Return the number of weights of the encoders."""
    return sum(weight.numel() for encoder in distinct(encoders) for weight in encoder.model.parameters())


def encoded(sent: Sequence[Rows], spec: FeatureSpec, encoder: VisionModel | None) -> list[Tensor]:
    """Return features as they are, and pictures as features (B, W) in the store's precision, encoded together."""
    pictures = [rows.images_BIChw for rows in sent if isinstance(rows, Pictures)]
    made: list[Tensor] = []
    if pictures:
        assert encoder, "pictures for a side without an encoder are refused before"
        images_MChw = np.concatenate([each.reshape(-1, *each.shape[2:]) for each in pictures])
        pixels_MChw = np.stack([encoder.preprocess.numbers(image.transpose(1, 2, 0)) for image in images_MChw])
        features_NW = encoder.encode_pixels(pixels_MChw).flatten(1).to(getattr(torch, spec.dtype)).float()
        made = list(features_NW.split([len(each) for each in pictures]))
    parts = iter(made)
    return [next(parts) if isinstance(rows, Pictures) else rows for rows in sent]
