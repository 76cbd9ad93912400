"""`ray-app sync`: the tracking server gets what journals of runs and of sweeps hold and it does not."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.config.base import TrackingFlags
from ray_app.config.tune import SyncConfig
from ray_app.errors import ConfigError
from ray_app.jobs.journal import JOURNAL, entries
from ray_app.jobs.registry import registry_errors
from ray_app.jobs.run_copy import run_at
from ray_app.jobs.sweep_folder import SWEEP, SweepFolder
from ray_app.jobs.tracking import sync_run, tracking_uri


def run_sync(cfg: SyncConfig) -> dict[str, Any]:
    """Each run to the server given, else to the one it was started with. RegistryError: it does not answer."""
    if not cfg.runs:
        raise ConfigError("sync needs run folders: ray-app sync RUN…")
    results = []
    for where in cfg.runs:
        with run_at(where) as run:
            run.pull()
            lines = entries(run.path) if (run.path / JOURNAL).is_file() else []
            run.bring(*(line["artifacts"] for line in lines[-1:] if line.get("artifacts")))
            sweep = SweepFolder(run.path) if (run.path / SWEEP).is_file() else None
            uri = cfg.tracking_uri or (sweep.about() if sweep else run.about()["config"])["tracking_uri"]
            flags = TrackingFlags(tracking_uri=uri)
            with registry_errors(flags):
                paths = (run.path, *(sweep.runs() if sweep else ()))
                results += [sync_run(path, tracking_uri(flags), run.shown(path)) for path in paths]
    totals = ("points_journal", "points_server", "points_sent", "missing", "surplus")
    return {**{name: sum(result[name] for result in results) for name in totals}, "runs": results}


def render_sync(result: dict[str, Any], console: Console) -> None:
    """Counts for each run."""
    table = Table("run", "in the journal", "sent now", "on the server", "missing", box=None)
    for run in result["runs"]:
        names = ("points_journal", "points_sent", "points_server", "missing")
        table.add_row(run["run"], *(f"{run[name]:,}" for name in names))
    console.print(table)
