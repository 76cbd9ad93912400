"""Bearer tokens of requests, compared in constant time; the token file is read again when it changes."""

import hmac
import os
import time
from pathlib import Path

from ray_app.errors import ConfigError
from ray_app.store.token_file import read_tokens, sha256_of

from ..protocol.errors import ApiError

POLL_INTERVAL_S = 1.0
"""Time between two checks of the file."""


class TokenStore:
    """The tokens that are valid now. A file that became unreadable changes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.flaw: str | None = None
        self._tokens = read_tokens(path) if path else []
        self._stamp = self._look()
        self._looked = time.monotonic()

    def check(self, authorization: bytes | None, scope: str) -> str | None:
        """The token's name; None where no tokens are asked for. Problem 401: none or unknown. 403: not for this."""
        if self.path is None:
            return None
        self._refresh()
        kind, _, secret = (authorization or b"").partition(b" ")
        digest = sha256_of(secret.strip())
        found = None
        for token in self._tokens:  # all of them: how long it takes tells nothing
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is None or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "unauthorized",
                "a valid token is needed: send the header `Authorization: Bearer TOKEN`.",
                {"www-authenticate": "Bearer"},
            )
        if scope not in found.scopes:
            raise ApiError(403, "forbidden", f"the token '{found.name}' may not do this; that takes scope '{scope}'.")
        return found.name

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < POLL_INTERVAL_S:
            return
        self._looked = now
        stamp = self._look()
        if stamp == self._stamp:
            return
        assert self.path is not None
        try:
            self._tokens, self._stamp, self.flaw = read_tokens(self.path), stamp, None
        except ConfigError as error:
            self.flaw = str(error)

    def _look(self) -> tuple[int, int, int] | None:
        if self.path is None:
            return None
        try:
            info = os.stat(self.path)
        except OSError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size
