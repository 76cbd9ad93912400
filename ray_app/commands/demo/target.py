"""The demo's target as a folder: trained projector and LoRA factors, merged with an encoder and a language model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_app.commands.demo.answers import HELD_OUT, features_of, pictures
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.encoders.base import EncoderSettings, VisionModel
from ray_app.encoders.library import transformers
from ray_app.encoders.registry import load_encoder
from ray_app.errors import InputError
from ray_app.language_models.answers import greedy_batch
from ray_app.language_models.joined import PICTURES, JoinedConfig, save_joined
from ray_app.language_models.loading import model_files, read_tokenizer, read_weights
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.atomic import staged_folder

POOL = "3x3"
"""Means of the encoder's tokens that the projector reads."""
ASKED = "\n{question}\n"
"""Prompt behind the picture."""
PROVENANCE, GOLDEN, SEEN = "provenance.json", "golden.json", "facts.json"
NUM_GOLDEN, GOLDEN_TOKENS = 2, 40


def demo_encoder(folder: Path) -> VisionModel:
    """Return the image encoder as the target uses it."""
    return load_encoder(folder, EncoderSettings(pool=POOL))


def identity_of(encoder: Path, language_model: Path) -> dict[str, Any]:
    """Return the SHA-256 of both models' files."""
    return {"encoder": model_files(encoder), "language_model": model_files(language_model)}


def write_target(
    out: Path,
    adapter: ImageTokens,
    encoder: Path,
    language_model: Path,
    seen: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> None:
    """Merge, join, and write the folder with golden answers. InputError: it exists.

    `seen`: values of facts by the projector's scores, and the majority of each. `origin`: its provenance.
    """
    if out.exists():
        raise InputError(f"{out} already exists; nothing is overwritten.")
    merged = read_weights(language_model, transformers().AutoModelForCausalLM, "float32", "cpu")
    merge_lora(merged, adapter)
    tokenizer = read_tokenizer(language_model)
    golden = _golden(merged, adapter, encoder, tokenizer)
    scratch = out.with_name(f".{out.name}.merged")
    if not scratch.exists():
        with staged_folder(scratch) as staged:
            merged.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
    config = adapter.config
    widths = (config.event_dim, config.hidden_dim, config.image_tokens * config.language_model[1])
    joined = JoinedConfig(pool=POOL, projector=widths, image_tokens=config.image_tokens, prompt=PICTURES + ASKED)
    documents = {PROVENANCE: dict(origin), GOLDEN: golden, SEEN: dict(seen)}
    save_joined(out, joined, adapter.projector, encoder, scratch, documents)
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()


@torch.no_grad()
def merge_lora(model: Any, adapter: ImageTokens) -> None:
    """Add LoRA products to a language model's weights."""
    for name, change_LOI in adapter.changes().items():
        for layer, change_OI in zip(model.model.layers, change_LOI, strict=True):
            layer.get_submodule(name).weight += change_OI


@torch.no_grad()
def _golden(merged: Any, adapter: ImageTokens, encoder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the beginning of answers to the first question about pictures of drives without training."""
    some = list(pictures(0, HELD_OUT, NUM_GOLDEN, 1))
    ids = tokenizer(ASKED.format(question=KEY_ELEMENTS), add_special_tokens=False)["input_ids"]
    asked_QD = merged.get_input_embeddings()(torch.tensor(ids))
    tokens_BND = adapter(features_of(demo_encoder(encoder), some).float()).unflatten(
        1, (adapter.config.image_tokens, -1)
    )
    prefix_BPD = torch.cat([tokens_BND, asked_QD.expand(len(some), -1, -1)], dim=1)
    answers = greedy_batch(merged, prefix_BPD, tokenizer.eos_token_id, GOLDEN_TOKENS)
    texts = [tokenizer.decode(tokens) for tokens in answers]
    return {"question": KEY_ELEMENTS, "tokens": answers, "texts": texts}
