"""Encoders: bit for bit what transformers computes, on small random models of the true classes."""

from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
import torch
from numpy.typing import NDArray
from tiny_encoders import KINDS, LANGUAGE_WIDTH, WIDTH, pictures
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    LlavaForConditionalGeneration,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

from ray_app.encoders.base import BATCH_IMAGES, EncoderSettings
from ray_app.encoders.registry import load_encoder, load_recorded
from ray_app.errors import InputError

CPU = EncoderSettings()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of model."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in (*KINDS, "llava", "video_llava"):
        tiny_encoders.save(root / kind, kind)
    tiny_encoders.save_eventgpt(root / "eventgpt")
    return root


def encoded(folder: Path, images: list[NDArray[np.uint8]], **settings: object) -> Tensor:
    return load_encoder(folder, EncoderSettings(**settings)).encode([[image] for image in images])  # type: ignore[arg-type]


def library_pixels(folder: Path, images: list[NDArray[np.uint8]]) -> Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]


@torch.inference_mode()
def library_states(folder: Path, images: list[NDArray[np.uint8]]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last hidden state, and all hidden states, of the library's own model."""
    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    output = model(library_pixels(folder, images), output_hidden_states=True)
    return output.last_hidden_state, output.hidden_states


def as_rows(states: Tensor) -> Tensor:
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_librarys_bit_for_bit(kind: str, folders: Path) -> None:
    images = pictures(3)
    last, states = library_states(folders / kind, images)
    assert torch.equal(encoded(folders / kind, images), as_rows(last))
    assert torch.equal(encoded(folders / kind, images, layer=-2), as_rows(states[-2]))


def test_more_pictures_than_a_batch_are_encoded_batch_by_batch(folders: Path) -> None:
    size = BATCH_IMAGES["cpu"]
    images = pictures(size + 2)
    whole = encoded(folders / "clip_vision", images)
    for part in (slice(size), slice(size, None)):
        assert torch.equal(whole[part], encoded(folders / "clip_vision", images[part]))


@pytest.mark.parametrize("kind", ["clip_vision", "dino", "vit"])
def test_pools_of_a_model_with_a_class_token(kind: str, folders: Path) -> None:
    images = pictures(2)
    states, _ = library_states(folders / kind, images)
    assert torch.equal(encoded(folders / kind, images, pool="cls"), states[:, :1])
    assert torch.equal(encoded(folders / kind, images, pool="mean"), states[:, 1:].mean(dim=1, keepdim=True))
    torch.testing.assert_close(encoded(folders / kind, images, pool="2x2"), states[:, 1:])
    rows = torch.stack([states[:, 1:3].mean(dim=1), states[:, 3:5].mean(dim=1)], dim=1)
    torch.testing.assert_close(encoded(folders / kind, images, pool="2x1"), rows)


def test_pools_of_a_model_of_maps(tmp_path: Path) -> None:
    size = {"height": 128, "width": 64}
    folder = tiny_encoders.save(tmp_path / "mobilenet", "mobilenet", size=size, crop_size=size)
    images = pictures(2)
    states, _ = library_states(folder, images)
    assert states.shape[2:] == (4, 2)
    means = F.adaptive_avg_pool2d(states, (3, 2)).flatten(2).transpose(1, 2)
    assert torch.equal(encoded(folder, images, pool="3x2"), means)
    assert torch.equal(encoded(folder, images, pool="mean")[:, 0], as_rows(states).mean(dim=1))


@torch.inference_mode()
def test_the_tower_in_a_llava_is_that_of_the_whole_model(folders: Path) -> None:
    folder, images = folders / "llava", pictures(3)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    whole = model.model.get_image_features(library_pixels(folder, images), return_dict=True)
    assert torch.equal(encoded(folder, images, projector=True), torch.stack(whole.pooler_output))
    assert torch.equal(encoded(folder, images), whole.hidden_states[-2][:, 1:])
    assert torch.equal(encoded(folder, images, pool="cls"), whole.hidden_states[-2][:, :1])
    assert encoded(folder, images, projector=True).shape == (3, 4, LANGUAGE_WIDTH)


@torch.inference_mode()
def test_a_video_llava_encodes_one_picture_by_its_image_tower_and_several_by_its_video_tower(folders: Path) -> None:
    folder, images = folders / "video_llava", pictures(3)
    model = VideoLlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = VideoLlavaImageProcessor.from_pretrained(folder)
    pixels = processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values_images"]
    image = model.model.get_image_features(pixels, return_dict=True)
    assert torch.equal(encoded(folder, images, projector=True), image.pooler_output)
    assert torch.equal(encoded(folder, images), image.hidden_states[-2][:, 1:])
    clips = [model.model.get_video_features(each[None], return_dict=True) for each in (pixels, pixels.flip(0))]
    for projector in (True, False):
        encoder = load_encoder(folder, EncoderSettings(projector=projector, num_images=3))
        tokens = encoder.encode([images, images[::-1]])
        for found, video in zip(tokens, clips, strict=True):
            states = video.pooler_output if projector else video.hidden_states[-2]
            assert torch.equal(found, states.flatten(0, 1))
        assert encoder.name == "VideoLlavaForConditionalGeneration, video_tower"


def eventgpt_by_hand(folder: Path, images: list[NDArray[np.uint8]], with_adaptor: bool = True) -> list[list[float]]:
    """Tokens of one feature, number by number."""
    weights = {k: v.double() for k, v in tiny_encoders.eventgpt_weights(with_adaptor).items()}
    tower = load_encoder(folder, CPU).model
    with torch.inference_mode():
        states = tower(library_pixels(folder, images)).last_hidden_state.double()
    after = states @ weights["model.visual_projector.0.weight"].T + weights["model.visual_projector.0.bias"]
    after = after * 0.5 * (1 + torch.erf(after / 2**0.5))  # GELU
    after = after @ weights["model.visual_projector.2.weight"].T + weights["model.visual_projector.2.bias"]
    if with_adaptor:
        after = after @ weights["model.feature_adaptor.weight"].T + weights["model.feature_adaptor.bias"]
    over_space = [sum(picture[1:], picture[0]) / len(picture) for picture in after]
    over_time = [sum(place[1:], place[0]) / len(after) for place in after.transpose(0, 1)]
    return [token.tolist() for token in (*over_space, *over_time)]


@pytest.mark.parametrize("num_images", [1, 5])
def test_tokens_of_eventgpt_are_means_over_space_and_then_over_time(num_images: int, folders: Path) -> None:
    images = pictures(num_images)
    tokens = load_encoder(folders / "eventgpt", EncoderSettings(num_images=num_images)).encode([images])
    assert tokens.shape == (1, num_images + 5, LANGUAGE_WIDTH)
    by_hand = torch.tensor(eventgpt_by_hand(folders / "eventgpt", images), dtype=torch.float64)
    torch.testing.assert_close(tokens[0].double(), by_hand, rtol=1e-4, atol=1e-5)
    mean = load_encoder(folders / "eventgpt", EncoderSettings(pool="mean", num_images=num_images)).encode([images])
    torch.testing.assert_close(mean[0, 0].double(), by_hand[:num_images].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_an_eventgpt_without_an_adaptor_has_none(tmp_path: Path) -> None:
    folder = tiny_encoders.save_eventgpt(tmp_path / "plain", with_adaptor=False)
    images = pictures(2)
    tokens = load_encoder(folder, EncoderSettings(num_images=2)).encode([images])
    by_hand = torch.tensor(eventgpt_by_hand(folder, images, with_adaptor=False), dtype=torch.float64)
    torch.testing.assert_close(tokens[0].double(), by_hand, rtol=1e-4, atol=1e-5)


def test_the_spec_of_a_feature_is_that_of_its_features(folders: Path) -> None:
    for pool, shape in (("none", (5, WIDTH)), ("mean", (WIDTH,)), ("2x1", (2, WIDTH))):
        encoder = load_encoder(folders / "clip_vision", EncoderSettings(pool=pool))
        spec = encoder.feature_spec("bf16")
        assert (spec.shape, spec.dtype, spec.scale, spec.encoder) == (shape, "bfloat16", 1.0, encoder.record())


def test_the_checksum_changes_with_any_weight_and_any_setting_that_counts(folders: Path, tmp_path: Path) -> None:
    def checksum(folder: Path, **settings: object) -> str:
        return load_encoder(folder, EncoderSettings(**settings)).sha256  # type: ignore[arg-type]

    first = checksum(folders / "clip_vision")
    same = tiny_encoders.save(tmp_path / "same", "clip_vision")
    assert checksum(same) == first
    model = tiny_encoders.model("clip_vision")
    with torch.no_grad():
        next(model.parameters())[-1] += 1e-3
    model.save_pretrained(same)
    assert checksum(same) != first
    again = tiny_encoders.save(tmp_path / "again", "clip_vision")
    config = (again / "config.json").read_text()
    (again / "config.json").write_text(config.replace('"quick_gelu"', '"gelu"'))
    assert checksum(again) != first
    assert checksum(folders / "llava") != checksum(folders / "llava", projector=True)


def test_features_name_their_encoder_and_only_that_one_makes_more_of_them(folders: Path) -> None:
    record = load_encoder(folders / "clip_vision", EncoderSettings(layer=-2, pool="2x1")).record()
    again = load_recorded(folders / "clip_vision", record)
    assert again.record() == record
    with pytest.raises(
        InputError, match=r"siglip is not the encoder that made these features \(CLIPVisionModel, layer -2, pool 2x1"
    ):
        load_recorded(folders / "siglip", record)
    with pytest.raises(InputError, match="Name that encoder's folder"):
        load_recorded(folders / "clip_vision", record.model_copy(update={"sha256": "0" * 64}))
