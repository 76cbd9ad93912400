"""A tiny joined target that answers in the words of scenes, made of random parts."""

from pathlib import Path

import tiny_eye
import torch

from ray_app.commands.demo.target import write_target
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.core.adapters.registry import build_adapter
from ray_app.language_models.answer_objective import shape_of
from ray_app.scenes.captions import FACTS

EVENT_WIDTH = 9 * 16
IMAGE_TOKENS = len(FACTS)


def save_target(folder: Path) -> Path:
    """`folder` / target, of `encoder` and `language_model` next to it."""
    tiny_eye.save_language_model(folder / "language_model")
    tiny_eye.save_encoder(folder / "encoder")
    shape = tuple(shape_of(folder / "language_model"))
    config = AdapterConfig(
        "image_tokens", EVENT_WIDTH, 12, 8, rank=2, image_tokens=IMAGE_TOKENS, language_model=shape
    )
    adapter = build_adapter(config, 0)
    assert isinstance(adapter, ImageTokens)
    with torch.no_grad():
        for factor in adapter.up.values():
            factor.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    write_target(folder / "target", adapter, folder / "encoder", folder / "language_model", {}, {})
    return folder / "target"
