"""Environment variables that Ray and MLflow read at import, set before it and only where unset."""

import os
import sys
import warnings
from pathlib import Path
from urllib.request import getproxies

from ray_app.errors import ConfigError

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TASK_MAX_RETRIES": "10",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""No noise, no telemetry, and short timeouts for starving data and an absent tracking server. A trial of Tune may end
without a metric, and Ctrl-C is handled by this program. A task that loses its worker or node is retried up to ten
times: Ray Data has no setting of its own for that."""

OWN_CLUSTER = {"RAY_worker_niceness": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For a Ray that one command starts on this machine. Ray runs workers at niceness 15, a 28th of a core that any other
program wants, but they are what the command is there for. No cloud takes the node back: nothing watches for that."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine, to which no proxy leads."""


def set_defaults() -> None:
    """Set the defaults for this process and its children. What the user has set stays.

    ConfigError: no home folder is known.
    """
    if os.path.expanduser("~") == "~":
        raise ConfigError("no home folder is known for this user; set HOME to one, where Ray keeps its token")
    set_where_unset(DEFAULTS)
    exclude_loopback_from_proxies()
    show_warnings()


def set_where_unset(values: dict[str, str]) -> None:
    """Set environment variables that are not set yet."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def exclude_loopback_from_proxies() -> None:
    """Add this machine to NO_PROXY if a proxy is set, for the clients of MLflow and Ray."""
    proxies = getproxies()
    excluded = proxies.pop("no", "")
    if proxies:
        names = ",".join(dict.fromkeys([*filter(None, map(str.strip, excluded.split(","))), *LOOPBACK]))
        os.environ.update(no_proxy=names, NO_PROXY=names)


def show_warnings() -> None:
    """Show warnings which PYTHONWARNINGS or -W makes errors: what Ray and MLflow import warns."""
    if not any(option.partition(":")[0] == "error" for option in sys.warnoptions):
        return
    print(
        "warnings as errors would end Ray and MLflow while they are imported; they are shown instead", file=sys.stderr
    )
    sys.warnoptions.clear()
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.resetwarnings()
    for ignored in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", ignored)  # as Python does by itself


def token_path() -> Path:
    """Return the file with the key to this user's clusters; one that is not there where no home folder is known."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
