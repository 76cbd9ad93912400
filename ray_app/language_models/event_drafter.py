"""A drafter that is shown event images, as a folder that belongs to one target.

    drafter.json              format, the target's digest, settings of both parts, layout of what they learnt from
    early_exit.safetensors    factors of the target's first layers and a head for some ids, float16
    event_tokens.safetensors  from features of event images to the target's image tokens, float16
    provenance.json  MANIFEST.sha256

Features of event images are those of the target's own encoder.

Shapes: T = event images, H, W = pixels, C = 3 colours, N = image tokens, D = width of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.drafting import EarlyExitLayers, EventTokens
from ray_app.errors import CheckpointError, ConfigError, InputError
from ray_app.language_models.draft_rows import DraftLayout
from ray_app.language_models.joined import CHECKSUMS, JoinedModel
from ray_app.language_models.model import Frames, LanguageModel
from ray_app.store.atomic import sha256_file, verify_folder
from ray_app.store.checkpoint import read_document, read_tensors, save_verifiable
from ray_app.store.golden import assembled

DRAFTER = "drafter.json"
FORMAT = "ray_app drafter 1"
PARTS = {"early_exit": EarlyExitLayers, "event_tokens": EventTokens}


@dataclass(frozen=True, slots=True)
class EventDrafter:
    """Both parts, read for their target."""

    exit_layers: EarlyExitLayers
    """Changes of the target's first layers, and a head."""
    events: EventTokens
    """Adapter from event features to image tokens."""
    target: JoinedModel
    """The target."""

    @torch.inference_mode()
    def image_tokens(self, events_THWC: Frames) -> Tensor:
        """Return the image tokens of one event image, (N, D). InputError: another number of images."""
        if len(events_THWC) != 1:
            raise InputError(f"the drafter is shown one event image; {len(events_THWC)} given.")
        event_1E = self.target.features(events_THWC).to(torch.float16).float()
        tokens: Tensor = self.events(event_1E).reshape(self.events.config.image_tokens, -1)
        return tokens


def write_event_drafter(
    folder: Path,
    exit_layers: EarlyExitLayers,
    events: EventTokens,
    layout: DraftLayout,
    origin: Mapping[str, Any],
) -> None:
    """Write the folder. CheckpointError: it exists."""
    parts: dict[str, Adapter] = {"early_exit": exit_layers, "event_tokens": events}
    document = {
        "format": FORMAT,
        "parts": {name: part.config.to_dict() for name, part in parts.items()},
        "layout": layout.model_dump(mode="json"),
    }
    halves = {
        f"{name}.safetensors": {key: tensor.half() for key, tensor in part.state_dict().items()}
        for name, part in parts.items()
    }
    save_verifiable(folder, halves, {DRAFTER: document, "provenance.json": dict(origin)})


def is_event_drafter(folder: Path) -> bool:
    """Return True if a folder is such a drafter."""
    return (folder / DRAFTER).is_file()


def require_target(folder: Path, target: Path) -> DraftLayout:
    """Return the layout of what a drafter learnt from. CheckpointError: damaged. InputError: another target's."""
    verify_folder(folder)
    document = read_document(folder / DRAFTER)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{folder / DRAFTER}: format {str(document.get('format'))[:40]!r}, not {FORMAT!r}.")
    try:
        layout = DraftLayout.model_validate(document["layout"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{folder / DRAFTER} cannot be used: its layout is damaged.") from error
    if not (target / CHECKSUMS).is_file():
        raise InputError(f"{folder} drafts for a target that `demo build` made; {target} is none.")
    if (digest := sha256_file(target / CHECKSUMS)) != layout.target:
        raise InputError(
            f"{folder} was trained for a target of SHA-256 {layout.target[:12]}…, {target} is {digest[:12]}…; train "
            f"one for it: ray-app demo draft --target {target}"
        )
    return layout


def read_event_drafter(folder: Path, target: LanguageModel) -> EventDrafter:
    """Read a drafter for its target.

    CheckpointError: a damaged file. InputError: it was trained for another target.
    """
    require_target(folder, target.folder)
    assert isinstance(target, JoinedModel), "its folder has a list of checksums"
    document = read_document(folder / DRAFTER)
    parts = {}
    for name, kind in PARTS.items():
        try:
            config = AdapterConfig.from_dict(document["parts"][name])
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"{folder / DRAFTER} cannot be used: {error}") from error
        part = assembled(config, {k: v.float() for k, v in read_tensors(folder / f"{name}.safetensors").items()})
        assert isinstance(part, kind)
        parts[name] = part
    exit_layers, events = parts["early_exit"], parts["event_tokens"]
    assert isinstance(exit_layers, EarlyExitLayers)
    assert isinstance(events, EventTokens)
    return EventDrafter(exit_layers, events, target)
