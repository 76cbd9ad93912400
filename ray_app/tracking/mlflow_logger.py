"""A run's event log in MLflow.

Points are sent in the order of the log, and `mlflow_sync.json` holds how far the server has acknowledged them. What
was sent after that is sent again: MLflow's SQL store ignores a point that it has (same run, name, step, time, value).
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ray_app.config.base import TrackingFlags
from ray_app.errors import RegistryError, StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.parsing.redact import redact
from ray_app.runs.event_log import EVENT_LOG, entries, parse_line
from ray_app.runs.run_dir import validate_relative_path
from ray_app.store.atomic import disk_errors, make_folder, partial_file, sole_writer, write_file
from ray_app.tracking.artifacts import log_dataset, upload_artifacts
from ray_app.tracking.uri import database_file, database_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""Errors of a tracking server that is away, slow or broken; those of requests are OSErrors."""
METRICS_PER_REQUEST = 900
"""Points in one request; MLflow takes at most 1,000."""
KEY_TAG = "run_key"
"""Tag that identifies a run's MLflow run, so that there is exactly one."""
TRIAL_POINTS = (
    *("objective", "lift", "accept_rate", "tokens_per_target_pass", "cos_sim", "epochs", "steps", "parameters"),
    "seconds",
)
"""Metrics of each trial in the MLflow run of its sweep."""
MLFLOW_SYNC = "mlflow_sync.json"
"""File in a run folder: `uri`, `mlflow_run_id`, `bytes` of the event log that this server has acknowledged, the
`crc` of these, and `ended`, true once it has the run's end and artifacts too."""


def connect(uri: str) -> MlflowClient:
    """Return MLflow's client; make the file of a database that does not exist.

    MLflow makes its tables in many steps, and nothing opens a database that a killed process left half made. So a new
    one gets its name once it is whole, and of several processes one makes it.
    """
    file = database_file(uri)
    if file and not file.exists():
        make_folder(file.parent)
        partial = partial_file(file)
        with disk_errors(file), sole_writer(partial) as lock:
            if file.exists():
                partial.unlink()
            else:
                lock.truncate(0)
                for left in file.parent.glob(f"{partial.name}-*"):  # SQLite's own, of a process that was killed
                    left.unlink()
                MlflowClient(database_uri(partial)).search_experiments(max_results=1)
                partial.rename(file)
    return MlflowClient(uri)


def failure_cause(error: BaseException) -> str:
    """Return the first line of a tracking server's error; of a connection that failed the cause alone."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    if cause := re.search(r"\(Caused by \w+\((.*)\)\)$", line):
        line = re.sub(r"HTTPS?Connection\([^)]*\): ", "", cause[1]).strip("\"'")
    return redact(line)


def is_away(error: BaseException) -> bool:
    """Return True if a server did not answer; False if it answered with a refusal."""
    return isinstance(error, OSError | SQLAlchemyError) or "failed with exception" in str(error)


def experiment_id(client: MlflowClient, cfg: TrackingFlags) -> str:
    """Return the experiment's id, creating it if needed; artifacts of a database file go to its folder."""
    name, database = cfg.experiment, database_file(tracking_uri(cfg))
    artifacts = (database.parent / "mlartifacts" / name).as_uri() if database else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was quicker
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise RegistryError(
            f"the experiment '{name}' was deleted there; name another with --experiment, or restore it: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


def start_monitor(run_id: str, uri: str) -> "SystemMetricsMonitor | None":
    """Start MLflow's record of CPU, memory, disk, network and GPU, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks."""
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def get_or_create_run(client: MlflowClient, uri: str, name: str, lines: list[dict[str, Any]]) -> str:
    """Return the id of a run's MLflow run, found by its key or created, with its parameters and tags up to date.

    `name`: the run's path or URI.
    """
    starts = [line for line in lines if line["kind"] == "run_started"]
    first = starts[0]
    experiment = experiment_id(client, TrackingFlags(tracking_uri=uri, experiment=first["experiment"]))
    run_id = run_of_key(client, first["key"], [experiment])
    if run_id is None:
        identity = {KEY_TAG: first["key"], "event_log": name}
        run_id = client.create_run(experiment, run_name=first["name"], tags=identity).info.run_id
    log_dataset(client, run_id, {**first["params"], **first["tags"]})
    logged = client.get_run(run_id).data
    # MLflow refuses another value for a parameter: those of the first start stay, later ones are in its tag.
    params = [Param(key, str(value)[:6000]) for key, value in first["params"].items() if key not in logged.params]
    tags = dict(first["tags"])
    if parent := first.get("parent_key") and run_of_key(client, first["parent_key"], [experiment]):
        tags["mlflow.parentRunId"] = parent
    if resumed := starts[1:]:
        tags["resumed"] = json.dumps([{"time": line["time"], "workers": line["workers"]} for line in resumed])[:5000]
    changed = [RunTag(key, value) for key, value in tags.items() if logged.tags.get(key) != value]
    if params or changed:
        client.log_batch(run_id, params=params, tags=changed)
    return run_id


def run_of_key(client: MlflowClient, key: str, experiments: list[str]) -> str | None:
    """Return the id of the MLflow run that has this run key, or None."""
    runs = client.search_runs(experiments, f"tags.{KEY_TAG} = '{key}'", max_results=1)
    return runs[0].info.run_id if runs else None


def sync_run(run: Path, uri: str, name: str = "") -> dict[str, Any]:
    """Send what the server has not acknowledged of a run: points, artifacts, its end. A second call sends nothing.

    `name`: the run's path or URI, if `run` is a copy. StoreError: no event log, or a damaged one. Errors of
    `TRACKING_ERRORS` pass: the server is away, and the run is not marked as synced.
    """
    if not (run / EVENT_LOG).is_file():
        raise StoreError(f"{run} has no {EVENT_LOG}: it is not the folder of a run that has started")
    lines = entries(run)
    if not any(line["kind"] == "run_started" for line in lines):
        raise StoreError(f"{run} has an {EVENT_LOG} without run_started: nothing is known of the run")
    client = connect(uri)
    run_id = get_or_create_run(client, uri, name or str(run), lines)
    sent, info = send_points(client, run, uri, run_id), client.get_run(run_id).info
    if (last := lines[-1])["kind"] == "run_ended":
        if last["artifacts"]:
            upload_artifacts(client, run_id, run / validate_relative_path(last["artifacts"]))
        if info.status != last["status"]:
            client.set_terminated(run_id, last["status"])
        write_file(run / MLFLOW_SYNC, json.dumps({**acknowledged(run), "ended": True}).encode())
    return {
        "run": name or str(run),
        "mlflow_run_id": run_id,
        "artifacts": info.artifact_uri,
        "points_in_log": sum(len(to_metrics(line)) for line in lines),
        "points_sent": sent,
    }


def send_points(client: MlflowClient, run: Path, uri: str, run_id: str) -> int:
    """Send the points after the watermark, move it, and return their number. An error leaves the watermark."""
    server = {"uri": redact(uri), "mlflow_run_id": run_id}
    state, data = acknowledged(run), (run / EVENT_LOG).read_bytes()
    begin = state["bytes"] if state.items() >= server.items() else 0
    if state.get("crc") != zlib.crc32(data[:begin]):  # another log than the one that was sent
        begin = 0
    lines = data[begin : data.rfind(b"\n") + 1].splitlines(keepends=True)
    where = f"{run / EVENT_LOG}, after byte {begin}"
    points = [point for line in lines for point in to_metrics(parse_line(line, where))]
    for first in range(0, len(points), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=points[first : first + METRICS_PER_REQUEST])
    if lines:
        sent = begin + sum(map(len, lines))
        watermark = {**server, "bytes": sent, "crc": zlib.crc32(data[:sent]), "ended": False}
        write_file(run / MLFLOW_SYNC, json.dumps(watermark).encode())
    return len(points)


def acknowledged(run: Path) -> dict[str, Any]:
    """Return the content of `mlflow_sync.json`; 0 bytes if there is none."""
    try:
        return {"bytes": 0, "ended": False} | parse_object((run / MLFLOW_SYNC).read_bytes())
    except (OSError, ValueError):
        return {"bytes": 0, "ended": False}


def pending_runs(folder: Path) -> list[Path]:
    """Return run folders in `folder` that have ended and are not known to be complete on a server."""
    pending = []
    for log in sorted(folder.glob(f"*/{EVENT_LOG}")):
        state = acknowledged(log.parent)
        complete = state["ended"] and state["bytes"] == log.stat().st_size
        if not complete and b'{"kind": "run_ended"' in log.read_bytes()[-4096:]:
            pending.append(log.parent)
    return pending


def to_metrics(line: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics of one event: every number of a step, a validation or an epoch, at its optimizer step.

    A sweep's event gives the result of a trial, at the trial's number.
    """
    if line["kind"] == "trial_ended":
        values = {f"trial/{key}": line[key] for key in TRIAL_POINTS if line[key] is not None}
        at_ms, step = int(line["ended_at"] * 1000), line["index"]
    elif prefix := {"step": "train", "validation": "validation", "epoch": "epoch"}.get(line["kind"]):
        values = flat_params({k: v for k, v in line.items() if k not in ("kind", "time", "global_step")}, prefix)
        at_ms, step = int(line["time"] * 1000), int(line["global_step"])
    else:
        return []
    return [Metric(key, value, at_ms, step) for key, value in values.items()]


def flat_params(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return nested numbers by names such as `epoch/val/cosine_accept_rate_0.80`, without other values."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}_{key}" if prefix.endswith("cosine_accept_rate") else f"{prefix}/{key}"
        if isinstance(value, Mapping):
            flat |= flat_params(value, name)
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat
