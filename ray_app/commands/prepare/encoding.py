"""Encoders of a preparation: chosen and checked before work starts, loaded on each worker, batches cut by file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.commands.prepare.store_builder import pixel_bytes
from ray_app.config.prepare import PrepareFlags
from ray_app.encoders.base import STORED, EncoderSettings, VisionModel
from ray_app.encoders.registry import Side, encoder_class, load_encoder, load_sides
from ray_app.sources.base import ONE_EACH, RawPair, Views
from ray_app.store.manifest import Features, FeatureSpec

SIDES: tuple[Side, Side] = ("event", "target")
BATCH_PAIRS = 32
"""Pairs that are encoded together."""


@dataclass(frozen=True)
class EncodingPlan:
    """Features of a store, and the folders of the encoders that make them."""

    features: Features
    """Layout of both sides."""
    folders: Mapping[Side, Path]
    """Folder of each side that is encoded."""
    device: str
    """Device of the encoders on each worker."""

    @property
    def num_images(self) -> int:
        """Pictures of a pair that go through an encoder."""
        specs = [getattr(self.features, side) for side in self.folders]
        return sum(spec.encoder.num_images for spec in specs)


def views_of(cfg: PrepareFlags) -> Views:
    """Return the pictures of a pair that the encoders take: as asked for, else what each was trained on.

    InputError: a folder without config.json.
    """
    event, target = cfg.event_encoder, cfg.target_encoder
    return Views(
        cfg.num_event_images or (encoder_class(event).own_event_images if event else 1),
        cfg.num_frames or (encoder_class(target).own_frames if target else 1),
    )


def encoding_plan(cfg: PrepareFlags, pixels: FeatureSpec, views: Views = ONE_EACH) -> EncodingPlan | None:
    """Load each encoder once and ask it for its features; None without one.

    A side without an encoder has features of `pixels`. InputError: an encoder that cannot be used.
    """
    folders = {side: folder.absolute() for side in SIDES if (folder := getattr(cfg, f"{side}_encoder"))}
    if not folders:
        return None
    specs = dict.fromkeys(SIDES, pixels)
    for place, side in enumerate(SIDES):
        if side in folders:
            settings = EncoderSettings(
                layer=_of_side(cfg.layer, place),
                pool=_of_side(cfg.pool, place) or "mean",
                projector=cfg.projector,
                dtype=STORED[cfg.dtype] if cfg.use_gpu else "float32",
                num_images=(views.num_event_images, views.num_frames)[place],
            )
            specs[side] = load_encoder(folders[side], settings).feature_spec(cfg.dtype)
    return EncodingPlan(Features(**specs), folders, "cuda" if cfg.use_gpu else "cpu")


class FeatureEncoder:
    """Pairs as features: `PairEncoder` of a plan. The encoders are loaded with the first batch, and verified."""

    num_pairs = BATCH_PAIRS

    def __init__(self, plan: EncodingPlan) -> None:
        self._plan = plan
        self._encoders: dict[Side, VisionModel] | None = None
        self.models: list[VisionModel] = []
        """Encoders that are loaded, each once."""

    @property
    def forward_s(self) -> float:
        """Seconds in forward passes so far."""
        return sum(encoder.forward_s for encoder in self.models)

    def __call__(self, pairs: Sequence[RawPair]) -> list[tuple[bytes, bytes] | str]:
        """Encode both sides. InputError: a folder holds another encoder here than where the command started."""
        if self._encoders is None:
            plan = self._plan
            self._encoders = load_sides(plan.folders, plan.features, plan.device)
            self.models = list({id(encoder): encoder for encoder in self._encoders.values()}.values())
        if not pairs:
            return []
        event, target = (self._side(side, pairs) for side in SIDES)
        return [
            a if isinstance(a, str) else b if isinstance(b, str) else (a, b)
            for a, b in zip(event, target, strict=True)
        ]

    def _side(self, side: Side, pairs: Sequence[RawPair]) -> Sequence[bytes | str]:
        spec = getattr(self._plan.features, side)
        pictures = [pictures_of(pair, side) for pair in pairs]
        if side not in self._plan.folders:
            return [pixel_bytes(each[0], spec) for each in pictures]
        assert self._encoders
        features_NTW = self._encoders[side].encode(pictures)
        return [stored_bytes(feature_TW, spec.dtype, side) for feature_TW in features_NTW]


def pictures_of(pair: RawPair, side: Side) -> list[NDArray[np.uint8]]:
    """Return the pictures of one side of a pair."""
    if side == "event":
        return list(pair.event_images) or [pair.event_HWC]
    return list(pair.frames) or [pair.target_HWC]


def stored_bytes(feature_TW: Tensor, dtype: str, side: str) -> bytes | str:
    """Return a feature as it is stored, or the reason why it cannot be."""
    stored = feature_TW.to(getattr(torch, dtype))
    if not torch.isfinite(stored).all():
        largest = feature_TW.abs().max().item()
        return f"the {side} feature is not finite in {dtype} (largest number {largest:g}); take another --dtype"
    return stored.contiguous().view(torch.uint8).numpy().tobytes()


def _of_side(given: Sequence[Any], place: int) -> Any:
    """Return the value of a side from none, one for both, or two."""
    return given[min(place, len(given) - 1)] if given else None
