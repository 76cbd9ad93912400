"""Features that are sequences of tokens: masked means over positions, so that padding counts for nothing.

A sequence feature of shape (T, W) is at most T tokens of width W; behind its end it is zero. A position is padding
exactly where it is all zeros, so the mask travels with the feature and needs no column of its own.

Shapes: B = pairs, T = positions, W = token width, D = T · W.
"""

import torch
from torch import Tensor

MIN_NORM = 1e-8
"""Smallest norm that is divided by."""


def mask_of(x_BD: Tensor, width: int) -> Tensor:
    """Mark the positions that hold a token, (B, T), bool."""
    return (x_BD.unflatten(1, (-1, width)) != 0).any(dim=2)


def masked(x_BD: Tensor, like_BD: Tensor, width: int) -> Tensor:
    """Set `x` to zero where `like` holds no token."""
    return (x_BD.unflatten(1, (-1, width)) * mask_of(like_BD, width)[..., None]).flatten(1)


def mean_over_tokens(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the positions of the mask, (B,); 0 where there is none."""
    return (values_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)


def token_cosines(a_BD: Tensor, b_BD: Tensor, width: int) -> Tensor:
    """Cosine at each position, (B, T), safe to differentiate at zero vectors."""
    a_BTW, b_BTW = (x.unflatten(1, (-1, width)) for x in (a_BD, b_BD))
    return torch.nn.functional.cosine_similarity(a_BTW, b_BTW, dim=2, eps=MIN_NORM)


def sequence_cosine(a_BD: Tensor, b_BD: Tensor, width: int) -> Tensor:
    """Mean cosine of each pair over the positions where `b`, the target, has a token, (B,)."""
    return mean_over_tokens(token_cosines(a_BD, b_BD, width), mask_of(b_BD, width))


def sequence_cosines(a_BD: Tensor, b_BD: Tensor, width: int) -> Tensor:
    """Return `sequence_cosine` of each `a` (row) with each `b` (column); there may be more of either."""
    unit = torch.nn.functional.normalize
    a_BD, b_BD = (unit(x.unflatten(1, (-1, width)), dim=2, eps=MIN_NORM).flatten(1) for x in (a_BD, b_BD))
    return a_BD @ b_BD.T / mask_of(b_BD, width).sum(dim=1).clamp(min=1)


def sequence_mse(a_BD: Tensor, b_BD: Tensor, width: int) -> Tensor:
    """Mean squared difference of each pair over the numbers of the target's tokens, (B,)."""
    square_BT = (a_BD - b_BD).square().unflatten(1, (-1, width)).mean(dim=2)
    return mean_over_tokens(square_BT, mask_of(b_BD, width))


def next_position_cosine(a_BD: Tensor, b_BD: Tensor, width: int) -> Tensor:
    """Mean cosine of each aligned token with the target's token after it, (B,)."""
    a_BD, b_BD = a_BD[:, :-width], b_BD[:, width:]
    return sequence_cosine(a_BD, b_BD, width) if b_BD.shape[1] else a_BD.new_zeros(len(a_BD))
