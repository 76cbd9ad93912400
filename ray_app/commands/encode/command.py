"""`ray-app encode`: the pairs of a store of pixels, as features of image encoders, in a store of their own."""

from typing import Any

from rich.console import Console

from ray_app.commands.encode.source import StoreSource
from ray_app.commands.prepare.command import prepare, render_prepare
from ray_app.config.prepare import EncodeConfig
from ray_app.errors import ConfigError
from ray_app.store.filesystem import open_storage
from ray_app.store.manifest import Manifest


def run_encode(cfg: EncodeConfig) -> dict[str, Any]:
    """Encode a store; returns the --json object of `prepare`.

    StoreError: a store that is damaged or in the way. InputError: features that are no pictures, or an encoder that
    cannot be used.
    """
    if max(cfg.num_event_images or 1, cfg.num_frames or 1) > 1:
        raise ConfigError(
            "--num-event-images and --num-frames: a store has one picture of each side; prepare the recordings with "
            "--event-encoder and --target-encoder instead."
        )
    folder = open_storage(cfg.store, cfg.storage_timeout_s)
    source = StoreSource(folder, Manifest.read(folder))
    source.require_pictures()
    features = source.manifest.features
    return prepare(source, cfg, features.target if cfg.event_encoder else features.event)


def render_encode(result: dict[str, Any], console: Console) -> None:
    """Print the result for people."""
    render_prepare(result, console)
