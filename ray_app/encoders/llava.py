"""Image and video towers inside a checkpoint of LLaVA or Video-LLaVA, with and without the projector.

Shapes as in base.py. The features are those that the whole model puts into its prompt: hidden state of
`vision_feature_layer` (-2), of pictures without the class token where the strategy is `default`, then the projector.
"""

import importlib

import torch
from torch import Tensor, nn

from ray_app.encoders.base import GridTokens, VisionModel
from ray_app.encoders.library import transformers
from ray_app.encoders.weights import ModelWeights, load_exactly
from ray_app.errors import InputError

PROJECTOR = "multi_modal_projector."


class Llava(VisionModel):
    """The vision tower of LLaVA."""

    tower_key = "vision_tower."
    model_class = "Llava"

    def own_layer(self) -> int:
        layer = self.config.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise InputError(f"{self.folder} joins several layers ({layer}); name one with --layer.")
        return layer

    def identity(self) -> dict[str, object]:
        keys = ("model_type", "vision_config", "vision_feature_select_strategy", "projector_hidden_act")
        return {key: self.config.get(key) for key in keys}

    def build(self, weights: ModelWeights) -> str:
        self.keeps_prefix = self.config.get("vision_feature_select_strategy", "default") != "default"
        vision = self.config.get("vision_config")
        if not isinstance(vision, dict):
            raise InputError(f"{self.folder / 'config.json'} has no vision_config.")
        lead = "model." if any(key.startswith(f"model.{self.tower_key}") for key in weights.files) else ""
        self.model = self.tower(weights, vision, lead + self.tower_key, vision.get("model_type", "clip_vision_model"))
        self._projector = self._read_projector(weights, lead) if self.projector else None
        return f"{self.model_class}ForConditionalGeneration, {self.tower_key.removesuffix('.')}"

    def _read_projector(self, weights: ModelWeights, lead: str) -> nn.Module:
        name = self.config["model_type"]
        parts = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        config = getattr(transformers(), f"{self.model_class}Config")(**self.config)
        with torch.device("meta"):
            projector: nn.Module = getattr(parts, f"{self.model_class}MultiModalProjector")(config)
        load_exactly(projector, self.tensors(weights, lead + PROJECTOR), self.folder)
        return projector.to(self.device, self.dtype).eval()

    def hidden(self, pixels_BChw: Tensor) -> GridTokens:
        states = self.model(pixels_BChw, output_hidden_states=True, return_dict=True).hidden_states
        found = self.as_tokens(self.chosen(states), pixels_BChw)
        return GridTokens(self._projector(found.tokens_BTW), found.grid) if self._projector else found


class VideoLlava(Llava):
    """The image tower of Video-LLaVA for one picture, its video tower for the frames of a video."""

    model_class = "VideoLlava"
    own_frames = 8

    def build(self, weights: ModelWeights) -> str:
        video = self.settings.num_images > 1
        self.tower_key = "video_tower." if video else "image_tower."
        name = super().build(weights)
        self.keeps_prefix = self.keeps_prefix or video
        return name
