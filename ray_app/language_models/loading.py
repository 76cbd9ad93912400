"""Folders of Hugging Face models: what is in one, its tokenizer, and its weights, which are safetensors.

No code from a folder is run, nothing is unpickled, and nothing is fetched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ray_app.encoders.library import transformers
from ray_app.errors import InputError, ResourceError
from ray_app.listing import data_in, is_data
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import sha256_file

EVENTGPT, JOINED = "EventChat_llama", "ray_app_joined"
"""`model_type` of EventGPT, and of folders of our own; transformers knows neither."""
SAFE = {"local_files_only": True, "trust_remote_code": False}
IDENTITY = ("config.json", "*.safetensors", "tokenizer*", "*processor_config.json")
"""Files that decide what a model answers."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. InputError: no model in the folder, or weights that are not safetensors."""
    try:
        config = parse_object((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no folder of a Hugging Face model: config.json cannot be read.") from error
    if not any(path.suffix == ".safetensors" for path in data_in(folder)):
        raise InputError(
            f"{folder} has no weights in safetensors. Pickled ones (pytorch_model.bin) are not read: convert them "
            "with save_pretrained(..., safe_serialization=True)."
        )
    return config


def model_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a model's files by name, those of folders within it too."""
    found = {
        str(path.relative_to(folder)): path
        for pattern in IDENTITY
        for path in folder.rglob(pattern)
        if is_data(path.name)
    }
    return {name: sha256_file(found[name]) for name in sorted(found)}


def read_weights(folder: Path, kind: Any, dtype: str, device: str, config: Any = None) -> Any:
    """Return the model of a class of transformers, for inference. InputError: weights that the class lacks."""
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they are named below
    model, loaded = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, config=config, **reported, **SAFE)
    if absent := sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"]):
        raise InputError(  # the library would make them up
            f"{folder}: {len(absent)} weights of a {type(model).__name__} are missing or of another shape, "
            f"{absent[0]} is the first; take the folder that the model was saved to."
        )
    return model.to(device).eval()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Facts about the target's tokens that `replay` needs."""

    size: int
    """Numbers that the model may choose."""
    start_token: int | None
    """Token before a text, where the tokenizer has one."""
    end_token: int
    """Ends an answer."""


def vocabulary(folder: Path) -> Vocabulary:
    """Read the facts of the model in a folder. InputError: no tokenizer, or one without an end token."""
    try:
        values = parse_object((folder / "config.json").read_bytes())
        if values.get("model_type") == JOINED:
            folder = folder / values["language_model"]
        tokenizer = read_tokenizer(folder)
        if values.get("model_type") == EVENTGPT:
            size = int(values["vocab_size"])
        else:
            size = transformers().AutoConfig.from_pretrained(folder, **SAFE).get_text_config().vocab_size
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its config or tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    return Vocabulary(size, tokenizer.bos_token_id, tokenizer.eos_token_id)


def read_tokenizer(folder: Path) -> Any:
    """InputError: it has no end token."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder, **SAFE)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no end token, so no answer would ever be whole.")
    return tokenizer


def tokenizer_difference(one: Any, other: Any) -> str | None:
    """Return the first token that two tokenizers number differently, in words, added tokens apart; None: no such."""
    mine, theirs = one.get_vocab(), other.get_vocab()
    added = one.get_added_vocab().keys() | other.get_added_vocab().keys()
    small, large = sorted((mine, theirs), key=len)
    for token, number in sorted(small.items(), key=lambda item: item[1]):
        if token not in added and large.get(token) != number:
            numbers = [vocab.get(token, "not there") for vocab in (mine, theirs)]
            return f"token '{token}' is {numbers[0]} in the one and {numbers[1]} in the other"
    return None


def out_of_memory(error: torch.OutOfMemoryError, device: str) -> ResourceError:
    """Return what to lower when a GPU's memory is exceeded."""
    first = str(error).splitlines()[0]
    return ResourceError(
        f"the memory of {device} does not hold both models and their caches ({first}); lower --num-frames, "
        "--max-new-tokens or --num-speculative-tokens, take --dtype bfloat16, or a smaller model."
    )
