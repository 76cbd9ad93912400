"""Kinds of language models, by `model_type` of config.json: what each is shown, and how it is asked."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_app.encoders.library import transformers
from ray_app.errors import InputError
from ray_app.language_models.eventgpt import EventGpt
from ray_app.language_models.joined import JoinedModel
from ray_app.language_models.loading import EVENTGPT, JOINED, read_config
from ray_app.language_models.model import Frames, LanguageModel, Prompt


class TextModel(LanguageModel):
    """Any causal language model: it is asked by its chat template, or as Vicuna is, and sees no picture."""

    shows = "the question alone"
    sees = False

    def model_class(self) -> Any:
        return transformers().AutoModelForCausalLM

    def prompt(self, frames_THWC: Frames | None, question: str) -> Prompt:  # noqa: ARG002
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": question}]
            asked = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        else:
            asked = self.tokenizer(f"USER: {question} ASSISTANT:")
        return Prompt(tuple(asked["input_ids"]))


class VideoLlava(LanguageModel):
    """Video-LLaVA: frames through the checkpoint's own image processor, the prompt as it was trained."""

    shows = "frames"

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        super().__init__(folder, dtype, device)
        self._pictures = transformers().VideoLlavaImageProcessor.from_pretrained(folder, local_files_only=True)

    def model_class(self) -> Any:
        return transformers().VideoLlavaForConditionalGeneration

    def prompt(self, frames_THWC: Frames | None, question: str) -> Prompt:
        config = self.model.config
        if frames_THWC is None:
            return Prompt(tuple(self.tokenizer(f"USER: {question} ASSISTANT:")["input_ids"]))
        token = config.video_token_index
        asked = self.tokenizer(f"USER: {self.tokenizer.convert_ids_to_tokens(token)}\n{question} ASSISTANT:")
        # The class for videos needs torchvision; the one for pictures takes the same steps with Pillow and numpy.
        pixels = self._pictures(
            list(frames_THWC),
            return_tensors="pt",
            return_legacy_image_output=False,
            input_data_format="channels_last",
        )
        return Prompt(tuple(asked["input_ids"]), token, pixels["pixel_values"])

    def picture_embeddings(self, pixels_TCHW: Tensor) -> Tensor:
        found: Tensor = self.model.model.get_video_features(pixels_TCHW[None]).pooler_output
        return found.flatten(0, 1)


class Llava(LanguageModel):
    """LLaVA: each frame through the checkpoint's own image processor, one after the other in the prompt."""

    shows = "frames"

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        super().__init__(folder, dtype, device)
        self._pictures = transformers().CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)

    def model_class(self) -> Any:
        return transformers().LlavaForConditionalGeneration

    def prompt(self, frames_THWC: Frames | None, question: str) -> Prompt:
        if frames_THWC is None:
            return Prompt(tuple(self.tokenizer(f"USER: {question} ASSISTANT:")["input_ids"]))
        token = self.model.config.image_token_index
        asked = self.tokenizer(f"USER: {self.tokenizer.convert_ids_to_tokens(token)}\n{question} ASSISTANT:")
        pixels = self._pictures(list(frames_THWC), return_tensors="pt", input_data_format="channels_last")
        return Prompt(tuple(asked["input_ids"]), token, pixels["pixel_values"])

    def picture_embeddings(self, pixels_TCHW: Tensor) -> Tensor:
        return torch.cat(list(self.model.model.get_image_features(pixels_TCHW).pooler_output))


LOADERS: dict[str, type[LanguageModel]] = {
    "video_llava": VideoLlava,
    "llava": Llava,
    EVENTGPT: EventGpt,
    JOINED: JoinedModel,
}
"""Loaders by `model_type` of config.json; every other model is a `TextModel`."""


def loader(folder: Path) -> type[LanguageModel]:
    """Return the loader of a folder's model. InputError: no model, or weights not in safetensors."""
    return LOADERS.get(read_config(folder).get("model_type", ""), TextModel)


def load(folder: Path, dtype: str, device: str) -> LanguageModel:
    """Return the model in a folder. InputError: it cannot be read as what its config.json says."""
    kind = loader(folder)
    try:
        return kind(folder, dtype, device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]}") from error
