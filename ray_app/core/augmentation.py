"""Augmentation of training pairs: both sides move together, and events are removed or added.

All randomness is that of the step (`BatchNoise`), so that every division of a batch sees the same pairs.

Shapes: B = pairs, E, D = widths, H, W = sides of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import ConfigError

LAYER = 1000
"""Number of this file's first draw; adapters use smaller numbers."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random changes of a pair; with the defaults there are none."""

    event_shape: tuple[int, ...]
    """Channels, height, width of the event image."""
    target_shape: tuple[int, ...]
    """The same of the target."""
    flip: float = 0.0
    """Probability that both images are mirrored left to right."""
    shift: float = 0.0
    """Both images are moved by up to this share of their sides; what comes in at an edge repeats it."""
    event_dropout: float = 0.0
    """Up to this share of an image's event pixels becomes background."""
    event_noise: float = 0.0
    """Up to this share of an image's pixels becomes red or blue."""

    def __post_init__(self) -> None:
        for side in ("event", "target"):
            if len(shape := getattr(self, f"{side}_shape")) != 3:
                raise ConfigError(
                    f"augmentation moves images (channels, height, width), but the {side} feature has shape "
                    f"{list(shape)}; leave --flip, --shift, --event-dropout and --event-noise at 0"
                )
        if self.event_noise and self.event_shape[0] != 3:
            raise ConfigError(
                f"--event-noise draws red and blue, but event images have {self.event_shape[0]} channels"
            )

    def __call__(self, event_BE: Tensor, target_BD: Tensor, noise: BatchNoise) -> tuple[Tensor, Tensor]:
        """Return the pairs, some of them changed; the given tensors are left as they are."""
        device = event_BE.device
        event, target = (
            event_BE.view(len(event_BE), *self.event_shape),
            target_BD.view(len(target_BD), *self.target_shape),
        )
        if self.flip:
            flipped = (noise.uniform(LAYER, 1, device) < self.flip).view(len(event), 1, 1, 1)
            event, target = (torch.where(flipped, image.flip(3), image) for image in (event, target))
        if self.shift:
            by_B2 = (2.0 * noise.uniform(LAYER + 1, 2, device) - 1.0) * self.shift
            event, target = shifted(event, by_B2), shifted(target, by_B2)
        event = self.changed_events(event, noise) if self.event_dropout or self.event_noise else event
        return event.reshape(event_BE.shape), target.reshape(target_BD.shape)

    def changed_events(self, event: Tensor, noise: BatchNoise) -> Tensor:
        """Set some event pixels to white and some pixels to red or blue; how many differs between images."""
        height, width = event.shape[2:]
        how_much_B2 = noise.uniform(LAYER + 2, 2, event.device)
        if self.event_dropout:
            gone = noise.uniform(LAYER + 3, height * width, event.device) < how_much_B2[:, :1] * self.event_dropout
            event = torch.where(gone.view(len(event), 1, height, width), event.new_ones(()), event)
        if self.event_noise:
            draw = noise.uniform(LAYER + 4, height * width, event.device).view(len(event), 1, height, width)
            share = (how_much_B2[:, 1:] * self.event_noise).view(len(event), 1, 1, 1)
            red, blue = event.new_tensor([1.0, 0.0, 0.0]), event.new_tensor([0.0, 0.0, 1.0])
            event = torch.where(
                draw < share, torch.where(draw < share / 2, red.view(1, 3, 1, 1), blue.view(1, 3, 1, 1)), event
            )
        return event


def shifted(image: Tensor, by_B2: Tensor) -> Tensor:
    """Move images by a share (rows, columns) of their sides, to whole pixels; edges are repeated."""
    rows, columns = image.shape[2:]
    row_BH = (torch.arange(rows, device=image.device) - (by_B2[:, :1] * rows).round().long()).clamp(0, rows - 1)
    column_BW = (torch.arange(columns, device=image.device) - (by_B2[:, 1:] * columns).round().long()).clamp(
        0, columns - 1
    )
    pair_B = torch.arange(len(image), device=image.device)
    # Indices apart from a slice: their axes come first, the channels last.
    return image[pair_B[:, None, None], :, row_BH[:, :, None], column_BW[:, None, :]].permute(0, 3, 1, 2)
