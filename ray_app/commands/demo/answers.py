"""Rows that the demo's target learns from: features of rendered pictures, questions and true answers as tokens.

Shapes: N = pictures, E = width of a picture's feature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.data.array_store import write_store
from ray_app.encoders.base import VisionModel
from ray_app.events.render import event_image
from ray_app.language_models.answer_objective import pack_row
from ray_app.scenes.captions import FRAME_QUESTIONS, answer
from ray_app.scenes.facts import SceneFacts, frame_facts
from ray_app.scenes.scene import RENDERER, Scene
from ray_app.sources.images import resized
from ray_app.sources.scenes import ScenesSource
from ray_app.store.filesystem import Where

TRAINING, HELD_OUT = 0, 1
"""Parts of the drives: no drive is in both."""
KEY_SHARE = 0.4
"""Share of rows with the first question, which asks for the whole scene."""
APART_S = 40.0
"""Pictures of a drive are about so many seconds apart."""
SIDE = 224
"""Rows and columns of a picture, as a pair store of pictures has them."""
EVENT_SPAN_US = 50_000
"""Time of which events are drawn, as `prepare scenes` does by default."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A rendered picture with what is true in it."""

    sequence: str
    """Name of its drive."""
    t_us: int
    """Time in the drive."""
    image_HWC: NDArray[np.uint8]
    """The picture, `SIDE` x `SIDE`."""
    facts: SceneFacts
    """Facts about it."""
    event_HWC: NDArray[np.uint8] | None = None
    """Image of the simulated events of the last `EVENT_SPAN_US` before it, where they are asked for."""


def pictures(
    seed: int, part: int, num_drives: int, per_drive: int, *, first_drive: int = 0, with_events: bool = False
) -> Iterator[Picture]:
    """Yield pictures of some drives of a part, drive by drive."""
    for drive in range(first_drive, first_drive + num_drives):
        scene = Scene(int(np.random.SeedSequence([seed, part, drive]).generate_state(1)[0]))
        rng = np.random.default_rng([seed, part, drive])
        for number in range(per_drive):
            t_us = int(1e6 * APART_S * (number + rng.uniform(0.1, 0.9)))
            image_HWC = resized(scene.rgb(t_us * 1e-6), SIDE, SIDE).transpose(1, 2, 0)
            event_HWC = event_picture(scene, seed, drive, t_us) if with_events else None
            facts = frame_facts(scene, t_us * 1e-6)
            yield Picture(f"drive_{part}_{drive:04d}", t_us, image_HWC, facts, event_HWC)


def event_picture(scene: Scene, seed: int, drive: int, t_us: int) -> NDArray[np.uint8]:
    """Return the image of the events before a moment, `SIDE` x `SIDE`, simulated as `prepare scenes` does."""
    source = ScenesSource(1, 1, seed, duration_us=EVENT_SPAN_US, step_us=1, event_span_us=EVENT_SPAN_US)
    events = source.events(scene, drive, window=t_us - EVENT_SPAN_US)  # a window starts at each microsecond
    return resized(event_image(events), SIDE, SIDE).transpose(1, 2, 0)


def features_of(encoder: VisionModel, some: Sequence[Picture]) -> Tensor:
    """Return the features of pictures, (N, E), rounded as they are stored."""
    rows = [encoder.encode([[picture.image_HWC] for picture in some[at : at + 16]]) for at in range(0, len(some), 16)]
    return torch.cat(rows).flatten(1).to(torch.float16)


def write_rows(
    folder: Where,
    some: Sequence[Picture],
    features_NE: Tensor,
    tokenizer: Any,
    prompt: str,
    rows_each: int,
    seed: int,
) -> None:
    """Write a pair store: event = feature, target = tokens of a question and its answer (`pack_row`).

    `prompt`: text behind the picture, with {question}. `rows_each`: questions of each picture.
    """
    rng = np.random.default_rng([seed, 7])
    texts = []
    for number in range(len(some)):
        for asked in _questions(rng, rows_each):
            said = answer(some[number].facts, asked, seed + number)
            texts.append((number, _ids(tokenizer, prompt.format(question=asked)), _ids(tokenizer, said)))
    end = tokenizer.eos_token_id
    length = max(len(asked) + len(said) + 1 for _, asked, said in texts)
    write_store(
        folder,
        (
            {
                "event": features_NE[number].numpy(),
                "target": pack_row(asked, [*said, end], length),
                "sequence": some[number].sequence,
                "t_start_us": some[number].t_us + place,
                "t_end_us": some[number].t_us + 1_000_000 + place,
            }
            for place, (number, asked, said) in enumerate(texts)
        ),
        source={"name": "demo answers", "renderer": RENDERER, "seed": seed, "pictures": len(some)},
    )


def _questions(rng: np.random.Generator, number: int) -> list[str]:
    """Draw different questions, the first of all often among them."""
    first = [FRAME_QUESTIONS[0]] if rng.random() < min(KEY_SHARE * number, 1.0) else []
    others = rng.permutation(np.array(FRAME_QUESTIONS[1:]))[: number - len(first)]
    return [*first, *(str(question) for question in others)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
