"""A folder of our own that joins an image encoder, a projector and a causal language model.

    config.json         model_type, the names of the two folders, and what is taken from the encoder
    model.safetensors   the projector: Linear, GELU, Linear, …
    encoder/  language_model/   folders as `save_pretrained` writes them
    MANIFEST.sha256     SHA-256 of every file, checked before anything is read

Shapes: T = pictures, N = image tokens, E = width of an encoder's token, D = width of the language model.
"""

import json
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_app.config.base import Config, Positive
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.library import transformers
from ray_app.encoders.registry import load_encoder
from ray_app.errors import InputError
from ray_app.language_models.model import Frames, LanguageModel, Prompt
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import sha256_file, staged_folder

PICTURES = "{pictures}"
PICTURE_PLACE = -1
"""Number in the place of all pictures in a prompt; no token has it."""
CHECKSUMS = "MANIFEST.sha256"


class JoinedConfig(Config):
    """config.json of a folder that joins three models."""

    model_type: Literal["ray_app_joined"] = "ray_app_joined"
    """Kind of the folder."""
    encoder: str = "encoder"
    """Folder of the image encoder, within this one."""
    language_model: str = "language_model"
    """Folder of the language model."""
    layer: int | None = None
    """Layer of the encoder from the last one, -1; default: its own choice."""
    pool: str = "none"
    """Tokens of a picture that are kept: none (all), mean, cls, or rows x columns such as 2x2."""
    num_images: Positive = 1
    """Pictures that the encoder takes at a time."""
    projector: tuple[Positive, ...]
    """Widths of the projector, from the encoder's token to the language model."""
    image_tokens: Positive | None = None
    """Tokens that the projector makes of all of the encoder's; default: one of each."""
    prompt: Annotated[str, Field(pattern=r"\{pictures\}[\s\S]*\{question\}")] = "{pictures}\n{question}\n"
    """Text around pictures and question."""


def projector_of(widths: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers of these widths, with GELU between them."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.GELU()] * bool(layers) + [nn.Linear(width, following)]
    return nn.Sequential(*layers)


def save_joined(
    folder: Path,
    config: JoinedConfig,
    projector: nn.Module,
    encoder: Path,
    language_model: Path,
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that appears whole or not at all; the two models are copied into it. InputError: it exists.

    `documents`: further JSON files by name.
    """
    if folder.exists():
        raise InputError(f"{folder} already exists; nothing is overwritten.")
    with staged_folder(folder) as partial:
        shutil.copytree(encoder, partial / config.encoder)
        shutil.copytree(language_model, partial / config.language_model)
        save_file(
            {key: value.detach().contiguous() for key, value in projector.state_dict().items()},
            partial / "model.safetensors",
        )
        (partial / "config.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for name, document in (documents or {}).items():
            (partial / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sums = [f"{sha256_file(path)}  {path.relative_to(partial)}\n" for path in files]
        (partial / CHECKSUMS).write_text("".join(sums), encoding="utf-8")


def verify_joined(folder: Path) -> None:
    """Check every file against the list. InputError names the one that is missing, damaged or not listed."""
    try:
        lines = [line.split("  ", 1) for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()]
        listed = {name: sha256 for sha256, name in lines}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CHECKSUMS} is missing or damaged; write the folder again.") from error
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {CHECKSUMS}
    if unlisted := sorted(there - listed.keys()):
        raise InputError(f"{folder / unlisted[0]} is not in {CHECKSUMS}; take it away, or write the folder again.")
    for name, sha256 in listed.items():
        if name not in there or sha256_file(folder / name) != sha256:
            raise InputError(f"{folder / name} is missing or damaged: its SHA-256 differs from {CHECKSUMS}.")


class JoinedModel(LanguageModel):
    """An encoder, a projector and a causal language model."""

    shows = "frames"

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        verify_joined(folder)
        try:
            self._joined = JoinedConfig.model_validate(parse_object((folder / "config.json").read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{folder / 'config.json'}: {name}: {first['msg'].lower()}.") from error
        self.folder = folder
        super().__init__(folder, dtype, device)
        joined, number = self._joined, str(self.model.dtype).removeprefix("torch.")
        settings = EncoderSettings(joined.layer, joined.pool, False, number, joined.num_images)  # type: ignore[arg-type]
        self._encoder = load_encoder(folder / joined.encoder, settings, device)
        self._projector = projector_of(joined.projector)
        try:
            self._projector.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise InputError(
                f"{folder / 'model.safetensors'} is no projector of widths {list(joined.projector)}: "
                f"{' '.join(str(error).split())}"
            ) from error
        width = self.model.get_input_embeddings().weight.shape[1]
        if joined.projector[-1] != (wanted := width * (joined.image_tokens or 1)):
            raise InputError(
                f"{folder}: the projector ends at width {joined.projector[-1]}, the language model reads {wanted}."
            )
        self._projector = self._projector.to(self.device, self.model.dtype).eval()

    def text_folder(self) -> Path:
        return self.folder / self._joined.language_model

    def model_class(self) -> Any:
        return transformers().AutoModelForCausalLM

    def prompt(self, frames_THWC: Frames | None, question: str) -> Prompt:
        before, after = self._joined.prompt.split(PICTURES)
        after_ids = self.tokenizer(after.format(question=question), add_special_tokens=False)["input_ids"]
        ids = [*self.tokenizer(before)["input_ids"]] if before else []
        if frames_THWC is None:
            return Prompt((*ids, *after_ids))
        if len(frames_THWC) % self._joined.num_images:
            raise InputError(
                f"{self.folder} takes {self._joined.num_images} pictures at a time; {len(frames_THWC)} given."
            )
        pixels_TCHW = np.stack([self._encoder.preprocess(frame_HWC) for frame_HWC in frames_THWC])
        return Prompt((*ids, PICTURE_PLACE, *after_ids), PICTURE_PLACE, torch.from_numpy(pixels_TCHW))

    def embed_pictures(self, tokens_ND: Tensor) -> Tensor:
        if tokens_ND.shape[1] != self._joined.projector[0]:
            return super().embed_pictures(tokens_ND)
        embedded_ND: Tensor = self._projector(tokens_ND.to(self.device, self.model.dtype))
        return embedded_ND

    def features(self, frames_THWC: Frames) -> Tensor:
        """Return the features of pictures as the projector reads them, (T, E), of one picture each."""
        pixels_TCHW = np.stack([self._encoder.preprocess(frame_HWC) for frame_HWC in frames_THWC])
        tokens_TNE: Tensor = self._encoder.tokens(torch.from_numpy(pixels_TCHW).to(self.device, self.model.dtype))
        return tokens_TNE.flatten(1).float()

    def picture_embeddings(self, pixels_TCHW: Tensor) -> Tensor:
        tokens_TNE: Tensor = self._encoder.tokens(pixels_TCHW)
        if (number := self._joined.image_tokens) is None:
            embedded: Tensor = self._projector(tokens_TNE)
            return embedded.flatten(0, 1)
        whole: Tensor = self._projector(tokens_TNE.flatten(1))
        return whole.unflatten(1, (number, -1)).flatten(0, 1)
