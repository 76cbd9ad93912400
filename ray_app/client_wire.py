"""The two wire forms as the client speaks them: what is sent for some arrays, and the arrays of what came back.

Binary is the Open Inference Protocol v2 with its binary tensor extension: a JSON head, then the tensors as they lie
in memory. JSON is /v1, tensors in base64. Nothing is copied in binary form, on either way.

Shapes: B = pairs, D = target width.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.datatypes import V2_DATATYPES
from ray_app.errors import EndpointError, InputError
from ray_app.parsing.json_text import parse_object

Wire = Literal["binary", "json"]
"""`binary`: Open Inference Protocol v2, tensors as they are in memory. `json`: /v1, tensors in base64."""

ANSWERED = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?")}
"""Types in an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of the endpoint for B pairs; None for outputs that were not requested."""

    aligned_BD: NDArray[np.float32] | None
    """Aligned features: views of what was received."""
    cos_sim_B: NDArray[np.float32] | None
    """Cosine of each aligned feature with its target."""
    accepted_B: NDArray[np.bool_] | None
    """cos_sim > θ, strictly."""
    version: str
    """Version of the model that answered."""
    request_id: str
    """Identity of the request in the endpoint's log."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer."""

    status: int
    """HTTP status."""
    headers: Mapping[str, str]
    """Headers by their names in lower case."""
    body: memoryview
    """Body as received."""
    request_id: str = ""
    """Identity of the request in the endpoint's log."""

    def json(self) -> dict[str, Any]:
        """Return the body as an object; empty where it is not a JSON object, so something else answered."""
        try:
            return parse_object(self.body)
        except ValueError:
            return {}


def check_arrays(name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """Return the tensor as little-endian rows, without a copy where it is. InputError: it cannot be sent."""
    if not isinstance(tensor, np.ndarray) or tensor.ndim != 2:
        shape = getattr(tensor, "shape", None)
        raise InputError(
            f"{name} is {type(tensor).__name__} of shape {shape}; give a numpy array of shape (B, width)."
        )
    if tensor.dtype.name not in V2_DATATYPES:
        raise InputError(
            f"{name} is {tensor.dtype.name}; the endpoint takes {', '.join(V2_DATATYPES)}: uint8 for pixels, else "
            "tensor.astype(np.float32)."
        )
    return np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))


def octets(tensor: NDArray[Any]) -> memoryview:
    """Return the tensor's own memory."""
    return tensor.reshape(-1).view(np.uint8).data


def binary_request(
    tensors: Mapping[str, NDArray[Any]], theta: float | None, outputs: Iterable[str]
) -> tuple[bytes, list[memoryview]]:
    """Open Inference Protocol v2: the JSON head, and the tensors that follow it."""
    document: dict[str, Any] = {
        "inputs": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "datatype": V2_DATATYPES[tensor.dtype.name],
                "parameters": {"binary_data_size": tensor.nbytes},
            }
            for name, tensor in tensors.items()
        ],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    if theta is not None:
        document["parameters"] = {"theta": theta}
    return json.dumps(document).encode(), [octets(tensor) for tensor in tensors.values()]


def binary_answer(reply: Reply) -> Answer:
    """Return the arrays of a v2 answer, as views of its body. EndpointError if it is no such answer."""
    try:
        start = int(reply.headers["inference-header-content-length"])
        document = parse_object(reply.body[:start])
        found: dict[str, NDArray[Any]] = {}
        for output in document["outputs"]:
            stop = start + output["parameters"]["binary_data_size"]
            flat = np.frombuffer(reply.body[start:stop], ANSWERED[output["datatype"]])
            found[output["name"]] = flat.reshape(output["shape"])
            start = stop
        if start != len(reply.body):
            raise ValueError(f"{len(reply.body)} bytes, not {start}")
    except (KeyError, ValueError, TypeError) as error:
        raise not_understood(reply, error) from error
    return answer(reply, found, str(document.get("model_version", "")))


def json_request(tensors: Mapping[str, NDArray[Any]], theta: float | None, outputs: Iterable[str]) -> dict[str, Any]:
    """Return the document of /v1/align and /v1/verify."""
    document: dict[str, Any] = {
        name: {
            "data": base64.b64encode(octets(tensor)).decode(),
            "datatype": V2_DATATYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
        }
        for name, tensor in tensors.items()
    }
    document["return"] = [name for name in outputs if name == "aligned"]
    return document | {"encoding": "base64"} | ({} if theta is None else {"theta": theta})


def json_answer(reply: Reply, outputs: Iterable[str]) -> Answer:
    """Return the same from an answer of /v1."""
    document, found = reply.json(), {}
    try:
        for name in outputs:
            rows = [pair[name] for pair in document["pairs"]]
            if name == "aligned":
                rows = [np.frombuffer(base64.b64decode(row["data"], validate=True), "<f4") for row in rows]
            found[name] = np.array(rows, ANSWERED["BOOL" if name == "accepted" else "FP32"])
        return answer(reply, found, str(document["model"]["version"]))
    except (KeyError, ValueError, TypeError) as error:
        raise not_understood(reply, error) from error


def answer(reply: Reply, found: Mapping[str, NDArray[Any]], version: str) -> Answer:
    """Arrays by name as an `Answer`."""
    aligned, cos_sim, accepted = (found.get(name) for name in ("aligned", "cos_sim", "accepted"))
    return Answer(aligned, cos_sim, accepted, version, reply.request_id)


def not_understood(reply: Reply, error: Exception) -> EndpointError:
    """Return an answer of 200 that is not of the protocol."""
    return EndpointError(
        f"the answer is not one of an alignment endpoint ({type(error).__name__}: {error}); is the address "
        "right, and is the endpoint of this version?",
        reply.status,
    )
