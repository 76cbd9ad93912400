"""EventGPT: its Llama from transformers, its tower, projector and adaptor from the encoders; no code from its folder.

Shapes: T = event images, C = 3 colours, H, W = pixels, N = tokens of the event images, D = width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.library import transformers
from ray_app.encoders.registry import load_encoder
from ray_app.language_models.loading import read_config
from ray_app.language_models.model import Frames, LanguageModel, Prompt

EVENT_PLACE = -200
"""Number in the place of all event images in a prompt, as in EventGPT's own code; no token has it."""
TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <event>\n{question} ASSISTANT:"
)
"""Vicuna's template, as EventGPT's `eventgpt_v1`. Its own sentence may be another: see `TEMPLATE_FILE`."""
TEMPLATE_FILE = "prompt_template.txt"
"""File in the model's folder that replaces `TEMPLATE`; it holds `<event>` and `{question}`."""
NOT_LLAMA = ("model_type", "architectures", "auto_map", "transformers_version")


class EventGpt(LanguageModel):
    """EventGPT, shown event images of equal event count."""

    shows = "event images"

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        super().__init__(folder, dtype, device)
        number = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[self.model.dtype]
        self._encoder_settings: dict[str, Any] = {"dtype": number}
        self._template = template_of(folder, TEMPLATE)
        self._encoders: dict[int, Any] = {}

    def model_class(self) -> Any:
        return transformers().LlamaForCausalLM

    def config(self) -> Any:
        values = {key: value for key, value in read_config(self.folder).items() if key not in NOT_LLAMA}
        return transformers().LlamaConfig(**values)

    def prompt(self, frames_THWC: Frames | None, question: str) -> Prompt:
        text = self._template.format(question=question)
        if frames_THWC is None:
            return Prompt(tuple(self.tokenizer(text.replace("<event>\n", ""))["input_ids"]))
        before, after = text.split("<event>")
        ids = [*self.tokenizer(before)["input_ids"], EVENT_PLACE]
        ids += self.tokenizer(after, add_special_tokens=False)["input_ids"]
        preprocess = self._encoder(len(frames_THWC)).preprocess
        pixels_TCHW = np.stack([preprocess(frame_HWC) for frame_HWC in frames_THWC])
        return Prompt(tuple(ids), EVENT_PLACE, torch.from_numpy(pixels_TCHW))

    def picture_embeddings(self, pixels_TCHW: Tensor) -> Tensor:
        tokens_1ND: Tensor = self._encoder(len(pixels_TCHW)).tokens(pixels_TCHW)
        return tokens_1ND[0]

    def _encoder(self, num_images: int) -> Any:
        if num_images not in self._encoders:
            settings = EncoderSettings(num_images=num_images, **self._encoder_settings)
            self._encoders = {num_images: load_encoder(self.folder, settings, str(self.device))}
        return self._encoders[num_images]


def template_of(folder: Path, default: str) -> str:
    """Return the prompt template of a folder, its own where it has one."""
    path = folder / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else default
