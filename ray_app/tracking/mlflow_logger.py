"""MLflow, on the driver's side: what stands in a run's event log, in a database, and never in training's way."""

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ray_app.config.base import TrackingFlags
from ray_app.errors import ConfigError, StoreError
from ray_app.runs.event_log import EVENT_LOG, entries, tail
from ray_app.store.atomic import write_file
from ray_app.store.checkpoint import CHECKSUMS_FILE

TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a tracking server that is away, slow or broken shows itself as; the errors of requests are OSErrors."""
BATCH = 900
"""Points in one request; MLflow takes 1,000."""
FLUSH_S = 5.0
"""Between two requests: each costs a core tens of milliseconds, which on a small machine the workers would miss."""
LONGEST_PAUSE_S = 30.0
"""Between two tries to reach a server that is away."""
PATIENCE_S = 20.0
"""For a server that is silent, at a run's end."""
KEY_TAG = "run_key"
"""Tag by which a run's MLflow run is found again, so that a run has one and no more."""
ARTIFACTS = "checkpoint"
"""Artifact folder of a run that holds its checkpoint."""
TRIAL_POINTS = ("objective", "lift", "accept_rate", "epochs", "steps", "parameters", "seconds")
"""What a sweep's own run holds of each trial."""
MLFLOW_SYNC = "mlflow_sync.json"
"""In a run folder: up to which byte of the event log the server was seen to hold everything."""


def tracking_uri(cfg: TrackingFlags) -> str:
    """The server or database of a command, with an absolute path where it is a file. ConfigError: a file store."""
    uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if urlparse(uri).scheme in ("", "file"):
        raise ConfigError(f"--tracking-uri {uri} is a folder, which MLflow no longer keeps up; use sqlite:///FILE.db")
    if match := re.fullmatch(r"sqlite:///(?!/)(.+)", uri):
        uri = f"sqlite:///{Path(match[1]).absolute()}"
    return uri


def redact_password(text: str) -> str:
    """A tracking URI, or a text with one, without its password."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def experiment_id(client: MlflowClient, cfg: TrackingFlags) -> str:
    """The experiment, made where there is none; the artifacts of a database file lie beside it."""
    name, uri = cfg.experiment, tracking_uri(cfg)
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    beside = None
    if uri.startswith("sqlite:////"):
        beside = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=beside)
    except MlflowException as error:
        if found := client.get_experiment_by_name(name):  # another process was quicker
            return found.experiment_id
        raise error


class Tracker:
    """Carries a run's event log to MLflow from a thread of its own, which alone speaks to the server.

    Training never waits for it. Whatever goes wrong there is told once on standard error and tried again, less and
    less often; the event log keeps every point, and `ray-app sync` brings it over at any later time. A server that
    does not answer costs `PATIENCE_S` at the end of a run.
    """

    def __init__(self, cfg: TrackingFlags, run: Path, name: str = "") -> None:
        """`run`: its folder; `name`: what `sync` takes, where that is another."""
        self._uri, self._run, self._name = tracking_uri(cfg), run, name or str(run)
        self._client: MlflowClient | None = None
        self._pending: list[Metric] = []
        self._told = False
        self._pause_s, self._next_try = 1.0, 0.0
        self._arrived = False
        self._stop = threading.Event()
        self.run_id: str | None = None
        self.artifacts: str | None = None
        self._thread = threading.Thread(target=self._carry, name="tracking", daemon=True)
        self._thread.start()

    def summary(self) -> dict[str, Any]:
        """Which run at which server, and where its artifacts are; None of what is not known."""
        return {"mlflow_run_id": self.run_id, "tracking_uri": redact_password(self._uri), "artifacts": self.artifacts}

    def close(self) -> bool:
        """Carries the rest, the artifacts and the run's end. Whether the server holds all of the event log."""
        self._stop.set()
        self._thread.join(None if self.run_id else PATIENCE_S)
        if self._thread.is_alive():
            self._tell("no answer in time")
        return self._arrived

    def _carry(self) -> None:
        for earlier in pending_runs(self._run.parent):
            if earlier != self._run and not self._attempt(partial(sync_run, earlier, self._uri)):
                break  # the server is away: this run comes first
        for lines in tail(self._run, self._stop):
            for line in lines:
                self._pending += to_metrics(line)
            if self._pending and time.monotonic() >= self._next_try:
                self._next_try = time.monotonic() + FLUSH_S
                self._attempt(self._flush)
            self._also(lines)
        self._attempt(self._finish)

    def _also(self, lines: list[dict[str, Any]]) -> None:
        """What else new lines ask for: of a single run, nothing."""

    def _flush(self) -> None:
        client = self._client = self._client or MlflowClient(self._uri)
        if self.run_id is None:
            self.run_id = get_or_create_run(client, self._uri, self._name, entries(self._run))
        while self._pending:
            client.log_batch(self.run_id, metrics=self._pending[:BATCH])
            del self._pending[:BATCH]

    def _finish(self) -> None:
        result = sync_run(self._run, self._uri, self._name)
        self.run_id, self.artifacts = result["mlflow_run_id"], result["artifacts"]
        self._arrived = not result["missing"]

    def _attempt(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except (*TRACKING_ERRORS, StoreError) as error:
            self._tell(redact_password((str(error) or type(error).__name__).splitlines()[0])[:200])
            self._next_try = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return False
        self._pause_s = 1.0
        return True

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            print(
                f"tracking: {redact_password(self._uri)} does not answer ({reason}); "
                f"the run goes on, its {EVENT_LOG} keeps all, and `ray-app sync {self._name}` carries it over later",
                file=sys.stderr,
            )


def get_or_create_run(client: MlflowClient, uri: str, name: str, lines: list[dict[str, Any]]) -> str:
    """Id of the MLflow run of an event log: found by its key, else made. Its parameters and tags are brought over.

    `name`: where the run lies."""
    start = next(line for line in lines if line["kind"] == "run_started")
    experiment = experiment_id(client, TrackingFlags(tracking_uri=uri, experiment=start["experiment"]))
    run_id = run_of_key(client, start["key"], [experiment])
    if run_id is None:
        names = {KEY_TAG: start["key"], "event_log": name}
        run_id = client.create_run(experiment, run_name=start["name"], tags=names).info.run_id
    there = client.get_run(run_id).data
    # MLflow refuses another value for a parameter: those of the first start stay, later ones are in its tag.
    params = [Param(key, str(value)[:6000]) for key, value in start["params"].items() if key not in there.params]
    tags = dict(start["tags"])
    if parent := start.get("parent_key") and run_of_key(client, start["parent_key"], [experiment]):
        tags["mlflow.parentRunId"] = parent
    if starts := [line for line in lines if line["kind"] == "run_started"][1:]:
        tags["resumed"] = json.dumps([{"time": s["time"], "workers": s["workers"]} for s in starts])[:5000]
    changed = [RunTag(key, value) for key, value in tags.items() if there.tags.get(key) != value]
    if params or changed:
        client.log_batch(run_id, params=params, tags=changed)
    return run_id


def run_of_key(client: MlflowClient, key: str, experiments: list[str]) -> str | None:
    """Id of the MLflow run that carries this run key, or None."""
    found = client.search_runs(experiments, f"tags.{KEY_TAG} = '{key}'", max_results=1)
    return found[0].info.run_id if found else None


def sync_run(run: Path, uri: str, name: str = "") -> dict[str, Any]:
    """Brings the server to exactly what a run's event log holds; a second call changes nothing.

    `name`: where the run lies, if `run` is a copy. Compared is each point, by name, step, time and value. StoreError:
    no event log, or a damaged one. The errors of `TRACKING_ERRORS` pass: the server is away.
    """
    if not (run / EVENT_LOG).is_file():
        raise StoreError(f"{run} holds no {EVENT_LOG}: it is not the folder of a run that has begun")
    size = (run / EVENT_LOG).stat().st_size
    lines = entries(run)
    if not any(line["kind"] == "run_started" for line in lines):
        raise StoreError(f"{run} holds a {EVENT_LOG} without a start: nothing is known of the run")
    client = MlflowClient(uri)
    run_id = get_or_create_run(client, uri, name or str(run), lines)
    wanted = Counter(identity(point) for line in lines for point in to_metrics(line))
    absent = wanted - logged_metrics(client, run_id, wanted)
    rest = [Metric(key, value, at_ms, step) for key, step, at_ms, value in absent.elements()]
    for first in range(0, len(rest), BATCH):
        client.log_batch(run_id, metrics=rest[first : first + BATCH])
    there, info = logged_metrics(client, run_id, wanted), client.get_run(run_id).info
    if lines[-1]["kind"] == "run_ended":
        if lines[-1]["artifacts"]:
            upload_artifacts(client, run_id, run / lines[-1]["artifacts"])
        if info.status != lines[-1]["status"]:
            client.set_terminated(run_id, lines[-1]["status"])
    missing = (wanted - there).total()
    if not missing:
        write_file(
            run / MLFLOW_SYNC,
            json.dumps({"bytes": size, "uri": redact_password(uri), "mlflow_run_id": run_id}).encode(),
        )
    return {
        "run": name or str(run),
        "mlflow_run_id": run_id,
        "artifacts": info.artifact_uri,
        "points_in_log": wanted.total(),
        "points_server": there.total(),
        "points_sent": len(rest),
        "missing": missing,
        "extra": (there - wanted).total(),
    }


Identity = tuple[str, int, int, float]


def identity(point: Metric) -> Identity:
    """What makes a point: name, step, time in ms, value."""
    return point.key, point.step, point.timestamp, point.value


def logged_metrics(client: MlflowClient, run_id: str, wanted: Counter[Identity]) -> Counter[Identity]:
    """The points that the server holds under the names of the wanted ones."""
    names = sorted({key for key, *_ in wanted} & set(client.get_run(run_id).data.metrics))
    return Counter(identity(point) for name in names for point in client.get_metric_history(run_id, name))


def upload_artifacts(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Copies a checkpoint as artifact `checkpoint`, its list of checksums last; one that is there already stays."""
    if any(Path(item.path).name == CHECKSUMS_FILE for item in client.list_artifacts(run_id, ARTIFACTS)):
        return
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == CHECKSUMS_FILE, path.name)):
        client.log_artifact(run_id, str(path), ARTIFACTS)


def pending_runs(folder: Path) -> list[Path]:
    """Run folders in `folder` that have ended, and whose event log the server was not seen to hold."""
    found = []
    for path in sorted(folder.glob(f"*/{EVENT_LOG}")):
        try:
            done = json.loads((path.parent / MLFLOW_SYNC).read_text())["bytes"]
        except (OSError, ValueError, KeyError):
            done = 0
        if done != path.stat().st_size and b'{"kind": "run_ended"' in path.read_bytes()[-4096:]:
            found.append(path.parent)
    return found


def to_metrics(line: Mapping[str, Any]) -> list[Metric]:
    """The metrics of one event log line: every number of a step, a validation or an epoch, at its optimizer step.

    Of a sweep's event log: what each trial ended with, at the trial's number.
    """
    if line["kind"] == "trial_ended":
        found = {key: line[key] for key in TRIAL_POINTS if line[key] is not None}
        return [
            Metric(f"trial/{key}", value, int(line["ended_at"] * 1000), line["index"]) for key, value in found.items()
        ]
    prefix = {"step": "train", "validation": "validation", "epoch": "epoch"}.get(line["kind"])
    if prefix is None:
        return []
    at_ms, step = int(line["time"] * 1000), int(line["global_step"])
    values = flattened({k: v for k, v in line.items() if k not in ("kind", "time", "global_step")}, prefix)
    return [Metric(key, value, at_ms, step) for key, value in values.items()]


def flattened(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Nested numbers by names such as `epoch/val/cosine_accept_rate_0.80`; anything else is left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}_{key}" if prefix.endswith("cosine_accept_rate") else f"{prefix}/{key}"
        if isinstance(value, Mapping):
            flat |= flattened(value, name)
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat
