"""A drafter that is shown event images through an adapter, in the place of the target's image tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import tiny_models
import torch
from numpy.typing import NDArray
from PIL import Image

from ray_app.commands.decode.command import run_decode
from ray_app.config.decode import DecodeConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.registry import load_encoder
from ray_app.errors import CheckpointError, ConfigError, InputError, RayAppError
from ray_app.language_models.aligned import AlignedPictures
from ray_app.language_models.kinds import load
from ray_app.language_models.model import LanguageModel
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import PIXELS, Features, FeatureSpec

NUM_ROWS = 4


def pixels(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees, encoders, and prompts of one frame with different event images."""
    here = tmp_path_factory.mktemp("adapter")
    tiny_models.save_llava(here / "llava")
    for name in ("clip_vision", "dino"):
        tiny_encoders.save(here / name, name)
    Image.fromarray(pixels(0)).save(here / "frame.png")
    lines = []
    for n in range(NUM_ROWS):
        Image.fromarray(pixels(1 + n)).save(here / f"events{n}.png")
        lines.append({"frames": ["frame.png"], "events": [f"events{n}.png"], "question": f"What is w{n} ?"})
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return here


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load(folder / "llava", "auto", "cpu")


@torch.no_grad()
def save_adapter(folder: Path, name: str, target_TD: torch.Tensor, event: FeatureSpec | None = None) -> Path:
    """A checkpoint of a linear adapter whose output is these tokens, whatever it is given."""
    spec = event or load_encoder(folder / "clip_vision", EncoderSettings(pool="mean")).feature_spec("bf16")
    target = FeatureSpec(dtype="float32", shape=tuple(target_TD.shape), scale=1.0)
    adapter = build_adapter(AdapterConfig("linear", spec.width, target.width), seed=0)
    for layer in adapter.children():
        layer.weight.zero_()
        layer.bias.copy_(target_TD.flatten())
    features = Features(event=spec, target=target)
    save_checkpoint(folder / name, adapter, metrics={}, provenance={}, features=features)
    return folder / name


def decode(folder: Path, out: Path, **changed: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "source": (folder / "prompts.jsonl",),
        "target": folder / "llava",
        "drafter": (str(folder / "llava"),),
        "drafter_sees": ("adapter", "events"),
        "event_encoder": folder / "clip_vision",
        "out": out,
        "num_speculative_tokens": 4,
        "max_new_tokens": 12,
        "draft_length": "fixed",
        "watch": True,
    }
    return run_decode(DecodeConfig(**{**settings, **changed}))


def test_an_adapter_that_gives_the_target_s_own_tokens_has_every_draft_accepted(
    folder: Path, model: LanguageModel, tmp_path: Path
) -> None:
    asked = model.prompt(pixels(0)[None], "?")
    assert asked.pixels_TCHW is not None
    with torch.inference_mode():
        own_ND = model.picture_embeddings(asked.pixels_TCHW)
    adapter = save_adapter(folder, "perfect", own_ND.clone())
    result = decode(folder, tmp_path / "out", adapter=adapter)
    rates = {name: numbers["draft_acceptance_rate"] for name, numbers in result["results"].items()}
    assert rates["llava-adapter"] == 1.0
    assert rates["llava-events"] < 1.0
    assert all(numbers["texts_that_differ"] == 0 for numbers in result["results"].values())
    weights = {name: numbers["weight_bytes"] for name, numbers in result["results"].items()}
    assert weights["llava-adapter"] > weights["llava-events"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["drafters"]["llava-adapter"]["own_tokens"] for line in lines] == [
        line["target_tokens"] for line in lines
    ]


def test_image_tokens_are_the_adapter_s_answer_to_the_encoded_event_image(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(folder / "clip_vision", EncoderSettings(pool="2x2"))
    event = encoder.feature_spec("bf16")
    target = FeatureSpec(dtype="float32", shape=(4, tiny_models.WIDTH), scale=0.5)
    adapter = build_adapter(AdapterConfig("linear", event.width, target.width), seed=1)
    features = Features(event=event, target=target)
    save_checkpoint(tmp_path / "ckpt", adapter, metrics={}, provenance={}, features=features)
    pictures = AlignedPictures(tmp_path / "ckpt", folder / "clip_vision", "cpu")
    tokens = []
    for n in (1, 2):
        stored_1E = encoder.encode([[pixels(n)]]).bfloat16().float().flatten()[None]
        with torch.no_grad():
            by_hand_ND = adapter.eval()(stored_1E).reshape(4, tiny_models.WIDTH) / 0.5
        tokens.append(pictures.tokens(pixels(n)[None]))
        torch.testing.assert_close(tokens[-1], by_hand_ND)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="takes 1 event images; 2 given"):
        pictures.tokens(np.stack([pixels(1), pixels(2)]))


def test_adapters_and_encoders_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    tokens_ND = torch.zeros(4, tiny_models.WIDTH)
    fits = save_adapter(folder, "fits", tokens_ND)
    narrow = save_adapter(folder, "narrow", tokens_ND[:, :-1])
    of_pixels = save_adapter(folder, "of_pixels", tokens_ND, PIXELS.model_copy(update={"shape": (3, 4, 4)}))
    cases: list[tuple[dict[str, Any], type[RayAppError], str]] = [
        ({}, ConfigError, "--drafter-sees adapter needs --adapter CKPT, and --event-encoder DIR"),
        ({"adapter": fits, "event_encoder": None}, ConfigError, "needs --adapter CKPT, and --event-encoder DIR"),
        ({"adapter": fits, "drafter_sees": ("events",)}, ConfigError, "add --drafter-sees adapter"),
        ({"adapter": of_pixels}, InputError, "of_pixels carries event features of .*shown image tokens. Train the"),
        ({"adapter": folder}, CheckpointError, "MANIFEST"),
        ({"adapter": fits, "event_encoder": folder}, InputError, "config.json"),
        ({"adapter": fits, "event_encoder": folder / "dino"}, InputError, "dino is not the encoder that made these"),
        ({"adapter": narrow}, InputError, "image tokens are 31 wide, .*llava reads 32; train it on the image tokens"),
    ]
    for n, (changed, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=message):
            decode(folder, tmp_path / str(n), **changed)
