"""One request on its way: who asks, for how long, and what is noted about it for logs and metrics."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import Scope

from .errors import ApiError

SAFE = re.compile(r"[^A-Za-z0-9._:/+-]")
TIMEOUT = b"x-request-timeout-ms"
MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
TEMPLATES = (
    (re.compile(MODEL + "/infer"), "/v2/models/{model}/infer"),
    (re.compile(MODEL + "/ready"), "/v2/models/{model}/ready"),
    (re.compile(MODEL), "/v2/models/{model}"),
)
KNOWN = {
    "/",
    "/metrics",
    "/openapi.json",
    "/v1/align",
    "/v1/model",
    "/v1/reload",
    "/v1/stats",
    "/v1/verify",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


@dataclass(slots=True)
class RequestContext:
    """Noted as it becomes known."""

    path: str
    """Below where the app is mounted."""
    method: str
    """GET, POST, …; OTHER for what HTTP does not know."""
    headers: Mapping[bytes, bytes]
    """Names in lower case; of several with one name the last."""
    route: str
    """The path's form: what metrics are kept by."""
    model: str | None = None
    """Model named in the path."""
    model_version: str | None = None
    """Version named in the path."""
    request_id: str = ""
    """The caller's, else one that Ray made."""
    token: str | None = None
    """Name of the token."""
    began: float = field(default_factory=time.perf_counter)
    """On its clock."""
    version: str = ""
    """Who answered."""
    digest: str = ""
    """Of who answered."""
    pairs: int = 0
    """Answered."""
    problem: str | None = None
    """Code of the problem that it was answered with."""
    trace_id: str = ""
    """Where traces are asked for."""
    spans: dict[str, float] = field(default_factory=dict)
    """Seconds of its parts, for Server-Timing."""

    @staticmethod
    def of(scope: Scope) -> "RequestContext":
        """Reads the request's line and headers; refuses nothing."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        headers = dict(scope["headers"])
        named, route = None, path if path in KNOWN else "other"
        for pattern, template in TEMPLATES:
            if named := pattern.fullmatch(path):
                route = template
                break
        given = headers.get(b"x-request-id", b"").decode("latin-1")[:128]
        return RequestContext(
            path=path,
            method=scope["method"] if scope["method"] in METHODS else "OTHER",
            headers=headers,
            route=route,
            model=named["model"] if named else None,
            model_version=named["version"] if named else None,
            request_id=SAFE.sub("_", given),
        )

    def timeout_s(self, longest_s: float, asked_us: int | None = None) -> float:
        """What is left of the caller's time, at most `longest_s`. Problem 400: no number of milliseconds."""
        granted = longest_s
        if (text := self.headers.get(TIMEOUT)) is not None:
            if not re.fullmatch(rb"[0-9]{1,9}(\.[0-9]{1,6})?", text):
                raise ApiError(
                    400, "parameter", "x-request-timeout-ms must be a number of milliseconds, such as 250."
                )
            granted = min(granted, float(text) / 1e3)
        if asked_us:
            granted = min(granted, asked_us / 1e6)
        return max(granted - (time.perf_counter() - self.began), 0.0)
