"""Bearer tokens from a file: named, kept as SHA-256, compared in constant time, read again when the file changes.

A line is `NAME:SCOPE[,SCOPE]:SHA256`; `ray-app serve --new-token NAME` makes one. Scopes are `infer` and `admin`.
"""

import hashlib
import hmac
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from ray_app.errors import ConfigError

from ..protocol.errors import ApiError

SCOPES = ("infer", "admin")
LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<scopes>[a-z,]+):(?P<sha256>[0-9a-f]{64})")
POLL_INTERVAL_S = 1.0
"""Between two looks at the file."""


@dataclass(frozen=True, slots=True)
class Token:
    """A line of the file."""

    name: str
    """Who; in logs and metrics instead of the token."""
    scopes: frozenset[str]
    """What it may do."""
    sha256: str
    """Of the secret."""


def read_tokens(path: Path) -> list[Token]:
    """The file's tokens. ConfigError: missing, readable or writable by others, a line that is none, a name twice."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {path} cannot be read: {error}") from error
    if stat.S_IMODE(mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"the token file {path} can be written by others; `chmod 600 {path}` keeps it yours.")
    tokens: list[Token] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        scopes = frozenset(match["scopes"].split(",")) if match else frozenset()
        if match is None or not scopes <= set(SCOPES):
            raise ConfigError(
                f"{path} line {number} is no token; a line is NAME:infer,admin:SHA256, as `ray-app serve --new-token "
                "NAME` makes it."
            )
        tokens.append(Token(match["name"], scopes, match["sha256"]))
    if not tokens:
        raise ConfigError(f"{path} holds no token; `ray-app serve --new-token NAME --tokens {path}` makes one.")
    return tokens


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
        digest = hashlib.sha256(secret.strip()).hexdigest()
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
