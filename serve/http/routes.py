"""The routes. Errors of the framework become problems too."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ..observability.stats import summed
from ..protocol.errors import PROBLEM_JSON, ApiError
from ..protocol.schemas import AlignRequest, VerifyRequest
from ..replica_state import ReplicaState
from . import v1, v2
from .asgi import defect
from .openapi import MODEL_PATHS, document, named, problems, takes

CONSOLE = Path(__file__).parents[1] / "console" / "index.html"
CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's own script and style, and nothing from elsewhere."""
PAGE_HEADERS = {"content-security-policy": CSP, "cache-control": "no-cache", "referrer-policy": "no-referrer"}

Broadcast = Callable[[str], Awaitable[list[Any]]]
"""Calls a method on every replica."""


def build_api(endpoint: ReplicaState, broadcast: Broadcast) -> FastAPI:
    """The routes over an endpoint."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        endpoint.start()
        yield
        await endpoint.close()

    app = FastAPI(
        title="Alignment endpoint",
        version="1",
        description="Event features in, features of the target model out. /v2 is the Open Inference Protocol.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )

    async def reload(_: Request) -> Response:
        """Looks at the model source now, on every replica; a version that was refused is tried again."""
        outcomes = await broadcast("reload")
        about = endpoint.about()
        if "refused" in outcomes and about["refused"]:
            raise ApiError(409, "refused", f"version {about['refused']['version']}: {about['refused']['reason']}")
        if "unreachable" in outcomes:
            raise ApiError(503, "unreachable", f"the registry does not answer: {about['watch']['last_error']}")
        action = "swapped" if "swapped" in outcomes else "unchanged"
        return JSONResponse(
            {"action": action, "version": about["version"], "digest": about["digest"], "replicas": outcomes}
        )

    async def metrics(_: Request) -> Response:
        """Prometheus series of every replica, told apart by the label `replica`."""
        texts = await broadcast("exposition")
        return PlainTextResponse(merged(texts), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def stats(_: Request) -> Response:
        """Live numbers of all replicas."""
        parts = await broadcast("snapshot")
        return JSONResponse(summed(parts, endpoint.model.evaluation_record, endpoint.model.identity.digest))

    async def console(_: Request) -> Response:
        """The page."""
        if not CONSOLE.is_file():
            raise ApiError(404, "not_found", f"{CONSOLE} is not there; /openapi.json tells what is.")
        return HTMLResponse(
            CONSOLE.read_bytes(), headers={"content-security-policy": CSP, "cache-control": "no-cache"}
        )

    async def openapi(_: Request) -> Response:
        """This description."""
        return JSONResponse(document(app, bool(endpoint.keys.path)))

    add = app.add_api_route
    add("/", console, methods=["GET"], include_in_schema=False)
    add("/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    add("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse, responses=problems(401, 403))
    add("/v1/align", v1.align, methods=["POST"], response_model=None, **takes(AlignRequest, bare=True))
    add("/v1/verify", v1.verify, methods=["POST"], response_model=None, **takes(VerifyRequest))
    add("/v1/model", v1.model, methods=["GET"], response_model=None, responses=problems(401, 403))
    add("/v1/stats", stats, methods=["GET"], response_model=None, responses=problems(401, 403))
    add("/v1/reload", reload, methods=["POST"], response_model=None, responses=problems(401, 403, 409, 503))
    add("/v2", v2.server_metadata, methods=["GET"], response_model=None, responses=problems(401, 403))
    add("/v2/health/live", v2.live, methods=["GET"], response_model=None, responses=problems(403))
    add("/v2/health/ready", v2.ready, methods=["GET"], response_model=None, responses=problems(403, 503))
    for path in MODEL_PATHS:
        more: dict[str, Any] = {"response_model": None, "openapi_extra": named(path)}
        add(path, v2.model_metadata, methods=["GET"], responses=problems(401, 403, 404), **more)
        add(f"{path}/ready", v2.model_ready, methods=["GET"], responses=problems(401, 403, 404, 503), **more)
    app.add_exception_handler(ApiError, answer_problem)
    app.add_exception_handler(StarletteHTTPException, answer_http)
    app.add_exception_handler(Exception, answer_defect)
    return app


async def answer_problem(request: Request, problem: Exception) -> Response:
    """As the edge does."""
    assert isinstance(problem, ApiError)
    call = request.scope["ray_app.call"]
    call.problem = problem.code
    return Response(problem.body(call.request_id), problem.status, problem.headers, PROBLEM_JSON)


async def answer_defect(request: Request, _: Exception) -> Response:
    """500; the edge logs the rest."""
    return await answer_problem(request, defect(request.scope["ray_app.call"]))


async def answer_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the framework."""
    assert isinstance(error, HTTPException | StarletteHTTPException)
    code = {404: "not_found", 405: "method"}.get(error.status_code, "http")
    detail = {
        404: "there is nothing at this path; /openapi.json tells what there is.",
        405: f"this path does not take {request.scope['ray_app.call'].method}; /openapi.json tells what it takes.",
    }.get(error.status_code, str(error.detail))
    return await answer_problem(request, ApiError(error.status_code, code, detail, dict(error.headers or {})))


def merged(texts: list[Any]) -> str:
    """Several expositions as one: each family's help and type once, all its series after them."""
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
