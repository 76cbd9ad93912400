"""Random models of the real classes, a few thousand weights each, saved and loaded as the large ones are."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<video>"]
WORDS = ["USER", ":", "ASSISTANT", "What", "is", "there", "?", *(f"w{n}" for n in range(48))]
WIDTH = 32
SIDE = 28
"""Pixels of a frame's side: four patches of 14 and one more token."""


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """Whole words; `</s>` ends an answer."""
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *words])}
    words_only = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<video>"],
    )


def llama(words: list[str] = WORDS) -> dict[str, object]:
    return {
        "vocab_size": len(SPECIAL) + len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.5,
    }


@torch.no_grad()
def silence(model: PreTrainedModel) -> None:
    """No answer holds a special token but its end, as of models that were trained."""
    model.get_output_embeddings().weight[[0, 1, 3, 4]] = 0.0


def vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        projection_dim=16,
    )


def save_target(folder: Path, seed: int = 0) -> Path:
    """A Video-LLaVA that sees 8 frames of 28 x 28 pixels, 5 tokens each."""
    torch.manual_seed(seed)
    config = VideoLlavaConfig(
        vision_config=vision(),
        text_config=LlamaConfig(**llama()),
        image_token_index=3,
        video_token_index=4,
    )
    model = VideoLlavaForConditionalGeneration(config)
    silence(model)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer().save_pretrained(folder)
    VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


def save_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA that sees frames of 28 x 28 pixels, 4 tokens each."""
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision(), text_config=LlamaConfig(**llama()), image_token_index=3)
    model = LlavaForConditionalGeneration(config)
    silence(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


def save_causal(folder: Path, config: PreTrainedConfig, seed: int = 0) -> Path:
    """A language model of any class, shown nothing."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    silence(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_drafter(folder: Path, seed: int = 2, words: list[str] = WORDS) -> Path:
    """A language model that is shown nothing."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**llama(words)))
    silence(model)
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder
