"""Names of tracking servers and databases. Imports no MLflow: that takes seconds, and workers send it nothing."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from ray_app.config.base import TrackingFlags
from ray_app.errors import ConfigError


def tracking_uri(cfg: TrackingFlags) -> str:
    """Return the server or database of a command, a file with its absolute path. ConfigError: a file store."""
    uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if urlparse(uri).scheme in ("", "file"):
        raise ConfigError(f"--tracking-uri {uri} is a folder, which MLflow no longer supports; use sqlite:///FILE.db")
    if match := re.fullmatch(r"sqlite:///(?!/)(.+)", uri):
        uri = f"{database_uri(Path.cwd())}/{match[1].removeprefix('./')}"
    return uri


def database_uri(path: Path) -> str:
    """Return the URI of an SQLite database; what a URL would take for its own signs is quoted."""
    return "sqlite:///" + re.sub(r"[%?#]", lambda sign: f"%{ord(sign[0]):02X}", str(path))


def database_file(uri: str) -> Path | None:
    """Return the file of an SQLite database; None for other servers."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])) if uri.startswith("sqlite:////") else None
