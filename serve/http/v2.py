"""Open Inference Protocol v2: health, metadata, and `infer`, which takes the short way past FastAPI."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from ..model.predict import InferenceRequest
from ..protocol.errors import ApiError
from ..protocol.open_inference import OUTPUTS, parse_infer, render_infer
from ..protocol.request_context import RequestContext
from ..replica_state import ReplicaState
from .body import read_body

EXTENSIONS = ["binary_tensor_data"]
HEADER_LENGTH = b"inference-header-content-length"
OCTETS = [(b"content-type", b"application/octet-stream")]


async def infer(
    endpoint: ReplicaState, call: RequestContext, receive: Receive
) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """(headers, body in parts). Problem: what is wrong."""
    require_model(endpoint, call)
    header_length = call.headers.get(HEADER_LENGTH)
    raw_at = int(header_length) if header_length and header_length.isdigit() and len(header_length) < 9 else 0
    limit = endpoint.max_body_bytes if header_length else endpoint.max_json_bytes
    async with endpoint.place(receive):
        body = await read_body(call.headers, receive, limit, raw_at)
    endpoint.telemetry.body(len(body))
    read = time.perf_counter()
    asked = parse_infer(body, header_length, endpoint.limits)
    work = InferenceRequest(asked.event_BE, asked.target_BD, aligned="aligned" in asked.outputs)
    answer = await endpoint.answer(work, call.timeout_s(endpoint.cfg.timeout_s, asked.timeout_us), receive)
    computed = time.perf_counter()
    call.version, call.digest = answer.model.version, answer.model.identity.digest
    call.pairs = work.rows
    values: dict[str, Any] = {"aligned": answer.aligned_BD}
    if answer.cos_B is not None:
        values |= {"cos_sim": answer.cos_B, "accepted": answer.cos_B > asked.theta}
    header, raw = render_infer(asked, endpoint.cfg.name, call.version, values)
    call.spans |= {"read": read - call.began, "answer": computed - read, "write": time.perf_counter() - computed}
    if not raw:
        return [(b"content-type", b"application/json")], [header]
    return [*OCTETS, (HEADER_LENGTH, str(len(header)).encode())], [header, *raw]


def require_model(endpoint: ReplicaState, call: RequestContext) -> None:
    """Problem 404: another name, or a version that is not the one in service."""
    if call.model != endpoint.cfg.name:
        raise ApiError(404, "not_found", f"there is no model of this name; there is '{endpoint.cfg.name}'.")
    if call.model_version not in (None, endpoint.model.version):
        raise ApiError(404, "not_found", f"this version is not in service; version {endpoint.model.version} is.")


async def server_metadata(_: Request) -> Response:
    """What this server is."""
    from importlib.metadata import version

    return JSONResponse({"name": "ray-app", "version": version("ray-app"), "extensions": EXTENSIONS})


async def live(_: Request) -> Response:
    """This process answers."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """A model is in service, and the worker answers. Not whether MLflow does."""
    endpoint: ReplicaState = request.scope["ray_app.endpoint"]
    if endpoint.closing:
        raise ApiError(503, "draining", "this replica is ending; ask again, another one answers.")
    if not endpoint.batcher.healthy():
        raise ApiError(503, "not_ready", "the forward pass does not come back; this replica will be replaced.")
    return JSONResponse({"ready": True})


async def model_ready(request: Request) -> Response:
    """This model, and version, is in service."""
    require_model(request.scope["ray_app.endpoint"], request.scope["ray_app.call"])
    return await ready(request)


async def model_metadata(request: Request) -> Response:
    """Inputs, outputs and limits."""
    endpoint: ReplicaState = request.scope["ray_app.endpoint"]
    require_model(endpoint, request.scope["ray_app.call"])
    features, model = endpoint.model.features, endpoint.model
    inputs = {
        side: {
            "name": side,
            "datatype": {"uint8": "UINT8", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}[spec.dtype],
            "shape": [-1, spec.width],
        }
        for side, spec in (("event", features.event), ("target", features.target))
    }
    widths = {"aligned": [-1, features.target.width]}
    return JSONResponse(
        {
            "name": endpoint.cfg.name,
            "versions": [model.version],
            "platform": "ray_app",
            "inputs": list(inputs.values()),
            "outputs": [
                {"name": name, "datatype": datatype, "shape": widths.get(name, [-1])}
                for name, datatype in OUTPUTS.items()
            ],
            "parameters": {
                "digest": model.identity.digest,
                "max_batch": endpoint.cfg.max_batch,
                "max_body_bytes": endpoint.max_body_bytes,
                "datatypes": "UINT8 (pixels), FP16, BF16, FP32 (values)",
            },
        }
    )
