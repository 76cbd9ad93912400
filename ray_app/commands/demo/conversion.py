"""Conversion of the packages' weights to folders that transformers reads: safetensors, config, preprocessing."""

import importlib.util
import json
from pathlib import Path

import torch

from ray_app.encoders.library import transformers
from ray_app.errors import ResourceError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
SIDE = 224
EPSILON = 1e-5
"""Epsilon of batch normalisation, PyTorch's default."""
BILINEAR = 2
"""Number of the filter in preprocessor configs."""


def save_mobilenet(weights: Path, folder: Path) -> None:
    """Write a `MobileNetV2Model` from a PyTorch state dict of the original layout.

    Both list the same 52 convolutions, each with its batch normalisation, in the order of the forward pass.
    """
    hf = transformers()
    model = hf.MobileNetV2Model(hf.MobileNetV2Config(tf_padding=False, layer_norm_eps=EPSILON))
    theirs = torch.load(weights, map_location="cpu", weights_only=True)  # its SHA-256 has been checked
    ours = model.state_dict()
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": BILINEAR,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n", encoding="utf-8")


def save_gguf(weights: Path, folder: Path) -> None:
    """Write a causal language model of a GGUF file, with its tokenizer, in float32. ResourceError: no reader."""
    hf = transformers()
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ResourceError(f"{weights.name} needs {' and '.join(missing)}: pip install 'ray-app[demo]'")
    where = {"gguf_file": weights.name, "local_files_only": True}
    quantised = hf.AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **where)
    config = quantised.config
    if hasattr(config, "quantization_config"):  # of the file; the weights are plain numbers now
        del config.quantization_config
    model = hf.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(weights.parent, **where).save_pretrained(folder)
