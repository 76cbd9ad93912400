"""The forward pass for several requests at once; what is wrong with one of them costs that one alone.

Shapes: B = pairs of a request, N = pairs of all requests, E = event width, D = target width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_app.core.evaluation import pair_cosine
from ray_app.store.manifest import FeatureSpec

from ..protocol.errors import ApiError
from .loaded_model import ServedModel

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What a request asks of the model."""

    event_BE: Tensor
    """As it was sent."""
    target_BD: Tensor | None = None
    """As it was sent."""
    aligned: bool = True
    """Whether the aligned features are wanted."""
    before: bool = False
    """Whether the cosine of the raw event with the target is wanted."""

    @property
    def rows(self) -> int:
        """B."""
        return self.event_BE.shape[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, float32 on the CPU."""

    model: ServedModel
    """Who answered."""
    aligned_BD: Tensor | None
    """Where it was wanted."""
    cos_B: Tensor | None
    """Cosine with the target, where there is one; of sequences the mean over the target's tokens."""
    before_B: Tensor | None
    """The same of the raw event, where it was wanted and both are equally wide."""


@torch.inference_mode()
def predict(model: ServedModel, works: Sequence[InferenceRequest]) -> list[Answer | ApiError]:
    """An answer for each request, or why it has none: numbers that are not finite, a zero vector (Problem 422)."""
    features = model.features
    event_NE = gathered([work.event_BE for work in works], features.event, model.device)
    aligned_ND = model.forward(event_NE)
    event_norm_N, norm_N = (torch.linalg.vector_norm(side, dim=1).cpu() for side in (event_NE, aligned_ND))
    answers: list[Answer | ApiError] = []
    start = 0
    for work in works:
        mine = slice(start, start + work.rows)
        start += work.rows
        answers.append(
            input_error(event_norm_N[mine], "event")
            or output_error(norm_N[mine], model)
            or _answer(model, work, event_NE[mine], aligned_ND[mine])
        )
    return answers


def _answer(model: ServedModel, work: InferenceRequest, event_BE: Tensor, aligned_BD: Tensor) -> Answer | ApiError:
    cos_B = before_B = None
    if work.target_BD is not None:
        target_BD = gathered([work.target_BD], model.features.target, model.device)
        if problem := input_error(torch.linalg.vector_norm(target_BD, dim=1), "target"):
            return problem
        width = model.features.target.token_width
        cos_B = pair_cosine(aligned_BD, target_BD, width).cpu()
        if work.before and event_BE.shape == target_BD.shape:
            before_B = pair_cosine(event_BE, target_BD, width).cpu()
    return Answer(model, aligned_BD.cpu() if work.aligned else None, cos_B, before_B)


def gathered(parts: Sequence[Tensor], spec: FeatureSpec, device: torch.device = CPU) -> Tensor:
    """All rows as float32 values on `device`, (N, width). On a CPU one copy, or none of a single float32 part.

    To a GPU rows of one type go together and as they were sent: pixels are a quarter of the bytes.
    """
    if device.type != "cpu" and len({part.dtype for part in parts}) == 1:
        parts = [torch.cat(list(parts)).to(device)]
    if len(parts) == 1 and parts[0].dtype == torch.float32:
        return parts[0].to(device)
    rows_NW = torch.empty(sum(len(part) for part in parts), spec.width, device=device)
    start = 0
    for part in parts:
        mine = rows_NW[start : start + len(part)]
        mine.copy_(part)
        if part.dtype == torch.uint8:
            mine.mul_(spec.scale)
        start += len(part)
    return rows_NW


def input_error(norm_B: Tensor, name: str) -> ApiError | None:
    """422 where a row is not finite, or is all zeros: its cosine has no meaning."""
    if bool((torch.isfinite(norm_B) & (norm_B > 0)).all()):
        return None
    endless = torch.nonzero(~torch.isfinite(norm_B)).flatten().tolist()
    if endless:
        return ApiError(
            422,
            "not_finite",
            f"'{name}' row {_list(endless)} holds NaN, Inf or numbers beyond float32; mend or leave it out.",
        )
    zero = torch.nonzero(norm_B == 0).flatten().tolist()
    return ApiError(
        422,
        "zero_norm",
        f"'{name}' row {_list(zero)} is all zeros, and a zero vector has no direction to compare; leave it out.",
    )


def output_error(norm_B: Tensor, model: ServedModel) -> ApiError | None:
    """500 where the model's own answer is not finite or zero."""
    if bool((torch.isfinite(norm_B) & (norm_B > 0)).all()):
        return None
    return ApiError(
        500,
        "output_not_finite",
        f"version {model.version} answers these events with numbers that are not finite or all zero.",
    )


def _list(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")
