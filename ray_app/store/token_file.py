"""The endpoint's token file: one `NAME:SCOPE[,SCOPE]:SHA256` a line. Secrets themselves are never stored."""

import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_app.errors import ConfigError
from ray_app.parsing.text import read_utf8

SCOPES = ("infer", "admin")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"(?P<name>{NAME.pattern}):(?P<scopes>[a-z,]+):(?P<sha256>[0-9a-f]{{64}})")


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file."""

    name: str
    """Name of the holder, used in logs and metrics instead of the secret."""
    scopes: frozenset[str]
    """Subset of `SCOPES` that the token grants."""
    sha256: str
    """Hex digest of the secret."""


def read_tokens(path: Path) -> list[Token]:
    """Read all tokens. ConfigError: unreadable, writable by others, empty, or a line that is not a token."""
    tokens, error = valid_tokens(path)
    if error or not tokens:
        raise ConfigError(error or no_token(path))
    return tokens


def no_token(path: Path) -> str:
    """Return what is wrong with a file that has no token."""
    return f"{path} has no token; create one with `ray-app serve-token create NAME --token-file {path}`."


def valid_tokens(path: Path) -> tuple[list[Token], str | None]:
    """Return the tokens of the lines that can be read, and what is wrong with the first that cannot.

    Of a file that cannot be read, or that others may have written, no token is valid.
    """
    try:
        mode = path.stat().st_mode
        lines = read_utf8(path).splitlines()
    except (OSError, ValueError) as error:
        return [], f"the token file {path} cannot be read: {error}"
    if stat.S_IMODE(mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return [], f"the token file {path} can be written by others; run `chmod 600 {path}`."
    tokens: list[Token] = []
    first_error = None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        scopes = frozenset(match["scopes"].split(",")) if match else frozenset()
        if match is None or not scopes <= set(SCOPES):
            first_error = first_error or (
                f"{path} line {number} is not a token; a line is NAME:infer,admin:SHA256, as written by "
                "`ray-app serve-token create NAME --token-file FILE`."
            )
        else:
            tokens.append(Token(match["name"], scopes, match["sha256"]))
    return tokens, first_error


def append_token(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Add a token to the file and return its secret. ConfigError: the name is taken or not allowed, or a bad file."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"token name '{name}' is not allowed; use 1 to 64 letters, digits, dots, dashes or underscores."
        )
    secret = secrets.token_urlsafe(32)
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two that add the same name at a time
            tokens, damage = valid_tokens(path)
            if damage:
                raise ConfigError(damage)
            text = file.read()
            if any(token.name == name for token in tokens):
                raise ConfigError(f"{path} already has a token '{name}'; use another name, or delete its line first.")
            start = "\n" if text and not text.endswith("\n") else ""
            file.write(f"{start}{name}:{','.join(scopes)}:{sha256_of(secret.encode())}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {path} cannot be written: {error}") from error
    return secret


def sha256_of(secret: bytes) -> str:
    """Hex digest under which the file keeps a secret."""
    return hashlib.sha256(secret).hexdigest()
