"""Open Inference Protocol v2 with binary tensors: a JSON header, then raw little-endian tensors in its order.

Tensors are views of the body; nothing is copied. Shapes: B = pairs of a request, E = event width, D = target width.
"""

import json
import math
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_app.datatypes import V2_DATATYPES
from ray_app.store.manifest import Features, FeatureSpec

from .body import json_type_name, number_rows, parse_object, parse_theta, present
from .errors import ApiError

DTYPES: dict[str, torch.dtype] = {v2: getattr(torch, name) for name, v2 in V2_DATATYPES.items()}
"""torch's types by the protocol's names."""
OUTPUTS = {"aligned": "FP32", "cos_sim": "FP32", "accepted": "BOOL"}
"""Output tensors and their v2 datatypes."""
OF_TARGET = {"cos_sim", "accepted"}
"""Outputs that need a target."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a request."""

    features: Features
    """Widths and types of both sides."""
    max_batch: int
    """Largest number of pairs in a request."""
    max_json_bytes: int
    """Largest size of JSON, with tensors behind it or without."""
    encoders: Collection[str] = ()
    """Sides whose encoder is at hand."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A v2 request that has been checked."""

    event_BE: Tensor
    """Event features, in the type in which they were sent."""
    target_BD: Tensor | None
    """Target features, likewise."""
    theta: float
    """Threshold of `accepted`."""
    outputs: dict[str, bool]
    """Requested outputs in order; True for those to be sent as raw bytes."""
    id: str | None = None
    """Returned in the answer."""
    timeout_us: int | None = None
    """Time that the client allows, in µs."""


def parse_infer(body: memoryview, header_length: bytes | None, limits: Limits) -> InferRequest:
    """Parse a request's body. ApiError 4xx says what is wrong and what to send instead."""
    split = len(body) if header_length is None else _header_length(header_length, len(body))
    if split > limits.max_json_bytes:
        limit = limits.max_json_bytes
        raise ApiError(413, "too_large", f"the JSON header has {split:,} bytes, the limit is {limit:,}.")
    header, raw = present(parse_object(body[:split])), body[split:]
    _known(header, {"id", "parameters", "inputs", "outputs"}, "the request")
    if "id" in header and not isinstance(header["id"], str):
        raise ApiError(400, "bad_header", f"'id' is {json_type_name(header['id'])}; it must be text.")
    parameters = _parameters(header, {"theta", "binary_data_output", "timeout", "priority"}, "the request")
    tensors, end = {}, 0
    for item in _items(header, "inputs"):
        name, tensor, end = _input(item, raw, end, limits)
        if name in tensors:
            raise ApiError(400, "duplicate", f"input '{name}' is given twice.")
        tensors[name] = tensor
    if end != len(raw):
        raise ApiError(
            400,
            "size_mismatch",
            f"{len(raw):,} bytes follow the header, its tensors take {end:,}; they must be equal.",
        )
    if "event" not in tensors:
        raise ApiError(400, "missing", "the input 'event' is missing; send it as [B, E], and 'target' for a verdict.")
    target = tensors.get("target")
    same_rows(tensors["event"], target)
    timeout = parameters.get("timeout")
    if timeout is not None and (type(timeout) is not int or timeout < 0):
        raise ApiError(400, "parameter", "'timeout' must be a whole number of microseconds.")
    return InferRequest(
        event_BE=tensors["event"],
        target_BD=target,
        theta=parse_theta(parameters.get("theta", 0.8)),
        outputs=_outputs(header, parameters, target is not None),
        id=header.get("id"),
        timeout_us=timeout or None,
    )


def render_infer(
    request: InferRequest, model: str, version: str, values: Mapping[str, Tensor]
) -> tuple[bytes, list[bytes]]:
    """Return the JSON header and the raw tensors in order."""
    outputs, raw = [], []
    for name, binary in request.outputs.items():
        tensor = values[name]
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": list(tensor.shape)}
        if binary:
            data = tensor.contiguous().numpy().tobytes()
            output["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        else:
            output["data"] = tensor.flatten().tolist()
        outputs.append(output)
    header: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": outputs}
    if request.id is not None:
        header["id"] = request.id
    return json.dumps(header, separators=(",", ":")).encode(), raw


def raw_rows(data: memoryview, datatype: Any, shape: Any, name: str, limits: Limits) -> Tensor:
    """View raw bytes as rows (B, width). ApiError 4xx: type, shape, width, number of pairs or size do not fit."""
    spec: FeatureSpec = getattr(limits.features, name)
    check_datatype(datatype, spec, name)
    rows = check_shape(shape, spec.width, name, limits.max_batch)
    dtype = DTYPES[datatype]
    needed = rows * spec.width * dtype.itemsize
    if len(data) != needed:
        raise ApiError(
            400,
            "size_mismatch",
            f"'{name}' of shape {shape} and type {datatype} takes {needed:,} bytes, not {len(data):,}.",
        )
    return torch.frombuffer(data, dtype=dtype, count=rows * spec.width).reshape(rows, spec.width)


def check_datatype(datatype: Any, spec: FeatureSpec, name: str) -> str:
    """Return the datatype. ApiError 422 unless it is one of `DTYPES` that this side accepts."""
    if not isinstance(datatype, str) or datatype not in DTYPES:
        shown = f"'{datatype[:40]}'" if isinstance(datatype, str) else json_type_name(datatype)
        raise ApiError(422, "dtype", f"datatype of '{name}' is {shown}; it must be one of {', '.join(DTYPES)}.")
    if datatype == "UINT8" and spec.dtype != "uint8":
        raise ApiError(422, "dtype", f"'{name}' features of this model are {spec.dtype}, not pixels; send FP32.")
    return datatype


def check_shape(shape: Any, width: int, name: str, max_batch: int) -> int:
    """Return the number of rows. ApiError 422 unless the shape is [B, width] with 1 ≤ B ≤ max_batch."""
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int for n in shape):
        raise ApiError(422, "shape", f"the shape of '{name}' must be two whole numbers, [B, {width}].")
    rows, columns = shape
    if columns != width:
        raise ApiError(422, "width", f"'{name}' is {_short(columns)} wide, the model takes {width:,}.")
    if rows < 1:
        raise ApiError(422, "shape", f"'{name}' has {_short(rows)} rows; there must be at least 1.")
    if rows > max_batch:
        raise ApiError(
            422, "batch_limit", f"'{name}' has {_short(rows)} rows, the limit is {max_batch}; send several requests."
        )
    return rows


def same_rows(event_BE: Sized, target_BD: Sized | None) -> None:
    """ApiError 422 unless there are as many targets as events."""
    if target_BD is not None and len(target_BD) != len(event_BE):
        raise ApiError(
            422,
            "shape",
            f"'event' has {len(event_BE)} rows and 'target' {len(target_BD)}; each pair has one of each.",
        )


def _input(item: dict[str, Any], raw: memoryview, start: int, limits: Limits) -> tuple[str, Tensor, int]:
    """Return the input's name, its rows, and the offset of the next raw tensor."""
    item = present(item)
    _known(item, {"name", "shape", "datatype", "parameters", "data"}, "an input")
    name = item.get("name")
    if name not in ("event", "target"):
        shown = f"'{name[:40]}'" if isinstance(name, str) else json_type_name(name)
        raise ApiError(400, "unknown_field", f"there is no input {shown}; the inputs are 'event' and 'target'.")
    size = _parameters(item, {"binary_data_size"}, f"input '{name}'").get("binary_data_size")
    if size is None:
        spec: FeatureSpec = getattr(limits.features, name)
        return name, _json_rows(item, name, spec, limits), start
    if type(size) is not int or size < 0 or size > len(raw) - start:
        raise ApiError(
            400,
            "size_mismatch",
            f"binary_data_size of '{name}' is {_short(size)}; {len(raw) - start:,} bytes follow the header.",
        )
    if "data" in item:
        raise ApiError(400, "duplicate", f"'{name}' has both 'data' and binary_data_size; send one of them.")
    data = raw[start : start + size]
    return name, raw_rows(data, item.get("datatype"), item.get("shape"), name, limits), start + size


def _json_rows(item: dict[str, Any], name: str, spec: FeatureSpec, limits: Limits) -> Tensor:
    """Rows from numbers in the header itself, flat or nested."""
    data = item.get("data")
    datatype = check_datatype(item.get("datatype"), spec, name)
    rows = check_shape(item.get("shape"), spec.width, name, limits.max_batch)
    if not isinstance(data, list):
        raise ApiError(400, "missing", f"'{name}' has neither 'data' nor a binary_data_size.")
    flat = data and not isinstance(data[0], list)
    if len(data) != (rows * spec.width if flat else rows):
        raise ApiError(
            400,
            "size_mismatch",
            f"'data' of '{name}' has {len(data):,} entries; its shape takes {rows * spec.width:,}.",
        )
    nested = [data[i : i + spec.width] for i in range(0, len(data), spec.width)] if flat else data
    tensor = number_rows(nested, spec.width, name)
    if datatype == "UINT8":
        if bool(((tensor < 0) | (tensor > 255) | (tensor != tensor.round())).any()):
            raise ApiError(
                422, "dtype", f"'{name}' is UINT8 but contains a number that is not a whole number from 0 to 255."
            )
        return tensor.to(torch.uint8)
    return tensor.to(DTYPES[datatype])


def _outputs(header: dict[str, Any], parameters: dict[str, Any], has_target: bool) -> dict[str, bool]:
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise ApiError(400, "parameter", "'binary_data_output' must be true or false.")
    if header.get("outputs", []) == []:
        return {name: binary for name in OUTPUTS if has_target or name not in OF_TARGET}
    outputs: dict[str, bool] = {}
    for item in _items(header, "outputs"):
        item = present(item)
        _known(item, {"name", "parameters"}, "an output")
        name = item.get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            shown = f"'{name[:40]}'" if isinstance(name, str) else json_type_name(name)
            raise ApiError(400, "unknown_field", f"there is no output {shown}; the outputs are {', '.join(OUTPUTS)}.")
        if name in outputs:
            raise ApiError(400, "duplicate", f"output '{name}' is requested twice.")
        if name in OF_TARGET and not has_target:
            raise ApiError(400, "missing", f"output '{name}' needs the input 'target'.")
        outputs[name] = _parameters(item, {"binary_data"}, f"output '{name}'").get("binary_data", binary)
        if not isinstance(outputs[name], bool):
            raise ApiError(400, "parameter", f"'binary_data' of '{name}' must be true or false.")
    return outputs


def _header_length(text: bytes, available: int) -> int:
    if not text.isdigit() or len(text) > 12 or not 0 < int(text) <= available:
        raise ApiError(
            400,
            "bad_header",
            f"Inference-Header-Content-Length is {text[:20].decode('latin-1')!r}; it must be the number of bytes of "
            f"the JSON header, at most the body's {available:,}.",
        )
    return int(text)


def _items(header: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = header.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ApiError(400, "bad_header", f"'{key}' must be a list of objects with a name each.")
    return items


def _parameters(item: dict[str, Any], known: set[str], where: str) -> dict[str, Any]:
    parameters = item.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ApiError(
            400, "bad_header", f"'parameters' of {where} is {json_type_name(parameters)}; it must be an object."
        )
    parameters = present(parameters)
    _known(parameters, known, f"the parameters of {where}")
    return parameters


def _known(item: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(item) - known):
        raise ApiError(
            400,
            "unknown_field",
            f"{where} has '{unknown[0][:40]}', which is unknown; known are {', '.join(sorted(known))}.",
        )


def _short(number: Any) -> str:
    """Format a number for a message, however long it is."""
    if type(number) is not int:
        return json_type_name(number)
    return f"{number:,}" if abs(number) < 10**15 else f"about 10^{int(math.log10(abs(number)))}"
