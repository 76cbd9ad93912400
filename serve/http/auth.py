"""Bearer tokens of requests, compared in constant time; the token file is read again when it changes.

What is not in the file now is not valid, whatever the reason: a deleted, emptied or damaged file lets fewer in.
"""

import hmac
import json
import logging
import os
import time
from pathlib import Path

from ray_app.store.token_file import no_token, read_tokens, sha256_of, valid_tokens

from ..protocol.errors import ApiError

LOG = logging.getLogger("ray.serve")
TOKEN_POLL_INTERVAL_S = 1.0
"""Time between two checks of the file."""


class TokenStore:
    """Tokens that are valid now: those of the lines of the file that can be read."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.error: str | None = None
        """Error of the file that was found last; None if there is none."""
        self._file_id = self._stat()  # before it is read: a change in between is seen the next time
        self._tokens = read_tokens(path) if path else []
        self._checked = time.monotonic()

    def check(self, authorization: bytes | None, scope: str) -> str | None:
        """Return the token's name, None without authentication. ApiError 401: no valid token. 403: not its scope."""
        if self.path is None:
            return None
        self._refresh()
        kind, _, secret = (authorization or b"").partition(b" ")
        digest = sha256_of(secret.strip())
        match = None
        for token in self._tokens:  # no early end: the time it takes reveals nothing
            if hmac.compare_digest(token.sha256, digest):
                match = token
        if match is None or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "unauthorized",
                "a valid token is needed: send the header `Authorization: Bearer TOKEN`.",
                {"www-authenticate": "Bearer"},
            )
        if scope not in match.scopes:
            raise ApiError(403, "forbidden", f"the token '{match.name}' may not do this; it needs scope '{scope}'.")
        return match.name

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < TOKEN_POLL_INTERVAL_S:
            return
        self._checked = now
        file_id = self._stat()
        if file_id == self._file_id:
            return
        assert self.path is not None
        before = {token.sha256 for token in self._tokens}
        self._tokens, self.error = valid_tokens(self.path)
        self._file_id = file_id
        if not self._tokens:
            self.error = self.error or no_token(self.path)
        revoked = len(before - {token.sha256 for token in self._tokens})
        line = {"event": "tokens", "valid": len(self._tokens), "revoked": revoked, "error": self.error}
        LOG.log(logging.WARNING if self.error else logging.INFO, json.dumps(line))

    def _stat(self) -> tuple[int, int, int] | None:
        if self.path is None:
            return None
        try:
            info = os.stat(self.path)
        except OSError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size
