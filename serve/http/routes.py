"""The FastAPI app: all routes, and JSON for the errors of the framework."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ..observability.stats import summed
from ..protocol.errors import ApiError
from ..protocol.schemas import AlignAnswer, AlignRequest, InferRequestDocument, InferResponseDocument, VerifyRequest
from . import v1, v2
from .openapi import HEADER_LENGTH_PARAMETER, OCTETS, body, describe_infer, path_parameters, problems
from .request import RequestMiddleware

if TYPE_CHECKING:
    from ..replica import ReplicaState

CONSOLE = Path(__file__).parents[1] / "console" / "index.html"
CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Allows the page's own script and style, and nothing from elsewhere."""
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

Broadcast = Callable[[str], Awaitable[list[Any]]]
"""Calls a method on every replica; what a replica raised is in its place."""


def build_api(replica: "ReplicaState", broadcast: Broadcast) -> FastAPI:
    """Build the app of one replica."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        replica.start()
        yield
        await replica.close()

    app = FastAPI(
        title="Alignment endpoint",
        version="1",
        description="Event features in, features of the target model out. /v2 is the Open Inference Protocol.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )

    async def reload(_: Request) -> Response:
        """Check the model source now, on every replica; a version that was refused is tried again."""
        results = require_answers(await broadcast("reload"), all_of_them=True)
        for outcome, status, code in (("refused", 409, "refused"), ("unreachable", 503, "unreachable")):
            if reasons := [result.reason for result in results if result.outcome == outcome]:
                raise ApiError(status, code, reasons[0])
        outcomes = [result.outcome for result in results]
        about = replica.about()
        action = "swapped" if "swapped" in outcomes else "unchanged"
        return JSONResponse(
            {"action": action, "version": about["version"], "digest": about["digest"], "replicas": outcomes}
        )

    async def metrics(_: Request) -> Response:
        """Prometheus series of every replica, distinguished by the label `replica`."""
        texts = require_answers(await broadcast("exposition"))
        return PlainTextResponse(merged(texts), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def stats(_: Request) -> Response:
        """Live numbers of all replicas."""
        parts = require_answers(await broadcast("snapshot"))
        return JSONResponse(summed(parts, replica.model.evaluation_record, replica.model.identity.digest))

    async def console(_: Request) -> Response:
        """Return the console's page."""
        return HTMLResponse(
            CONSOLE.read_bytes(),
            headers={"content-security-policy": CSP, "cache-control": "no-cache", "referrer-policy": "no-referrer"},
        )

    def get(path: str, handler: Callable[..., Any], *codes: int, **more: Any) -> None:
        app.add_api_route(
            path, handler, methods=["GET"], response_model=None, responses=problems(*codes, 403), **more
        )

    get("/", console, include_in_schema=False)
    get("/metrics", metrics, 401, 503, response_class=PlainTextResponse)
    get("/v1/model", v1.model, 401)
    get("/v1/stats", stats, 401, 503)
    get("/v2", v2.server_metadata, 401)
    get("/v2/health/live", v2.live)
    get("/v2/health/ready", v2.ready, 503)
    add = app.add_api_route
    add("/v1/reload", reload, methods=["POST"], response_model=None, responses=problems(401, 403, 409, 503))
    images = (*sorted(v1.IMAGES), OCTETS)
    add("/v1/align", v1.align, methods=["POST"], **body(AlignRequest, AlignAnswer, also=images))
    add("/v1/verify", v1.verify, methods=["POST"], **body(VerifyRequest, AlignAnswer))
    for path in MODEL_PATHS:
        get(path, v2.model_metadata, 401, 404, openapi_extra=path_parameters(path))
        get(f"{path}/ready", v2.model_ready, 401, 404, 503, openapi_extra=path_parameters(path))
        described = body(InferRequestDocument, InferResponseDocument, 404, also=(OCTETS,))
        described["openapi_extra"] |= path_parameters(path, HEADER_LENGTH_PARAMETER)
        add(f"{path}/infer", v2.infer, methods=["POST"], **described)
    app.add_exception_handler(HTTPException, as_api_error)
    app.add_middleware(RequestMiddleware, replica=replica)
    app.openapi = describe_infer(app, bool(replica.tokens.path))  # type: ignore[method-assign]
    return app


def require_answers(results: list[Any], all_of_them: bool = False) -> list[Any]:
    """Return what replicas answered. ApiError 503: none did, or not `all_of_them`; it says why the first did not."""
    failures = [result for result in results if isinstance(result, Exception)]
    if failures and (all_of_them or len(failures) == len(results)):
        cause = getattr(failures[0], "cause", None) or failures[0]  # Ray wraps what a replica raised
        raise ApiError(
            503,
            "replica_failed",
            f"{len(failures)} of {len(results)} replicas did not answer: {type(cause).__name__}: {cause}; ask again, "
            "and see their log.",
        )
    return [result for result in results if not isinstance(result, Exception)]


async def as_api_error(request: Request, error: Exception) -> Response:
    """Raise 404 and 405 of the framework as ApiError, which the middleware answers."""
    assert isinstance(error, HTTPException)
    code, detail = {
        404: ("not_found", "this path does not exist; /openapi.json lists those that do."),
        405: ("method", f"this path does not take {request.method}; /openapi.json lists what it takes."),
    }.get(error.status_code, ("http", str(error.detail)))
    raise ApiError(error.status_code, code, detail, dict(error.headers or {}))


def merged(texts: list[Any]) -> str:
    """Merge Prometheus texts: help and type once per family, then the series of all of them."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        name = ""
        for line in str(text).splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                heads = families.setdefault(name, ([], []))[0]
                if line not in heads:
                    heads.append(line)
            elif line:
                families[name][1].append(line)
    return "".join("\n".join([*heads, *series]) + "\n" for heads, series in families.values())
