"""Folders of encoders that cannot be used, each with a clear error; and what is read of those that can."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import pictures

from ray_app.encoders import weights
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.preprocessing import read_preprocessing
from ray_app.encoders.registry import load_encoder
from ray_app.encoders.weights import INDEX
from ray_app.errors import InputError

CPU = EncoderSettings()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIP tower to damage."""
    return tiny_encoders.save(tmp_path / "clip", "clip_vision")


def error_of(folder: Path, settings: EncoderSettings = CPU) -> str:
    with pytest.raises(InputError) as raised:
        load_encoder(folder, settings).feature_spec("fp32")
    return str(raised.value)


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "clip has no config.json; name the folder of a Hugging Face model" in error_of(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "has no config.json" in error_of(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in error_of(folder)


def test_weights_as_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "Pickles (pytorch_model.bin) can run any code and are not read" in error_of(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights in safetensors; save with save_pretrained" in error_of(folder)


@pytest.mark.parametrize("left", [0, 5, 700])
def test_truncated_weights(left: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert "model.safetensors is no whole file of safetensors" in error_of(folder)


def test_missing_surplus_and_misshapen_keys_are_named(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    del found["encoder.layers.1.mlp.fc1.weight"]
    found["classifier.weight"] = torch.zeros(3)
    found["post_layernorm.bias"] = torch.zeros(7)
    save_file(found, folder / "model.safetensors")
    words = error_of(folder)
    assert "1 missing: encoder.layers.1.mlp.fc1.weight" in words
    assert "1 too many: classifier.weight" in words
    assert "1 of another shape: post_layernorm.bias" in words


def test_old_checkpoints_have_numbers_that_no_model_needs(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    before = load_encoder(folder, CPU)
    save_file({**found, "embeddings.position_ids": torch.arange(5)}, folder / "model.safetensors")
    assert load_encoder(folder, CPU).sha256 == before.sha256


def test_a_config_of_another_width_than_the_weights(folder: Path) -> None:
    change(folder / "config.json", hidden_size=32)
    assert "of another shape" in error_of(folder)


def test_a_projector_of_another_width_than_the_tower(tmp_path: Path) -> None:
    folder = tiny_encoders.save(tmp_path / "llava", "llava")
    found = load_file(folder / "model.safetensors")
    found["multi_modal_projector.linear_1.weight"] = torch.zeros(24, 99)
    save_file(found, folder / "model.safetensors")
    assert "of another shape: linear_1.weight" in error_of(folder, EncoderSettings(projector=True))
    load_encoder(folder, CPU)


def test_a_language_model_takes_no_pictures(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is a LlamaModel, which takes input_ids, not pictures" in error_of(folder)


@pytest.mark.parametrize("kind", ["no_such_model", None])
def test_a_kind_of_model_that_is_not_known(kind: str | None, folder: Path) -> None:
    change(folder / "config.json", model_type=kind)
    assert "its config is none of an image model of transformers" in error_of(folder)


def test_a_q_former_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_encoders.save_eventgpt(tmp_path / "settings", use_event_qformer=True)
    assert "is an EventGPT with a q-former (use_event_qformer), which is not supported" in error_of(folder)
    folder = tiny_encoders.save_eventgpt(tmp_path / "weights")
    found = load_file(folder / "model.safetensors")
    save_file({**found, "model.query_embeddings": torch.zeros(3)}, folder / "model.safetensors")
    assert "q-former" in error_of(folder)


def test_an_eventgpt_whose_projector_is_of_another_width(tmp_path: Path) -> None:
    folder = tiny_encoders.save_eventgpt(tmp_path / "eventgpt", hidden_size=32)
    assert "of another shape: 0.bias" in error_of(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EncoderSettings(layer=-5), "--layer -5: clip (CLIPVisionModel) has 4 layers"),
        (EncoderSettings(pool="3x3"), "--pool 3x3: clip (CLIPVisionModel) has a grid of 2 x 2 tokens"),
        (EncoderSettings(projector=True), "leave out --projector"),
    ],
)
def test_settings_that_a_model_cannot_follow(settings: EncoderSettings, words: str, folder: Path) -> None:
    assert words in error_of(folder, settings)


def test_pools_that_a_model_does_not_have(tmp_path: Path) -> None:
    siglip = tiny_encoders.save(tmp_path / "siglip", "siglip")
    assert "SiglipVisionModel) has no class token" in error_of(siglip, EncoderSettings(pool="cls"))
    eventgpt = tiny_encoders.save_eventgpt(tmp_path / "eventgpt")
    assert "take none or mean" in error_of(eventgpt, EncoderSettings(pool="2x2"))


def test_pictures_of_another_size_than_the_model_takes(folder: Path) -> None:
    tiny_encoders.write_preprocessing(folder, crop_size=42)
    assert "does not take pictures of 42 x 42 pixels, as its preprocessor config makes them" in error_of(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_processor_type": "MaskFormerImageProcessor"}, "asks for the processor MaskFormerImageProcessor"),
        ({"do_pad": True}, "asks for do_pad: True, which is not supported"),
        ({"size_divisor": 32}, "asks for size_divisor: 32"),
        ({"size": {"longest_edge": 28}}, "the size {'longest_edge': 28} is not supported"),
        ({"size": {"shortest_edge": 28, "longest_edge": 60}}, "is not supported; give shortest_edge"),
        ({"size": "large"}, "the size large is not supported"),
        ({"size": {"shortest_edge": 28}, "do_center_crop": False}, "makes pictures of different sizes"),
        ({"resample": 9}, "resample 9 is no filter"),
        ({"image_std": [1, 0, 1]}, "none of image_std 0"),
        ({"image_mean": [1, 2]}, "1 or 3 numbers each"),
    ],
)
def test_preprocessing_that_is_not_supported(settings: dict[str, object], words: str, folder: Path) -> None:
    change(folder / "preprocessor_config.json", **settings)
    assert words in error_of(folder)


def test_a_folder_without_preprocessing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in error_of(folder)


def test_the_config_of_a_processor_of_pictures_and_texts_is_read_too(folder: Path) -> None:
    alone = read_preprocessing(folder)
    part = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": part}))
    assert read_preprocessing(folder) == alone


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A LLaVA in one file for each part, with an index, and the names of the files that are opened."""
    folder = tiny_encoders.save(tmp_path / "llava", "llava")
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {key: f"{key.partition('.')[0]}.safetensors" for key in found}
    for name in set(files.values()):
        save_file({key: value for key, value in found.items() if files[key] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    opened: list[str] = []
    safe_open = weights.safe_open

    def noted(path: Path, **arguments: object) -> object:
        opened.append(path.name)
        return safe_open(path, **arguments)

    monkeypatch.setattr(weights, "safe_open", noted)
    return folder, opened


def test_of_a_sharded_checkpoint_only_the_files_of_the_tower_are_opened(
    shards: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, opened = shards
    features = load_encoder(folder, CPU).encode([pictures(1)])
    assert opened == ["vision_tower.safetensors"]
    whole = tiny_encoders.save(tmp_path / "whole", "llava")
    assert torch.equal(features, load_encoder(whole, CPU).encode([pictures(1)]))
    opened.clear()
    load_encoder(folder, EncoderSettings(projector=True))
    assert opened == ["vision_tower.safetensors", "multi_modal_projector.safetensors"]


def test_a_shard_that_is_missing_is_named(shards: tuple[Path, list[str]]) -> None:
    folder, _ = shards
    (folder / "vision_tower.safetensors").unlink()
    assert "vision_tower.safetensors is missing, and model.safetensors.index.json names it" in error_of(folder)


def test_an_index_that_names_a_key_its_file_does_not_have(shards: tuple[Path, list[str]]) -> None:
    folder, _ = shards
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["vision_tower.more"] = "vision_tower.safetensors"
    (folder / INDEX).write_text(json.dumps(content))
    assert "has no vision_tower.more, which model.safetensors.index.json promises" in error_of(folder)


def test_an_index_does_not_lead_out_of_its_folder(shards: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = shards
    (folder / "vision_tower.safetensors").rename(tmp_path / "vision_tower.safetensors")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = {key: f"../{name}" for key, name in content["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(content))
    assert "vision_tower.safetensors is missing" in error_of(folder)


def test_a_number_of_three_colours_that_is_one_counts_for_all(folder: Path) -> None:
    change(folder / "preprocessor_config.json", image_mean=0.5, image_std=0.25)
    steps = read_preprocessing(folder)
    assert (steps.mean, steps.std) == ((0.5,) * 3, (0.25,) * 3)
    assert np.isclose(steps(np.full((9, 9, 3), 255, np.uint8)), 2.0).all()
