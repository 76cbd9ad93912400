"""`ray-app sync`: sends what the tracking server lacks of the event logs of runs and sweeps."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.commands.tune.sweep_dir import SWEEP, open_sweep
from ray_app.config.base import TrackingFlags
from ray_app.config.tune import SyncConfig
from ray_app.errors import ConfigError
from ray_app.runs.event_log import EVENT_LOG, entries
from ray_app.runs.run_dir import open_run
from ray_app.store.filesystem import open_storage
from ray_app.tracking.mlflow_logger import sync_run
from ray_app.tracking.model_registry import registry_errors
from ray_app.tracking.uri import tracking_uri

COUNTS = ("points_in_log", "points_sent")


def run_sync(cfg: SyncConfig) -> dict[str, Any]:
    """Send each run to the given server, or to the one it was started with. RegistryError: it does not answer."""
    if not cfg.runs:
        raise ConfigError("sync needs run folders: ray-app sync RUN…")
    results = [result for where in cfg.runs for result in (sync_sweep if is_sweep(where) else sync_one)(cfg, where)]
    return {**{name: sum(result[name] for result in results) for name in COUNTS}, "runs": results}


def is_sweep(where: str) -> bool:
    """Return True if a path or URI is that of a sweep."""
    try:
        return SWEEP in open_storage(where).listdir()
    except (FileNotFoundError, NotADirectoryError):
        return False


def sync_sweep(cfg: SyncConfig, where: str) -> list[dict[str, Any]]:
    """Send a sweep and all of its runs."""
    with open_sweep(where) as sweep:
        sweep.refresh()
        sweep.download_artifacts()
        uri = tracking_uri(TrackingFlags(tracking_uri=cfg.tracking_uri or sweep.metadata()["config"]["tracking_uri"]))
        with registry_errors(uri):
            return [sync_run(path, uri, sweep.shown(path)) for path in (sweep.path, *sweep.runs())]


def sync_one(cfg: SyncConfig, where: str) -> list[dict[str, Any]]:
    """Send one run."""
    with open_run(where) as run:
        run.refresh()
        lines = entries(run.path) if (run.path / EVENT_LOG).is_file() else []
        run.download(*(line["artifacts"] for line in lines[-1:] if line.get("artifacts")))
        uri = tracking_uri(TrackingFlags(tracking_uri=cfg.tracking_uri or run.metadata()["config"]["tracking_uri"]))
        with registry_errors(uri):
            return [sync_run(run.path, uri, str(run))]


def render_sync(result: dict[str, Any], console: Console) -> None:
    """Print the number of points of each run."""
    table = Table("run", "points in the event log", "sent now", box=None)
    for run in result["runs"]:
        table.add_row(run["run"], *(f"{run[name]:,}" for name in COUNTS))
    console.print(table)
