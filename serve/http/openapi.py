"""Parts of `/openapi.json` that FastAPI cannot read from routes which parse their bodies themselves."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from ..protocol.errors import PROBLEM_JSON
from ..protocol.schemas import (
    AlignAnswer,
    AlignRequest,
    InferRequestDocument,
    InferResponseDocument,
    ProblemDocument,
    VerifyRequest,
)

SCHEMAS = (
    AlignRequest,
    VerifyRequest,
    AlignAnswer,
    ProblemDocument,
    InferRequestDocument,
    InferResponseDocument,
)
OCTETS = "application/octet-stream"
BINARY = {"schema": {"type": "string", "format": "binary"}}
DESCRIPTIONS = {
    400: "Malformed",
    401: "No valid token",
    403: "Not allowed",
    404: "Not found",
    409: "Refused",
    413: "Too large",
    415: "Unsupported type",
    422: "Cannot be answered",
    429: "Busy",
    503: "Unavailable",
    504: "Too late",
}
HEADER_LENGTH_PARAMETER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1},
    "description": "Bytes of the JSON header in front of raw little-endian tensors; without it the body is all JSON.",
}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Error answers of a route; every route may also answer 404, 405 and 500."""
    content = {PROBLEM_JSON: json_content(ProblemDocument)}
    return {code: {"description": DESCRIPTIONS[code], "content": content} for code in codes}


def json_content(model: Any) -> dict[str, Any]:
    """OpenAPI's media type object of a model."""
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}


def body(request: Any, answer: Any, *codes: int, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keyword arguments of a route with a JSON body, or raw bytes of the media types `also`."""
    raw = dict.fromkeys(also, BINARY)
    returned = {"application/json": json_content(answer)} | (
        {OCTETS: BINARY} if answer is InferResponseDocument else {}
    )
    return {
        "response_model": None,
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": json_content(request), **raw}}
        },
        "responses": {
            200: {"description": "Answers in the order of the request", "content": returned},
            **problems(400, 401, 403, *codes, 413, 415, 422, 429, 503, 504),
        },
    }


def path_parameters(path: str, *more: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's parameters of a path, which routes read from the request context."""
    names = [name for name in ("model", "version") if f"{{{name}}}" in path]
    own = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    return {"parameters": [*own, *more]}


def describe_infer(app: FastAPI, with_tokens: bool) -> Callable[[], dict[str, Any]]:
    """Return FastAPI's `openapi` function, extended by the schemas that the routes refer to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            named = [(model.__name__, "validation", TypeAdapter(model)) for model in SCHEMAS]
            _, schemas = TypeAdapter.json_schemas(named, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            components = document.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **schemas["$defs"]}
            if with_tokens:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"token": []}]
            app.openapi_schema = document
        return app.openapi_schema

    return openapi
