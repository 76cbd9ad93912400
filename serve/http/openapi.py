"""What `/openapi.json` says: what FastAPI's routes tell of themselves, and `infer`, which is none of them."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from ..protocol.errors import PROBLEM_JSON
from ..protocol.open_inference import DTYPES, OUTPUTS
from ..protocol.schemas import AlignAnswer, AlignRequest, ProblemDocument, VerifyRequest
from . import v1

MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
WORDS = {
    400: "Malformed",
    401: "No valid token",
    403: "Not allowed",
    404: "Not there",
    409: "Refused",
    413: "Too large",
    415: "Another type",
    422: "It cannot be answered",
    429: "Busy",
    503: "Not now",
    504: "Late",
}


def members(required: list[str], **properties: Any) -> dict[str, Any]:
    """The schema of an object without unknown members."""
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def array(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The schema of a list."""
    return {"type": "array", "items": items, **more}


NUMBER, WHOLE, TEXT, YES = ({"type": kind} for kind in ("number", "integer", "string", "boolean"))
SIZE = {"type": "integer", "minimum": 0}
SHAPE = array({"type": "integer", "minimum": 1}, minItems=2, maxItems=2, description="[B, width].")
DATA = {"anyOf": [array(NUMBER), array(array(NUMBER))], "description": "Flat or nested; left out where raw."}
BINARY = {"type": "string", "format": "binary"}
INPUT = members(
    ["name", "shape", "datatype"],
    name={"type": "string", "enum": ["event", "target"]},
    shape=SHAPE,
    datatype={"type": "string", "enum": list(DTYPES)},
    data=DATA,
    parameters=members([], binary_data_size=SIZE),
)
OUTPUT = members(["name"], name={"type": "string", "enum": list(OUTPUTS)}, parameters=members([], binary_data=YES))
INFERENCE_REQUEST = members(
    ["inputs"],
    id=TEXT,
    inputs=array(INPUT, minItems=1, maxItems=2),
    outputs=array(OUTPUT, maxItems=len(OUTPUTS)),
    parameters=members(
        [],
        theta={"type": "number", "minimum": -1, "maximum": 1, "default": 0.8},
        binary_data_output=YES,
        timeout={**SIZE, "description": "µs."},
        priority={},
    ),
)
INFERENCE_ANSWER = members(
    ["model_name", "model_version", "outputs"],
    id=TEXT,
    model_name=TEXT,
    model_version=TEXT,
    outputs=array(
        members(
            ["name", "datatype", "shape"],
            name={"type": "string", "enum": list(OUTPUTS)},
            datatype={"type": "string", "enum": sorted(set(OUTPUTS.values()))},
            shape=array(WHOLE),
            data=array({"anyOf": [NUMBER, YES]}),
            parameters=members([], binary_data_size=SIZE),
        )
    ),
)
LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1},
    "description": "Bytes of the JSON head before raw little-endian tensors; without it all of the body is JSON.",
}
INFER_HELP = "Aligned features; with a target also cos_sim and the verdict at theta. Only what is asked for is sent."


def infer(path: str) -> dict[str, Any]:
    """The OpenAPI of `infer`, JSON or raw tensors after a JSON head, either way."""

    def content(name: str) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{name}"}
        return {"application/json": {"schema": schema}, v1.EVENTS: {"schema": BINARY}}

    answer = {"description": "The outputs in the order asked for", "content": content("InferenceAnswer")}
    refused = {str(code): found for code, found in problems(400, 401, 403, 404, 413, 415, 422, 429, 503, 504).items()}
    return {
        "summary": "Infer",
        "description": INFER_HELP,
        "operationId": "infer_version" if "version" in path else "infer",
        "parameters": [*named(path)["parameters"], LENGTH],
        "requestBody": {"required": True, "content": content("InferenceRequest")},
        "responses": {"200": answer, **refused},
    }


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside 200; 404, 405 and 500 go without saying."""
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    return {code: {"description": WORDS[code], "content": {PROBLEM_JSON: {"schema": schema}}} for code in codes}


def takes(request: type[AlignRequest], bare: bool = False) -> dict[str, Any]:
    """The OpenAPI of a route with a body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{request.__name__}"}}}
    if bare:
        content |= {kind: {"schema": BINARY} for kind in (*sorted(v1.IMAGES), v1.EVENTS)}
    answer = {"schema": {"$ref": "#/components/schemas/AlignAnswer"}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {
            200: {"description": "The pairs in their order", "content": {"application/json": answer}},
            **problems(400, 401, 403, 413, 415, 422, 429, 503, 504),
        },
    }


def named(path: str) -> dict[str, Any]:
    """The parameters of a path, for OpenAPI."""
    names = [name for name in ("model", "version") if f"{{{name}}}" in path]
    return {"parameters": [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]}


def document(app: FastAPI, tokens: bool) -> dict[str, Any]:
    """OpenAPI of all routes."""
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    models = [(model, "validation") for model in (AlignRequest, VerifyRequest, AlignAnswer, ProblemDocument)]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = described.setdefault("components", {})
    of_v2 = {"InferenceRequest": INFERENCE_REQUEST, "InferenceAnswer": INFERENCE_ANSWER}
    components["schemas"] = {**components.get("schemas", {}), **schemas["$defs"], **of_v2}
    described["paths"] |= {f"{path}/infer": {"post": infer(path)} for path in MODEL_PATHS}
    if tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return described
