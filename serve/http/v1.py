"""Routes of `/v1`, for people and scripts: numbers, pictures and recordings in; verdicts, numbers, pictures out.

Shapes: B = pairs, E = event width, D = target width.
"""

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from ray_app.store.manifest import FeatureSpec

from ..decoding.job import DecodeJob
from ..model.predict import InferenceRequest, InferenceResult, gathered
from ..protocol.errors import ApiError
from ..protocol.inputs import (
    Pictures,
    Rows,
    parse_request,
    png_of,
    png_of_image,
    require_pixels,
    row_of_file,
    rows_of,
)
from ..protocol.schemas import AlignRequest, Picture, Recording, VerifyRequest
from .request import body_of, context_of

if TYPE_CHECKING:
    from ..replica import ReplicaState

IMAGES = {"image/png", "image/jpeg", "image/webp"}
EVENTS = "application/octet-stream"


async def align(request: Request) -> Response:
    """Aligned features; with targets also cos_sim and the verdict."""
    return await answer_request(request, AlignRequest, ["aligned"])


async def verify(request: Request) -> Response:
    """cos_sim and the verdict for each pair."""
    return await answer_request(request, VerifyRequest, [])


async def answer_request(request: Request, kind: type[AlignRequest], default: list[str]) -> Response:
    """Read a request, compute, and encode the answer; `default` is returned where it names no `return`."""
    replica, ctx = context_of(request)
    with replica.batcher.reserve_slot():
        asked, event, target = await read_request(request, kind)
    wanted: list[str] = default if asked.wanted is None else list(asked.wanted)
    require_images(replica, wanted, event, target)
    work = InferenceRequest(event, target, aligned=bool({"aligned", "aligned_image"} & set(wanted)), before=True)
    read_at = time.perf_counter()
    answer = await replica.answer(work, ctx.timeout_s(replica.cfg.timeout_s))
    computed_at = time.perf_counter()
    ctx.version, ctx.digest = answer.model.version, answer.model.identity.digest
    ctx.pairs = work.rows
    body = {
        "id": asked.id or ctx.request_id,
        "model": {"name": replica.cfg.name, "version": ctx.version, "digest": ctx.digest},
        "theta": asked.theta,
        "pairs": await asyncio.to_thread(pairs_of, asked, wanted, work, answer),
    }
    response = await asyncio.to_thread(JSONResponse, body)
    ctx.spans |= {
        "read": read_at - ctx.started,
        "answer": computed_at - read_at,
        "write": time.perf_counter() - computed_at,
    }
    if isinstance(event, Pictures) or isinstance(target, Pictures):
        ctx.spans |= {"encode": answer.encoding_s, "adapter": answer.adapter_s}
    return response


async def read_request(request: Request, kind: type[AlignRequest]) -> tuple[AlignRequest, Rows, Rows | None]:
    """Return request, events and targets from JSON, or from the bare bytes of a picture or a recording."""
    replica, ctx = context_of(request)

    async def decode(job: DecodeJob, data: bytes | memoryview) -> NDArray[np.uint8]:
        began = time.perf_counter()
        images = await replica.decoders.decode(job, data, ctx.timeout_s(replica.cfg.timeout_s))
        ctx.spans["draw"] = ctx.spans.get("draw", 0.0) + time.perf_counter() - began
        return images

    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type in IMAGES | {EVENTS} and kind is AlignRequest:
        body = await body_of(request, replica.max_body_bytes)
        asked = from_query(request)
        value = Picture(png="") if content_type in IMAGES else Recording(recording="")
        return asked, await row_of_file(value, body, "event", replica.limits, decode), None
    if content_type != "application/json":
        takes = ["application/json", *([*sorted(IMAGES), EVENTS] if kind is AlignRequest else [])]
        raise ApiError(
            415,
            "content_type",
            f"Content-Type '{content_type[:60]}' is not supported here; send {' or '.join(takes)}.",
        )
    body = await body_of(request, replica.max_json_bytes)
    asked = await asyncio.to_thread(parse_request, body, kind)
    return (asked, *await rows_of(asked, replica.limits, decode))


def from_query(request: Request) -> AlignRequest:
    """Parse ?return=aligned,event_image&encoding=png&id=text. ApiError 422: unknown."""
    query = dict(request.query_params)
    if unknown := sorted(set(query) - {"return", "encoding", "id"}):
        raise ApiError(422, "unknown_field", f"?{unknown[0][:40]}= is unknown; known are return, encoding and id.")
    values: dict[str, Any] = {**query, "event": [[0.0]]}
    if "return" in query:
        values["return"] = [name for name in query["return"].split(",") if name]
    try:
        return AlignRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(422, "field", f"?{first['loc'][0]}=: {first['msg']}.") from error


def require_images(replica: "ReplicaState", wanted: list[str], event: Rows, target: Rows | None) -> None:
    """ApiError 422 if a picture is wanted of features that are not images, nor were sent as such."""
    features = replica.limits.features
    for name, spec, sent in (
        ("event_image", features.event, event),
        ("aligned_image", features.target, None),
        ("target_image", features.target, target),
    ):
        if name in wanted and not isinstance(sent, Pictures):
            require_pixels(spec, name.removesuffix("_image"))
    if "target_image" in wanted and target is None:
        raise ApiError(422, "missing", "target_image is wanted but 'target' is missing.")


def pairs_of(
    asked: AlignRequest, wanted: list[str], work: InferenceRequest, answer: InferenceResult
) -> list[dict[str, Any]]:
    """Members of `pairs` in the answer."""
    features = answer.model.features
    pairs: list[dict[str, Any]] = []
    for i in range(work.rows):
        pair: dict[str, Any] = {}
        if answer.cos_B is not None:
            pair["cos_sim"] = float(answer.cos_B[i])
            pair["accepted"] = bool(answer.cos_B[i] > asked.theta)
        if answer.before_B is not None:
            pair["before"] = float(answer.before_B[i])
        if "aligned" in wanted and answer.aligned_BD is not None:
            pair["aligned"] = encoded(answer.aligned_BD[i], asked.encoding, answer)
        if "event_image" in wanted:
            pair["event_image"] = picture_of(work.event, i, features.event)
        if "aligned_image" in wanted and answer.aligned_BD is not None:
            pair["aligned_image"] = png_of(answer.aligned_BD[i], features.target)
        if "target_image" in wanted and work.target is not None:
            pair["target_image"] = picture_of(work.target, i, features.target)
        pairs.append(pair)
    return pairs


def picture_of(rows: Rows, i: int, spec: FeatureSpec) -> str:
    """Return what was sent of a pair as a picture: its pixels, or the middle one of what the encoder saw."""
    if isinstance(rows, Pictures):
        images_IChw = rows.images_BIChw[i]
        return png_of_image(images_IChw[len(images_IChw) // 2])
    return png_of(gathered([rows[i : i + 1]], spec)[0], spec)


def encoded(row_D: Tensor, encoding: str, answer: InferenceResult) -> Any:
    """Encode an aligned row as numbers, raw numbers or a picture."""
    if encoding == "png":
        require_pixels(answer.model.features.target, "target")
        return png_of(row_D, answer.model.features.target)
    if encoding == "base64":
        data = base64.b64encode(row_D.to(torch.float32).numpy().tobytes()).decode()
        return {"data": data, "datatype": "FP32", "shape": [len(row_D)]}
    return row_D.tolist()


async def model(request: Request) -> Response:
    """Model in service, its evaluation, since when; what was refused; limits."""
    return JSONResponse(context_of(request)[0].about())
