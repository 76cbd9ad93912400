"""One forward pass for several requests; an error in one of them does not affect the others.

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
RANGE_SLACK = 0.5
"""Part of the range by which values may be beyond it, as those of a bicubic resize are; others have another scale."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Input of the model and what to compute."""

    event_BE: Tensor
    """Event features, in the type in which they were sent."""
    target_BD: Tensor | None = None
    """Target features, likewise."""
    aligned: bool = True
    """True to return the aligned features."""
    before: bool = False
    """True to return the cosine of the raw event feature with the target."""

    @property
    def rows(self) -> int:
        """B."""
        return self.event_BE.shape[0]


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """Output of the model, float32 on the CPU."""

    model: ServedModel
    """Model that answered."""
    aligned_BD: Tensor | None
    """Aligned features, if requested."""
    cos_B: Tensor | None
    """Cosine with the target, if there is one; for sequences the mean over the target's tokens."""
    before_B: Tensor | None
    """Cosine of the raw event feature with the target, if requested and both have the same width."""


@torch.inference_mode()
def predict(model: ServedModel, works: Sequence[InferenceRequest]) -> list[InferenceResult | ApiError]:
    """Return an answer for each request, or an ApiError 422: not finite, not in the range of pixels, all zeros."""
    features = model.features
    event_NE = gathered([work.event_BE for work in works], features.event, model.device)
    aligned_ND = model.forward(event_NE)
    event_norm_N, norm_N = (torch.linalg.vector_norm(side, dim=1).cpu() for side in (event_NE, aligned_ND))
    answers: list[InferenceResult | ApiError] = []
    start = 0
    for work in works:
        own = slice(start, start + work.rows)
        start += work.rows
        answers.append(
            input_error(event_norm_N[own], "event")
            or range_error(work.event_BE, features.event, "event")
            or output_error(norm_N[own], model)
            or _answer(model, work, event_NE[own], aligned_ND[own])
        )
    return answers


def _answer(
    model: ServedModel, work: InferenceRequest, event_BE: Tensor, aligned_BD: Tensor
) -> InferenceResult | ApiError:
    cos_B = before_B = None
    if work.target_BD is not None:
        target_BD = gathered([work.target_BD], model.features.target, model.device)
        if problem := input_error(torch.linalg.vector_norm(target_BD, dim=1), "target"):
            return problem
        if problem := range_error(work.target_BD, model.features.target, "target"):
            return problem
        width = model.features.target.token_width
        cos_B = pair_cosine(aligned_BD, target_BD, width).cpu()
        if work.before and event_BE.shape == target_BD.shape:
            before_B = pair_cosine(event_BE, target_BD, width).cpu()
    return InferenceResult(model, aligned_BD.cpu() if work.aligned else None, cos_B, before_B)


def gathered(parts: Sequence[Tensor], spec: FeatureSpec, device: torch.device = CPU) -> Tensor:
    """Concatenate rows as float32 values on `device`, (N, width). A single float32 part is not copied on a CPU.

    Rows of one type are copied to a GPU together and in that type: pixels are a quarter of the bytes.
    """
    if device.type != "cpu" and len({part.dtype for part in parts}) == 1:
        parts = [torch.cat(list(parts)).to(device)]
    if len(parts) == 1 and parts[0].dtype == torch.float32:
        return parts[0].to(device)
    rows_NW = torch.empty(sum(len(part) for part in parts), spec.width, device=device)
    start = 0
    for part in parts:
        own = rows_NW[start : start + len(part)]
        own.copy_(part)
        if part.dtype == torch.uint8:
            own.mul_(spec.scale)
        start += len(part)
    return rows_NW


def input_error(norm_B: Tensor, name: str) -> ApiError | None:
    """Error 422 if a row is not finite, or is all zeros: its cosine has no meaning."""
    if bool((torch.isfinite(norm_B) & (norm_B > 0)).all()):
        return None
    infinite = torch.nonzero(~torch.isfinite(norm_B)).flatten().tolist()
    if infinite:
        return ApiError(
            422,
            "not_finite",
            f"'{name}' row {_list(infinite)} contains NaN, Inf or numbers beyond float32; correct or omit it.",
        )
    zero = torch.nonzero(norm_B == 0).flatten().tolist()
    return ApiError(
        422,
        "zero_norm",
        f"'{name}' row {_list(zero)} is all zeros; a zero vector has no direction to compare, so leave it out.",
    )


def range_error(values_BW: Tensor, spec: FeatureSpec, name: str) -> ApiError | None:
    """Error 422 if values of pixels, sent as floats, are beyond those that the model was trained on."""
    if spec.value_range is None or values_BW.dtype == torch.uint8:
        return None
    low, high = spec.value_range
    least, largest = (float(bound) for bound in torch.aminmax(values_BW))
    slack = RANGE_SLACK * (high - low)
    if low - slack <= least and largest <= high + slack:
        return None
    return ApiError(
        422,
        "range",
        f"'{name}' has values from {least:g} to {largest:g}, pixels of this model are values from {low:g} to "
        f"{high:g}: divide by {1 / spec.scale:g}, or send UINT8.",
    )


def output_error(norm_B: Tensor, model: ServedModel) -> ApiError | None:
    """Error 500 if the model's own output is not finite, or all zeros."""
    if bool((torch.isfinite(norm_B) & (norm_B > 0)).all()):
        return None
    return ApiError(
        500,
        "output_not_finite",
        f"version {model.version} maps these events to numbers that are not finite, or to zeros.",
    )


def _list(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")
