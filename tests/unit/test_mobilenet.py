"""The pretrained MobileNetV2 of `ray-app demo fetch`, where it is in the cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import MobileNetV2Model

from ray_app.commands.demo.command import cache_folder
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.registry import load_encoder, load_recorded

FOLDER = cache_folder() / "mobilenet_v2"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not in the cache: ray-app demo fetch mobilenet_v2")


def smooth(seed: int, shift: int = 0) -> NDArray[np.uint8]:
    """A picture of a few soft spots, moved to the right."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160]
    spots = [
        np.exp(-(((x - shift - cx) / 25) ** 2) - ((y - cy) / 20) ** 2)[..., None] * rng.uniform(60, 250, 3)
        for cx, cy in rng.uniform((0, 0), (160, 120), (6, 2))
    ]
    return np.clip(sum(spots), 0, 255).astype(np.uint8)


def test_its_features_are_the_librarys_bit_for_bit() -> None:
    encoder = load_encoder(FOLDER, EncoderSettings(pool="none"))
    pixels = np.stack([encoder.preprocess(smooth(seed)) for seed in range(4)])
    model = MobileNetV2Model.from_pretrained(FOLDER).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).last_hidden_state
    assert torch.equal(encoder.encode_pixels(pixels), expected.flatten(2).transpose(1, 2))
    assert expected.shape[1:] == (1280, 7, 7)


def test_a_picture_is_nearer_to_itself_moved_than_to_others() -> None:
    encoder = load_encoder(FOLDER, EncoderSettings(pool="3x3"))
    there, moved = (encoder.encode([[smooth(seed, shift)] for seed in range(6)]) for shift in (0, 4))
    assert there.shape == (6, 9, 1280)
    mean = there.mean(dim=0)
    unit = torch.nn.functional.normalize
    similarity = unit((there - mean).flatten(1), dim=1) @ unit((moved - mean).flatten(1), dim=1).T
    assert (similarity.argmax(dim=1) == torch.arange(6)).all()


def test_weights_in_the_passs_own_format_stay_in_the_file() -> None:
    """Replicas of a node that map one file share its pages; copies would be each replica's own."""
    encoder = load_recorded(FOLDER, load_encoder(FOLDER, EncoderSettings()).record())
    largest = max(encoder.model.parameters(), key=torch.numel)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(part, 16) for part in line[0].split("-")] for line in maps if line[-1].endswith(".safetensors")]
    assert any(low <= largest.data_ptr() < high for low, high in spans)
