"""Errors as answers: RFC 9457 problem details, with the member `error` that v2 clients read."""

import json
from http import HTTPStatus
from typing import Any

PROBLEM_JSON = "application/problem+json"


class ApiError(Exception):
    """An error answer: status, a code for programs, one sentence with the limit and the remedy."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.headers = headers or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ApiError, (self.status, self.code, self.detail, self.headers)

    def document(self, request_id: str) -> dict[str, Any]:
        """Members of the JSON body."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "error": self.detail,
            "code": self.code,
            "request_id": request_id,
        }

    def body(self, request_id: str) -> bytes:
        """JSON body as bytes. `detail` may quote the request, so non-ASCII text is escaped."""
        return json.dumps(self.document(request_id)).encode()
