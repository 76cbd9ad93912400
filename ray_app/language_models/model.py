"""Language models with a KV cache, on classes of transformers: a prompt of text and pictures, and steps behind it.

Shapes: P = positions of a prompt, N = positions of its pictures, K = tokens of a step, V = vocabulary, D = width.
T = frames, H, W = pixels, C = 3 colours.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.encoders.library import transformers
from ray_app.errors import InputError
from ray_app.language_models.loading import read_tokenizer, read_weights

Frames = NDArray[np.uint8]
"""Pictures (T, H, W, C)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as a model reads it, on the CPU."""

    token_ids: tuple[int, ...]
    """Its tokens; one of them is in the place of all pictures, where there are any."""
    picture_token: int | None = None
    """The token that the pictures replace."""
    pixels_TCHW: Tensor | None = None
    """The pictures, resized and normalised."""


class LanguageModel(ABC):
    """A model with its tokenizer on one device. A subclass says how it is loaded and what it is shown."""

    shows: ClassVar[str]
    """Description of the model's input."""
    sees: ClassVar[bool] = True
    """True if it can be shown pictures."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.tokenizer = read_tokenizer(self.text_folder())
        self.model = read_weights(self.text_folder(), self.model_class(), dtype, device, self.config())
        text = self.model.config.get_text_config(decoder=True)
        self.vocabulary_size: int = text.vocab_size
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self.end_token: int = self.tokenizer.eos_token_id

    @abstractmethod
    def model_class(self) -> Any:
        """Return the class of transformers that loads it."""

    def text_folder(self) -> Path:
        """Return the folder of the language model's weights and tokenizer."""
        return self.folder

    def config(self) -> Any:
        """Return the model's config where config.json is not one of transformers; else None."""
        return None

    @abstractmethod
    def prompt(self, frames_THWC: Frames | None, question: str) -> Prompt:
        """Prepare a prompt, with pictures or without."""

    def picture_embeddings(self, pixels_TCHW: Tensor) -> Tensor:  # noqa: ARG002
        """Return the pictures as the language model reads them, shape (N, D)."""
        raise InputError(f"{self.folder} sees no pictures.")

    def embed_pictures(self, tokens_ND: Tensor) -> Tensor:
        """Return image tokens that were made elsewhere as the language model reads them. InputError: their width."""
        width = self.model.get_input_embeddings().weight.shape[1]
        if tokens_ND.shape[1] != width:
            raise InputError(
                f"the adapter's image tokens are {tokens_ND.shape[1]} wide, {self.folder} reads {width}; train it on "
                "the image tokens of this model (`ray-app encode --target-encoder DIR --projector`)."
            )
        return tokens_ND

    @torch.inference_mode()
    def prefix(self, prompt: Prompt, pictures_ND: Tensor | None = None) -> Tensor:
        """Return the embeddings of a prompt, shape (P, D): this is where pictures are encoded, unless given."""
        embed, ids = self.model.get_input_embeddings(), prompt.token_ids
        if prompt.pixels_TCHW is None:
            whole_PD: Tensor = embed(torch.tensor(ids, device=self.device))
            return whole_PD
        place = ids.index(prompt.picture_token)
        before_PD, after_PD = (
            embed(torch.tensor(part, dtype=torch.long, device=self.device))
            for part in (ids[:place], ids[place + 1 :])
        )
        if pictures_ND is None:
            pictures_ND = self.picture_embeddings(prompt.pixels_TCHW.to(self.device, self.model.dtype))
        return torch.cat([before_PD, pictures_ND.to(before_PD), after_PD])

    def context(self) -> "Context":
        """Return an empty context. InputError: the model's cache cannot be cropped."""
        return Context(self.model, str(self.folder))

    def require_room(self, num_positions: int, max_new_tokens: int) -> None:
        """InputError if a prompt and its answer outgrow the model."""
        if self.max_positions is not None and num_positions + max_new_tokens > self.max_positions:
            raise InputError(
                f"a prompt of {num_positions:,} positions and an answer of up to {max_new_tokens:,} tokens outgrow "
                f"{self.folder}, which reads {self.max_positions:,}; lower --max-new-tokens or --num-frames, or "
                "shorten the question."
            )

    def now(self) -> float:
        """Return the time in seconds after all that was started on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def weight_bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())


class Context:
    """The KV cache of one prompt and what was read behind it."""

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self.cache = transformers().DynamicCache(config=model.config)
        require_croppable(self.cache, name, model.config)
        self._states: list[Tensor] | None = None

    @property
    def length(self) -> int:
        """Positions that were read."""
        length: int = self.cache.get_seq_length()
        return length

    @torch.inference_mode()
    def prefill(self, prefix: Tensor) -> Tensor:
        """Read a prompt (P, D); return the logits behind it, shape (1, V)."""
        return self._pass(inputs_embeds=prefix[None], logits_to_keep=1)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens in one pass; return the logits behind each, shape (K, V)."""
        return self._pass(input_ids=torch.tensor([list(tokens)], device=self._model.device))

    def crop(self, num_tokens: int) -> None:
        """Forget the last tokens. AssertionError: there are not as many."""
        assert 0 <= num_tokens <= self.length, f"{num_tokens} of {self.length} positions cannot be removed"
        if num_tokens:
            self.cache.crop(-num_tokens)

    def num_bytes(self) -> int:
        """Return the size of the cache."""
        kept = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def keep_states(self) -> list[Tensor]:
        """Return a list to which each pass of this context adds the head's input for its logits, (K, D)."""
        self._states = []
        return self._states

    def _pass(self, **inputs: Any) -> Tensor:
        with self._keeping():
            logits: Tensor = self._model(**inputs, cache=self.cache, use_cache=True).logits
        return logits[0]

    def _keeping(self) -> AbstractContextManager[Any]:
        """Hook the head for one pass, so that passes of other contexts are not seen."""
        states = self._states
        if states is None:
            return nullcontext()
        hook: AbstractContextManager[Any] = self._model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: states.append(inputs[0][0].clone())
        )
        return hook


def require_croppable(cache: Any, name: str, config: Any) -> None:
    """InputError if a rejected draft could not be removed from the cache again."""
    kinds = {
        "sliding windows": any(cache.is_sliding),
        "recurrent layers": any(cache.is_linear),
        "layers that cannot be cropped": not cache.is_croppable,
    }
    for kind, there in kinds.items():
        if there:
            raise InputError(
                f"{name} ({config.model_type}) keeps {kind} in its cache, from which rejected drafts cannot be "
                "removed; take a model with full attention in every layer."
            )
