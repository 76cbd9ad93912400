"""Event images in the place of the target's pictures: an encoder of event images, and an adapter to its image tokens.

Shapes: T = event images, H, W = pixels, C = 3 colours, E = width of an event feature, N = image tokens, D = their
width.
"""

from pathlib import Path

import torch
from torch import Tensor

from ray_app.core.adapters.registry import num_parameters
from ray_app.encoders.registry import load_recorded
from ray_app.errors import InputError
from ray_app.language_models.model import Frames
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.manifest import EncoderRecord

FLOAT_BYTES = 4


def event_encoder_of(checkpoint: Checkpoint) -> EncoderRecord:
    """Return the encoder of a checkpoint's event features. InputError: none is recorded, or it reaches pixels."""
    event, target = checkpoint.features.event, checkpoint.features.target
    if event.encoder is None or target.kind == "images":
        raise InputError(
            f"{checkpoint.folder} carries event features of {event} to {target}; a drafter is shown image tokens. "
            "Train the adapter on a store of encoder features (`ray-app encode`)."
        )
    return event.encoder


class AlignedPictures:
    """An encoder and an adapter on one device."""

    def __init__(self, checkpoint: Path, encoder: Path, device: str) -> None:
        """CheckpointError: the checkpoint is damaged. InputError: it is not of the encoder's features."""
        loaded = load_checkpoint(checkpoint)
        self._features, self._device = loaded.features, torch.device(device)
        self._encoder = load_recorded(encoder, event_encoder_of(loaded), device)
        self._adapter = loaded.adapter.to(self._device)

    @torch.inference_mode()
    def tokens(self, events_THWC: Frames) -> Tensor:
        """Return the image tokens (N, D) of one row. InputError: another number of event images."""
        event, target = self._features.event, self._features.target
        num_images = self._encoder.settings.num_images
        if len(events_THWC) != num_images:
            raise InputError(f"the adapter's event encoder takes {num_images} event images; {len(events_THWC)} given")
        encoded_1NE = self._encoder.encode([list(events_THWC)])
        # As a store keeps it, so that the adapter sees what it was trained on.
        stored_1E = encoded_1NE.reshape(1, -1).to(getattr(torch, event.dtype)).float()
        aligned_1D: Tensor = self._adapter(stored_1E.to(self._device) * event.scale)
        return (aligned_1D / target.scale).reshape(-1, target.shape[-1])

    def weight_bytes(self) -> int:
        """Return the memory of the adapter's and the encoder's weights."""
        encoder = self._encoder.model.parameters()
        return FLOAT_BYTES * num_parameters(self._adapter) + sum(w.numel() * w.element_size() for w in encoder)
