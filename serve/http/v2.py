"""Routes of the Open Inference Protocol v2: health, metadata and `infer`, whose bodies may be raw tensors."""

import asyncio
import time
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ray_app.datatypes import V2_DATATYPES

from ..model.predict import InferenceRequest
from ..protocol.errors import ApiError
from ..protocol.open_inference import OUTPUTS, parse_infer, render_infer
from .request import RequestContext, body_of, context_of

if TYPE_CHECKING:
    from ..replica import ReplicaState

EXTENSIONS = ["binary_tensor_data"]
HEADER_LENGTH = b"inference-header-content-length"
LONG_JSON = 2**16
"""Bytes of JSON from which on a thread reads it: half of that time others are answered."""


class TensorResponse(Response):
    """JSON header and raw tensors, sent one after the other without joining them."""

    def __init__(self, header: bytes, tensors: list[bytes]) -> None:
        super().__init__(header, media_type="application/octet-stream" if tensors else "application/json")
        self._tensors = tensors
        if tensors:
            self.headers["inference-header-content-length"] = str(len(header))
            self.headers["content-length"] = str(len(header) + sum(map(len, tensors)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        parts = [self.body, *self._tensors]
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})


async def infer(request: Request) -> Response:
    """Aligned features; with a target also cos_sim and the verdict at theta. Only requested outputs are sent."""
    replica, ctx = context_of(request)
    require_model(replica, ctx)
    header_length = ctx.headers.get(HEADER_LENGTH)
    raw_at = int(header_length) if header_length and header_length.isdigit() and len(header_length) < 9 else 0
    limit = replica.max_body_bytes if header_length else replica.max_json_bytes
    with replica.batcher.reserve_slot():
        body = await body_of(request, limit, raw_at)
    read_at = time.perf_counter()
    parse = partial(parse_infer, body, header_length, replica.limits)
    in_thread = not header_length and len(body) > LONG_JSON  # binary tensors are views of the body
    asked = await asyncio.to_thread(parse) if in_thread else parse()
    work = InferenceRequest(asked.event_BE, asked.target_BD, aligned="aligned" in asked.outputs)
    answer = await replica.answer(work, ctx.timeout_s(replica.cfg.timeout_s, asked.timeout_us))
    computed_at = time.perf_counter()
    ctx.version, ctx.digest = answer.model.version, answer.model.identity.digest
    ctx.pairs = work.rows
    values: dict[str, Any] = {"aligned": answer.aligned_BD}
    if answer.cos_B is not None:
        values |= {"cos_sim": answer.cos_B, "accepted": answer.cos_B > asked.theta}
    response = TensorResponse(*render_infer(asked, replica.cfg.name, ctx.version, values))
    ctx.spans |= {
        "read": read_at - ctx.started,
        "answer": computed_at - read_at,
        "write": time.perf_counter() - computed_at,
    }
    return response


def require_model(replica: "ReplicaState", ctx: RequestContext) -> None:
    """ApiError 404: another name, or a version that is not the one in service."""
    if ctx.model != replica.cfg.name:
        raise ApiError(404, "not_found", f"there is no model of this name; the model is '{replica.cfg.name}'.")
    if ctx.model_version not in (None, replica.model.version):
        raise ApiError(404, "not_found", f"this version is not in service; version {replica.model.version} is.")


async def server_metadata(_: Request) -> Response:
    """Name, version and extensions of this server."""
    return JSONResponse({"name": "ray-app", "version": version("ray-app"), "extensions": EXTENSIONS})


async def live(_: Request) -> Response:
    """Answer while the process runs."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """A model is in service, forward passes return, and decoders end. MLflow is not checked."""
    replica, _ = context_of(request)
    if replica.closing:
        raise ApiError(503, "draining", "this replica is shutting down; ask again, another one answers.")
    if not replica.batcher.healthy():
        raise ApiError(503, "not_ready", "the forward pass does not return; this replica will be replaced.")
    if not replica.decoders.healthy():
        raise ApiError(503, "not_ready", "pictures and recordings are not decoded; this replica will be replaced.")
    return JSONResponse({"ready": True})


async def model_ready(request: Request) -> Response:
    """Answer like `ready`, for one model and version."""
    require_model(*context_of(request))
    return await ready(request)


async def model_metadata(request: Request) -> Response:
    """Inputs, outputs and limits."""
    replica, ctx = context_of(request)
    require_model(replica, ctx)
    features, model = replica.model.features, replica.model
    inputs = [
        {"name": side, "datatype": V2_DATATYPES[spec.dtype], "shape": [-1, spec.width]}
        for side, spec in (("event", features.event), ("target", features.target))
    ]
    widths = {"aligned": [-1, features.target.width]}
    outputs = [
        {"name": name, "datatype": datatype, "shape": widths.get(name, [-1])} for name, datatype in OUTPUTS.items()
    ]
    return JSONResponse(
        {
            "name": replica.cfg.name,
            "versions": [model.version],
            "platform": "ray_app",
            "inputs": inputs,
            "outputs": outputs,
            "parameters": {
                "digest": model.identity.digest,
                "max_batch": replica.cfg.max_batch,
                "max_body_bytes": replica.max_body_bytes,
                "datatypes": "UINT8 (pixels), FP16, BF16, FP32 (values)",
            },
        }
    )
