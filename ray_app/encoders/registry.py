"""The encoder of a folder, by the `model_type` of its config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ray_app.encoders.base import EncoderSettings, VisionModel
from ray_app.encoders.eventgpt import EventGpt
from ray_app.encoders.llava import Llava, VideoLlava
from ray_app.encoders.model_folder import read_json
from ray_app.errors import InputError
from ray_app.store.manifest import EncoderRecord, Features

ENCODERS: dict[str, type[VisionModel]] = {"llava": Llava, "video_llava": VideoLlava, "EventChat_llama": EventGpt}
"""Encoders inside models of pictures and language; every other folder is an image model of its own."""


Side = Literal["event", "target"]


def encoder_class(folder: Path) -> type[VisionModel]:
    """Return the class that reads a folder. InputError: no config.json."""
    return ENCODERS.get(str(read_json(folder, "config.json").get("model_type")), VisionModel)


def load_encoder(folder: Path, settings: EncoderSettings, device: str = "cpu") -> VisionModel:
    """Return the encoder in a folder. InputError: it cannot be read, or does not fit the settings."""
    config = read_json(folder, "config.json")
    return ENCODERS.get(str(config.get("model_type")), VisionModel)(folder, config, settings, device)


def load_recorded(folder: Path, record: EncoderRecord, device: str = "cpu") -> VisionModel:
    """Return the encoder that made a feature. InputError: the folder holds another one, or it has changed."""
    settings = EncoderSettings(record.layer, record.pool, record.projector, record.dtype, record.num_images)
    encoder = load_encoder(folder, settings, device)
    if encoder.record() != record:
        raise InputError(
            f"{folder} is not the encoder that made these features ({record}): it is {encoder.record()}. Name that "
            "encoder's folder, or make the features again."
        )
    return encoder


def load_sides(folders: Mapping[Side, Path], features: Features, device: str = "cpu") -> dict[Side, VisionModel]:
    """Return the encoder of each side that made its features; one that makes both is loaded once.

    InputError: see `load_recorded`.
    """
    loaded: dict[tuple[Path, str], VisionModel] = {}
    sides: dict[Side, VisionModel] = {}
    for side, folder in folders.items():
        record = getattr(features, side).encoder
        key = folder, record.model_dump_json()
        if key not in loaded:
            loaded[key] = load_recorded(folder, record, device)
        sides[side] = loaded[key]
    return sides
