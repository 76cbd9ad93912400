"""Preprocessing of pictures: every number is that of the library's own processor, for every supported config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import AutoImageProcessor, VideoLlavaImageProcessor

from ray_app.encoders.preprocessing import PROCESSORS, read_preprocessing

RNG = np.random.default_rng(0)
SIZES = ((48, 64), (64, 48), (33, 97), (20, 20), (21, 300), (240, 320))
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
CONFIGS: list[dict[str, Any]] = [
    *({"image_processor_type": kind} for kind in PROCESSORS if kind.endswith("Processor")),
    {"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 27},
    {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 31, "width": 24},
    },
    {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": 45},
    {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"height": 9, "width": 31}},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 31}, "resample": 2},
    {"image_processor_type": "ViTImageProcessor", "size": 30, "do_normalize": False},
    {"image_processor_type": "ViTImageProcessor", "size": 30, "do_rescale": False},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 25}, "image_mean": [0.1, 0.2, 0.3]},
    {"image_processor_type": "MobileNetV2ImageProcessor", "image_std": [0.4, 0.5, 0.7], "rescale_factor": 0.01},
]


def library_pixels(folder: Path, kind: str, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    if kind == "VideoLlavaImageProcessor":
        processor, key = VideoLlavaImageProcessor.from_pretrained(folder), "pixel_values_images"
    else:
        processor, key = AutoImageProcessor.from_pretrained(folder, backend="pil"), "pixel_values"
    return processor(image_HWC, return_tensors="np", input_data_format="channels_last")[key][0]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_picture_becomes_the_numbers_that_the_library_makes_of_it(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    steps = read_preprocessing(tmp_path)
    for image_HWC in PICTURES:
        theirs = library_pixels(tmp_path, config["image_processor_type"], image_HWC)
        ours = steps(image_HWC)
        assert ours.dtype == np.float32
        assert ours.shape == (3, *steps.size)
        np.testing.assert_array_equal(ours, theirs)


def test_a_config_of_an_old_clip_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "do_resize": True}
    new = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28}
    read = []
    for config in (old, new):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        read.append(read_preprocessing(tmp_path))
    assert read[0] == read[1]
