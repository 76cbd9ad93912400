"""Random image encoders of the real classes, a few thousand weights each, in folders as the large ones are."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny_models import save_target
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

SIDE, PATCH, WIDTH = 28, 14, 16
LANGUAGE_WIDTH = 24
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}
KINDS = ("clip", "clip_vision", "siglip", "dino", "vit", "mobilenet")
PROCESSORS = {"siglip": "SiglipImageProcessor", "dino": "BitImageProcessor", "vit": "ViTImageProcessor"}
EVENTGPT_WIDTH = 64
"""One attention head of EventGPT's tower."""


def model(kind: str) -> PreTrainedModel:
    """A random model; the same at every call."""
    torch.manual_seed(0)
    match kind:
        case "clip":
            return CLIPModel(CLIPConfig(vision_config={**VISION, "projection_dim": 16}, text_config=TEXT))
        case "clip_vision":
            return CLIPVisionModel(CLIPVisionConfig(**VISION))
        case "siglip":
            return SiglipVisionModel(SiglipVisionConfig(**VISION))
        case "dino":
            small = {key: value for key, value in VISION.items() if key != "intermediate_size"}
            return Dinov2Model(Dinov2Config(**small, mlp_ratio=2))
        case "vit":
            return ViTModel(ViTConfig(**VISION))
        case "mobilenet":
            return MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, depth_divisible_by=4, min_depth=4))
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**{**TEXT, "hidden_size": LANGUAGE_WIDTH, "num_key_value_heads": 2}),
            image_token_index=3,
        )
    )


def save(folder: Path, kind: str, **preprocessing: object) -> Path:
    """Save a model with a preprocessor config of its own kind."""
    if kind == "video_llava":
        return save_target(folder)
    model(kind).save_pretrained(folder)
    write_preprocessing(folder, PROCESSORS.get(kind, "CLIPImageProcessor"), **preprocessing)
    return folder


def write_preprocessing(folder: Path, kind: str = "CLIPImageProcessor", **settings: object) -> None:
    size = {"height": SIDE, "width": SIDE}
    config = {"image_processor_type": kind, "size": size, "crop_size": size, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def eventgpt_weights(with_adaptor: bool = True) -> dict[str, Tensor]:
    """Weights of a small EventGPT under the keys of the real one; of its language model one is enough."""
    torch.manual_seed(1)
    tower = CLIPVisionModel(CLIPVisionConfig(**{**VISION, "hidden_size": EVENTGPT_WIDTH, "num_attention_heads": 1}))
    weights = {f"model.visual_tower.visual_tower.vision_model.{k}": v for k, v in tower.state_dict().items()}
    shapes = {
        "model.visual_projector.0": (LANGUAGE_WIDTH, EVENTGPT_WIDTH),
        "model.visual_projector.2": (LANGUAGE_WIDTH, LANGUAGE_WIDTH),
        **({"model.feature_adaptor": (LANGUAGE_WIDTH, LANGUAGE_WIDTH)} if with_adaptor else {}),
    }
    for name, shape in shapes.items():
        weights |= {f"{name}.weight": torch.randn(shape) * 0.3, f"{name}.bias": torch.randn(shape[0]) * 0.1}
    return {**weights, "model.embed_tokens.weight": torch.randn(20, LANGUAGE_WIDTH)}


def save_eventgpt(folder: Path, with_adaptor: bool = True, **settings: object) -> Path:
    """Save a small EventGPT; its config names a folder of CLIP, as the real one does."""
    folder.mkdir()
    config = {"model_type": "EventChat_llama", "hidden_size": LANGUAGE_WIDTH, "mm_visual_tower": "clip", **settings}
    if with_adaptor:
        config["event_feature_adaptor"] = True
    (folder / "config.json").write_text(json.dumps(config))
    save_file(eventgpt_weights(with_adaptor), folder / "model.safetensors")
    write_preprocessing(folder)
    return folder


def pictures(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Pictures of different sizes, larger than the models take."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (40 + 3 * n, 56 - 2 * n, 3), dtype=np.uint8) for n in range(count)]
