"""Rows that drafters learn from: a target's own greedy answer to one question, with its distribution at each token.

A target feature of the pair store is one row of float16, in this order:

    the picture's image tokens as the target reads them (X)
    the answer's token ids, in two numbers each, since float16 holds whole numbers up to 2,048 only (2 L)
    the target's probabilities of the ids of the reduced vocabulary at each token (L · I)
    if the layout has `states`, the input of the target's head at each token (L · D)

What is the same for all rows is in the manifest's source, as `drafting`.

Shapes: B = rows, L = longest answer, I = ids of the reduced vocabulary, N = image tokens, D = their width, X = N · D,
V = tokens of the target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from ray_app.config.base import Config, Positive
from ray_app.errors import ConfigError, InputError

HALF = 1024
"""A token id is written as id // HALF + 1 and id % HALF; the first of the two is 0 behind an answer's end."""
MAX_IDS = 4000
"""Most ids of a reduced vocabulary: a row holds a probability for each at each token."""
KEY = "drafting"
"""Key of the layout in a manifest's source."""

Ids = tuple[Annotated[int, Field(ge=0)], ...]


class DraftLayout(Config):
    """Facts about all rows of a store."""

    target: str
    """Digest of the target that gave the answers."""
    question: str
    """Question that was asked."""
    before: Ids
    """Ids of the prompt before the picture."""
    after: Ids
    """Ids of the prompt behind it."""
    vocabulary: Annotated[Ids, Field(min_length=1, max_length=MAX_IDS)]
    """Ids of the reduced vocabulary, in order."""
    vocabulary_size: Positive
    """Tokens of the target."""
    end_token: int
    """Token that ends an answer."""
    image_tokens: Positive
    """Image tokens of a picture, N."""
    width: Positive
    """Width of an image token, D."""
    length: Positive
    """Tokens of the longest answer, its end included, L."""
    mass_outside: float
    """Mean probability that the target gives to ids outside the reduced vocabulary."""
    tokens_outside: float
    """Share of the answers' tokens that are outside the reduced vocabulary."""
    states: bool = False
    """Rows hold the target's states too."""

    @property
    def row_width(self) -> int:
        """Numbers of a row."""
        return self.image_tokens * self.width + self.length * (2 + len(self.vocabulary) + self.states * self.width)

    def places(self) -> Tensor:
        """Return the place of each of the target's tokens in the reduced vocabulary, −1 outside it, (V,)."""
        place_V = torch.full((self.vocabulary_size,), -1)
        place_V[list(self.vocabulary)] = torch.arange(len(self.vocabulary))
        return place_V


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Some rows, apart."""

    image_BX: Tensor
    """Image tokens of the picture."""
    ids_BL: Tensor
    """Token ids; 0 behind an answer's end."""
    used_BL: Tensor
    """Positions that an answer has, bool."""
    p_BLI: Tensor
    """Probabilities of the reduced vocabulary, renormalised; 0 behind an answer's end."""
    states_BLD: Tensor
    """Input of the target's head at each token; 0 behind an answer's end. Without states D is 0."""


def layout_of(source: Mapping[str, Any], store: object) -> DraftLayout:
    """Return the layout of a store's rows. ConfigError: they hold no distributions of a target."""
    try:
        return DraftLayout.model_validate(source[KEY])
    except (KeyError, ValidationError) as error:
        raise ConfigError(
            f"{store} holds no answers of a target with their distributions, which drafters are trained on; "
            "`ray-app demo draft` writes such a store."
        ) from error


def require_states(layout: DraftLayout, store: object) -> None:
    """ConfigError unless rows hold the target's states."""
    if not layout.states:
        raise ConfigError(
            f"{store} holds no states of the target, which an eagle_head reads; take the store of that name with "
            "_states at its end, which `ray-app demo draft --kind eagle_head` leaves in OUT.build."
        )


def pack(
    layout: DraftLayout,
    image_X: NDArray[np.floating],
    ids: Sequence[int],
    p_LI: NDArray[np.floating],
    states_LD: NDArray[np.floating] | None = None,
) -> NDArray[np.float16]:
    """Return one row. InputError: an answer longer than rows are."""
    if len(ids) > layout.length:
        raise InputError(f"an answer has {len(ids)} tokens, and rows hold {layout.length}.")
    halves_2L, wide_LI = np.zeros((2, layout.length)), np.zeros((layout.length, len(layout.vocabulary)))
    halves_2L[0, : len(ids)] = np.array(ids) // HALF + 1
    halves_2L[1, : len(ids)] = np.array(ids) % HALF
    wide_LI[: len(ids)] = p_LI
    parts = [image_X.ravel(), halves_2L.ravel(), wide_LI.ravel()]
    if layout.states:
        assert states_LD is not None
        padded_LD = np.zeros((layout.length, layout.width))
        padded_LD[: len(ids)] = states_LD
        parts.append(padded_LD.ravel())
    return np.concatenate(parts).astype(np.float16)


def unpack(layout: DraftLayout, rows_BT: Tensor) -> DraftRows:
    """Return the parts of some rows, up to the longest of their answers."""
    length, num_ids = layout.length, len(layout.vocabulary)
    depth = layout.width if layout.states else 0
    image_BX, high_BL, low_BL, p_BX, states_BX = rows_BT.split(
        [layout.image_tokens * layout.width, length, length, length * num_ids, length * depth], dim=1
    )
    used_BL = high_BL > 0
    longest = int(used_BL.sum(dim=1).max()) if len(rows_BT) else 0
    used_BL = used_BL[:, :longest]
    ids_BL = (high_BL.long() - 1) * HALF + low_BL.long()
    p_BLI = p_BX.unflatten(1, (length, num_ids))[:, :longest]
    return DraftRows(
        image_BX,
        ids_BL[:, :longest].where(used_BL, torch.zeros_like(ids_BL[:, :longest])),
        used_BL,
        p_BLI / p_BLI.sum(dim=2, keepdim=True).clamp(min=1e-6),
        states_BX.unflatten(1, (length, depth))[:, :longest],
    )
