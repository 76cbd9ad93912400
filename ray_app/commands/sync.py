"""`ray-app sync`: the tracking server gets what event logs of runs and of sweeps hold and it does not."""

from collections.abc import Callable
from pathlib import Path
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
from ray_app.tracking.mlflow_logger import sync_run, tracking_uri
from ray_app.tracking.model_registry import registry_errors


def run_sync(cfg: SyncConfig) -> dict[str, Any]:
    """Each run to the server given, else to the one it was started with. RegistryError: it does not answer."""
    if not cfg.runs:
        raise ConfigError("sync needs run folders: ray-app sync RUN…")
    results = []
    for where in cfg.runs:
        if is_sweep(where):
            with open_sweep(where) as sweep:
                sweep.refresh()
                sweep.download_artifacts()
                results += synced(cfg, sweep.metadata(), [sweep.path, *sweep.runs()], sweep.shown)
        else:
            with open_run(where) as run:
                run.refresh()
                lines = entries(run.path) if (run.path / EVENT_LOG).is_file() else []
                run.download(*(line["artifacts"] for line in lines[-1:] if line.get("artifacts")))
                results += synced(cfg, run.metadata()["config"], [run.path], run.shown)
    totals = ("points_in_log", "points_server", "points_sent", "missing", "extra")
    return {**{name: sum(result[name] for result in results) for name in totals}, "runs": results}


def is_sweep(where: str) -> bool:
    """Whether a sweep lies there."""
    try:
        return SWEEP in open_storage(where).listdir()
    except (FileNotFoundError, NotADirectoryError):
        return False


def synced(
    cfg: SyncConfig, about: dict[str, Any], runs: list[Path], shown: Callable[[Path], str]
) -> list[dict[str, Any]]:
    """Each of some runs that began with one tracking server."""
    uri = tracking_uri(TrackingFlags(tracking_uri=cfg.tracking_uri or about["tracking_uri"]))
    with registry_errors(uri):
        return [sync_run(path, uri, shown(path)) for path in runs]


def render_sync(result: dict[str, Any], console: Console) -> None:
    """Counts for each run."""
    table = Table("run", "in the event log", "sent now", "on the server", "missing", box=None)
    for run in result["runs"]:
        names = ("points_in_log", "points_sent", "points_server", "missing")
        table.add_row(run["run"], *(f"{run[name]:,}" for name in names))
    console.print(table)
