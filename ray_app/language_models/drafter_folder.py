"""Drafters that `demo draft` trains, as folders that belong to one target.

    drafter.json              format, settings of the parts, layout of what they learnt from with the target's digest
    early_exit.safetensors    factors of the target's first layers and a head for some ids, float16
    event_tokens.safetensors  from features of event images to the target's image tokens, float16
    eagle_head.safetensors    in the place of both: a layer on the target's last states and its head, float16
    provenance.json  MANIFEST.sha256

Features of event images are those of the target's own encoder.

Shapes: T = event images, H, W = pixels, C = 3 colours, N = image tokens, D = width of the language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.drafting import EagleHead, EarlyExitLayers, EventTokens
from ray_app.errors import CheckpointError, ConfigError, InputError
from ray_app.language_models.draft_rows import DraftLayout
from ray_app.language_models.joined import CHECKSUMS, JoinedModel
from ray_app.language_models.model import Frames, LanguageModel
from ray_app.store.atomic import sha256_file, verify_folder
from ray_app.store.checkpoint import read_document, read_tensors, save_verifiable
from ray_app.store.golden import assembled

DRAFTER = "drafter.json"
FORMAT = "ray_app drafter 1"
EAGLE_HEAD = "eagle_head"
PARTS = ({"early_exit", "event_tokens"}, {EAGLE_HEAD})
"""Names of the parts of each kind of drafter."""


@dataclass(frozen=True, slots=True)
class EventDrafter:
    """A drafter that is shown event images: both parts, read for their target."""

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


def write_drafter(folder: Path, parts: Sequence[Adapter], layout: DraftLayout, origin: Mapping[str, Any]) -> None:
    """Write the folder: an early exit and event tokens, or an EAGLE head. CheckpointError: it exists."""
    named = {part.config.strategy: part for part in parts}
    document = {
        "format": FORMAT,
        "parts": {name: part.config.to_dict() for name, part in named.items()},
        "layout": layout.model_dump(mode="json"),
    }
    halves = {
        part_file(name): {key: tensor.half() for key, tensor in part.state_dict().items()}
        for name, part in named.items()
    }
    save_verifiable(folder, halves, {DRAFTER: document, "provenance.json": dict(origin)})


def part_file(name: str) -> str:
    """Return the name of a part's file."""
    return f"{name}.safetensors"


def is_drafter(folder: Path) -> bool:
    """Return True if a folder is such a drafter."""
    return (folder / DRAFTER).is_file()


def require_target(folder: Path, target: Path) -> dict[str, Any]:
    """Return the settings of a drafter's parts by name. CheckpointError: damaged. InputError: another target's."""
    verify_folder(folder)
    document = read_document(folder / DRAFTER)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{folder / DRAFTER}: format {str(document.get('format'))[:40]!r}, not {FORMAT!r}.")
    try:
        layout, parts = DraftLayout.model_validate(document["layout"]), dict(document["parts"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DRAFTER} cannot be used: its layout or its parts are damaged.") from error
    if parts.keys() not in PARTS:
        raise CheckpointError(f"{folder / DRAFTER} cannot be used: no drafter has the parts {sorted(parts)}.")
    if not (target / CHECKSUMS).is_file():
        raise InputError(f"{folder} drafts for a target that `demo build` made; {target} is none.")
    if (digest := sha256_file(target / CHECKSUMS)) != layout.target:
        raise InputError(
            f"{folder} was trained for a target of SHA-256 {layout.target[:12]}…, {target} is {digest[:12]}…; train "
            f"one for it: ray-app demo draft --target {target}{f' --kind {EAGLE_HEAD}' * (EAGLE_HEAD in parts)}"
        )
    return parts


def read_drafter(folder: Path, target: LanguageModel) -> EventDrafter | EagleHead:
    """Read a drafter for its target.

    CheckpointError: a damaged file. InputError: it was trained for another target.
    """
    parts: dict[str, Adapter] = {}
    for name, settings in require_target(folder, target.folder).items():
        try:
            config = AdapterConfig.from_dict(settings)
        except ConfigError as error:
            raise CheckpointError(f"{folder / DRAFTER} cannot be used: {error}") from error
        tensors = read_tensors(folder / part_file(name))
        parts[name] = assembled(config, {key: half.float() for key, half in tensors.items()})
    assert isinstance(target, JoinedModel), "its folder has a list of checksums"
    match parts:
        case {"eagle_head": EagleHead() as head}:
            return head
        case {"early_exit": EarlyExitLayers() as exit_layers, "event_tokens": EventTokens() as events}:
            return EventDrafter(exit_layers, events, target)
    raise CheckpointError(f"{folder / DRAFTER} cannot be used: a part is not of the kind that it is called.")
