"""EventGPT's side of pictures: its tower, projector and feature adaptor, and its spatio-temporal tokens.

Shapes as in base.py; S = tokens of a picture, class token included, D = width of the language model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ray_app.encoders.base import VisionModel
from ray_app.encoders.weights import ModelWeights, load_exactly
from ray_app.errors import InputError

TOWER, PROJECTOR, ADAPTOR = "model.visual_tower.visual_tower.", "model.visual_projector.", "model.feature_adaptor."
Q_FORMER = ("model.query_embed", "model.attention_layers.")
HEAD_WIDTH = 64
"""Width of an attention head of CLIP's towers up to ViT-L."""


class EventGpt(VisionModel):
    """EventGPT: n event images in, n temporal tokens and then S spatial tokens out."""

    own_event_images = 5

    def identity(self) -> dict[str, Any]:
        keys = ("model_type", "vision_config", "event_feature_adaptor")
        return {key: self.config.get(key) for key in keys}

    def build(self, weights: ModelWeights) -> str:
        if self.config.get("use_event_qformer") or any(key.startswith(Q_FORMER) for key in weights.files):
            raise InputError(
                f"{self.folder} is an EventGPT with a q-former (use_event_qformer), which is not supported; take one "
                "with a feature adaptor."
            )
        if self.settings.pool not in ("none", "mean"):
            raise InputError(
                f"--pool {self.settings.pool}: EventGPT's tokens are means over time and over space already; take "
                "none or mean."
            )
        self.projector = True
        vision = self.config.get("vision_config") or _clip_settings(weights)
        self.model = self.tower(weights, vision, TOWER, "clip_vision_model")
        hidden, width = self.model.config.hidden_size, int(self.config.get("hidden_size", 4096))
        with torch.device("meta"):
            layers: list[nn.Module] = [nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width)]
            projector, adaptor = nn.Sequential(*layers), nn.Linear(width, width)
        load_exactly(projector, self.tensors(weights, PROJECTOR), self.folder)
        self._after = nn.Sequential(projector)
        if self.config.get("event_feature_adaptor"):
            load_exactly(adaptor, self.tensors(weights, ADAPTOR), self.folder)
            self._after.append(adaptor)
        self._after = self._after.to(self.device, self.dtype).eval()
        return "EventChatModel"

    def tokens(self, pixels_BChw: Tensor) -> Tensor:
        states_BSD = self._after(self.hidden(pixels_BChw).tokens_BTW)
        tokens_NTD = spatio_temporal(states_BSD.unflatten(0, (-1, self.settings.num_images)))
        if self.settings.pool == "none":
            return tokens_NTD
        return tokens_NTD[:, : self.settings.num_images].mean(dim=1, keepdim=True)


def spatio_temporal(states_NISD: Tensor) -> Tensor:
    """Return the mean over space of each picture, then the mean over pictures of each place, (N, I + S, D)."""
    return torch.cat([states_NISD.mean(dim=2), states_NISD.mean(dim=1)], dim=1)


def _clip_settings(weights: ModelWeights) -> dict[str, Any]:
    """Return the settings of EventGPT's tower by the shapes of its weights: its config names a folder instead."""
    shapes = weights.shapes(TOWER)
    patches = next((shape for key, shape in shapes.items() if key.endswith("patch_embedding.weight")), None)
    places = next((shape for key, shape in shapes.items() if key.endswith("position_embedding.weight")), None)
    inner = next((shape for key, shape in shapes.items() if key.endswith("layers.0.mlp.fc1.weight")), None)
    if not (patches and places and inner):
        raise InputError(f"{weights.folder} has no CLIP tower under {TOWER}…")
    width, _, patch, _ = patches
    return {
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": sum(key.endswith(".mlp.fc1.weight") for key in shapes),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "patch_size": patch,
        "image_size": patch * round((places[0] - 1) ** 0.5),
    }
