"""`ray-app sync`: the tracking server gets what runs' journals hold and it does not."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.config import SyncConfig, TrackingFlags
from ray_app.errors import ConfigError
from ray_app.jobs.registry import registry_errors
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.tracking import sync_run, tracking_uri


def run_sync(cfg: SyncConfig) -> dict[str, Any]:
    """Each run to the server given, else to the one it was started with. RegistryError: it does not answer."""
    if not cfg.runs:
        raise ConfigError("sync needs run folders: ray-app sync RUN…")
    results = []
    for folder in cfg.runs:
        run = RunFolder(folder.absolute())
        flags = TrackingFlags(tracking_uri=cfg.tracking_uri or run.about()["config"]["tracking_uri"])
        with registry_errors(flags):
            results.append(sync_run(run.path, tracking_uri(flags)))
    totals = ("points_journal", "points_server", "points_sent", "missing", "surplus")
    return {**{name: sum(result[name] for result in results) for name in totals}, "runs": results}


def render_sync(result: dict[str, Any], console: Console) -> None:
    """Counts for each run."""
    table = Table("run", "in the journal", "sent now", "on the server", "missing", box=None)
    for run in result["runs"]:
        names = ("points_journal", "points_sent", "points_server", "missing")
        table.add_row(run["run"], *(f"{run[name]:,}" for name in names))
    console.print(table)
