"""`ray-app sync`: the tracking server gets what journals of runs and of sweeps hold and it does not."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.config.base import TrackingFlags
from ray_app.config.tune import SyncConfig
from ray_app.errors import ConfigError
from ray_app.jobs.registry import registry_errors
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.sweep_folder import SWEEP, SweepFolder
from ray_app.jobs.tracking import sync_run, tracking_uri


def run_sync(cfg: SyncConfig) -> dict[str, Any]:
    """Each run to the server given, else to the one it was started with. RegistryError: it does not answer."""
    if not cfg.runs:
        raise ConfigError("sync needs run folders: ray-app sync RUN…")
    results = []
    for folder in cfg.runs:
        path = folder.absolute()
        sweep = SweepFolder(path) if (path / SWEEP).is_file() else None
        uri = cfg.tracking_uri or (sweep.about() if sweep else RunFolder(path).about()["config"])["tracking_uri"]
        flags = TrackingFlags(tracking_uri=uri)
        with registry_errors(flags):
            results += [sync_run(run, tracking_uri(flags)) for run in (path, *(sweep.runs() if sweep else ()))]
    totals = ("points_journal", "points_server", "points_sent", "missing", "surplus")
    return {**{name: sum(result[name] for result in results) for name in totals}, "runs": results}


def render_sync(result: dict[str, Any], console: Console) -> None:
    """Counts for each run."""
    table = Table("run", "in the journal", "sent now", "on the server", "missing", box=None)
    for run in result["runs"]:
        names = ("points_journal", "points_sent", "points_server", "missing")
        table.add_row(run["run"], *(f"{run[name]:,}" for name in names))
    console.print(table)
