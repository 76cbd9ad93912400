"""The demo's target as a folder: small trained parts, joined with an encoder and a language model.

What was trained, projector and LoRA factors, is a folder of its own, small enough for the package:

    adapter.safetensors   float16
    config.json           settings of the adapter, and the two models that it belongs to
    facts.json            values of facts by the projector's scores, and the majority of each
    provenance.json       how it was trained
    MANIFEST.sha256
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_app.commands.demo.answers import HELD_OUT, features_of, pictures
from ray_app.commands.demo.command import ORIGIN
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.encoders.base import EncoderSettings, VisionModel
from ray_app.encoders.library import transformers
from ray_app.encoders.registry import load_encoder
from ray_app.errors import InputError
from ray_app.language_models.answers import greedy_batch
from ray_app.language_models.joined import PICTURES, JoinedConfig, save_joined
from ray_app.language_models.loading import model_files, read_tokenizer, read_weights
from ray_app.language_models.lora import merge_changes
from ray_app.parsing.json_text import parse_object
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.atomic import make_folder, verify_folder
from ray_app.store.checkpoint import read_document, read_tensors, save_verifiable
from ray_app.store.golden import assembled

POOL = "3x3"
"""Means of the encoder's tokens that the projector reads."""
ASKED = "\n{question}\n"
"""Prompt behind the picture."""
PROVENANCE, GOLDEN, SEEN = "provenance.json", "golden.json", "facts.json"
ADAPTER, CONFIG = "adapter.safetensors", "config.json"
NUM_GOLDEN, GOLDEN_TOKENS = 2, 40


def demo_encoder(folder: Path) -> VisionModel:
    """Return the image encoder as the target uses it."""
    return load_encoder(folder, EncoderSettings(pool=POOL))


def identity_of(encoder: Path, language_model: Path) -> dict[str, Any]:
    """Return the package that each model was made from, or the SHA-256 of its files.

    Another version of transformers writes other files of the same package.
    """
    return {
        name: parse_object((folder / ORIGIN).read_bytes()) if (folder / ORIGIN).is_file() else model_files(folder)
        for name, folder in (("encoder", encoder), ("language_model", language_model))
    }


def write_parts(
    folder: Path, adapter: ImageTokens, models: Mapping[str, Any], documents: Mapping[str, dict[str, Any]]
) -> None:
    """Write the trained parts in half precision. `models`: of `identity_of`; `documents`: SEEN and PROVENANCE."""
    config = {"adapter": adapter.config.to_dict(), "models": dict(models)}
    halves = {key: tensor.half() for key, tensor in adapter.state_dict().items()}
    save_verifiable(folder, {ADAPTER: halves}, {CONFIG: config, **documents})


def join_parts(parts: Path, out: Path, encoder: Path, language_model: Path) -> None:
    """Join trained parts with the two models that they belong to.

    CheckpointError: a damaged part. InputError: other models, or `out` exists.
    """
    sha256 = verify_folder(parts)
    config = read_document(parts / CONFIG)
    if config["models"] != identity_of(encoder, language_model):
        raise InputError(f"{parts} was trained with other models than {encoder} and {language_model}.")
    tensors = {key: each.float() for key, each in read_tensors(parts / ADAPTER).items()}
    adapter = assembled(AdapterConfig.from_dict(config["adapter"]), tensors)
    assert isinstance(adapter, ImageTokens)
    origin = {**read_document(parts / PROVENANCE), "parts": sha256}
    write_target(out, adapter, encoder, language_model, read_document(parts / SEEN), origin)


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
    merge_changes(merged.model.layers, adapter.changes())
    tokenizer = read_tokenizer(language_model)
    config = adapter.config
    widths = (config.event_dim, config.hidden_dim, config.image_tokens * config.language_model[1])
    joined = JoinedConfig(pool=POOL, projector=widths, image_tokens=config.image_tokens, prompt=PICTURES + ASKED)
    golden = _golden(merged, adapter, encoder, tokenizer)
    documents = {PROVENANCE: dict(origin), GOLDEN: golden, SEEN: dict(seen)}
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "language_model"  # the scratch folder itself is its user's alone, and so a copy
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_joined(out, joined, adapter.projector, encoder, folder, documents)


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
