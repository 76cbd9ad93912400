"""One pass for several requests, encoders first; an error in one of them does not affect the others.

Shapes: B = pairs of a request, N = pairs of all requests, E = event width, D = target width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_app.core.evaluation import pair_cosine
from ray_app.store.manifest import FeatureSpec

from ..protocol.errors import ApiError
from ..protocol.inputs import Rows
from .encoders import NO_ENCODERS, Encoders, encoded
from .loaded_model import ServedModel

CPU = torch.device("cpu")
RANGE_SLACK = 0.5
"""Part of the range by which values may be beyond it, as those of a bicubic resize are; others have another scale."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Input of the model and what to compute."""

    event: Rows
    """Event features (B, E) in the type in which they were sent, or pictures."""
    target: Rows | None = None
    """Target features (B, D), likewise."""
    aligned: bool = True
    """True to return the aligned features."""
    before: bool = False
    """True to return the cosine of the raw event feature with the target."""

    @property
    def rows(self) -> int:
        """B."""
        return len(self.event)


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
    encoding_s: float
    """Seconds in which the pictures of all requests of the pass were encoded."""
    adapter_s: float
    """Seconds of the adapter's forward pass."""


@torch.inference_mode()
def predict(
    model: ServedModel, works: Sequence[InferenceRequest], encoders: Encoders = NO_ENCODERS
) -> list[InferenceResult | ApiError]:
    """Return an answer for each request, or an ApiError 422: not finite, not in the range of pixels, all zeros."""
    features, began = model.features, time.perf_counter()
    events = encoded([work.event for work in works], features.event, encoders.get("event"))
    sent_targets = [work.target for work in works if work.target is not None]
    targets = iter(encoded(sent_targets, features.target, encoders.get("target")))
    encoded_at = time.perf_counter()
    event_NE = gathered(events, features.event, model.device)
    aligned_ND = model.forward(event_NE)
    event_norm_N, norm_N = (torch.linalg.vector_norm(side, dim=1).cpu() for side in (event_NE, aligned_ND))
    seconds = encoded_at - began, time.perf_counter() - encoded_at
    answers: list[InferenceResult | ApiError] = []
    start = 0
    for work, sent_BE in zip(works, events, strict=True):
        own = slice(start, start + work.rows)
        start += work.rows
        sent_BD = None if work.target is None else next(targets)
        answers.append(
            input_error(event_norm_N[own], "event")
            or range_error(sent_BE, features.event, "event")
            or output_error(norm_N[own], model)
            or _answer(model, work, event_NE[own], aligned_ND[own], sent_BD, seconds)
        )
    return answers


def _answer(
    model: ServedModel,
    work: InferenceRequest,
    event_BE: Tensor,
    aligned_BD: Tensor,
    sent_BD: Tensor | None,
    seconds: tuple[float, float],
) -> InferenceResult | ApiError:
    cos_B = before_B = None
    if sent_BD is not None:
        target_BD = gathered([sent_BD], model.features.target, model.device)
        if problem := input_error(torch.linalg.vector_norm(target_BD, dim=1), "target"):
            return problem
        if problem := range_error(sent_BD, model.features.target, "target"):
            return problem
        width = model.features.target.token_width
        cos_B = pair_cosine(aligned_BD, target_BD, width).cpu()
        if work.before and event_BE.shape == target_BD.shape:
            before_B = pair_cosine(event_BE, target_BD, width).cpu()
    return InferenceResult(model, aligned_BD.cpu() if work.aligned else None, cos_B, before_B, *seconds)


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
