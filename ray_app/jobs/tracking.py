"""MLflow, on the driver's side: what stands in a run's journal, in a database, and never in training's way."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from ray_app.config import TrackingFlags
from ray_app.errors import ConfigError
from ray_app.jobs.journal import follow

TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a tracking server that is away, slow or broken shows itself as; the errors of requests are OSErrors."""
BATCH = 900
"""Points in one request; MLflow takes 1,000."""
LONGEST_PAUSE_S = 30.0
"""Between two tries to reach a server that is away."""
PATIENCE_S = 20.0
"""For a server that is silent, at a run's start and at its end."""


def tracking_uri(cfg: TrackingFlags) -> str:
    """The server or database of a command, with an absolute path where it is a file. ConfigError: a file store."""
    uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if urlparse(uri).scheme in ("", "file"):
        raise ConfigError(f"--tracking-uri {uri} is a folder, which MLflow no longer keeps up; use sqlite:///FILE.db")
    if match := re.fullmatch(r"sqlite:///(?!/)(.+)", uri):
        uri = f"sqlite:///{Path(match[1]).absolute()}"
    return uri


def shown(text: str) -> str:
    """A tracking URI, or a text with one, without its password."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def experiment_id(client: MlflowClient, cfg: TrackingFlags) -> str:
    """The experiment, made where there is none; the artifacts of a database file lie beside it."""
    found = client.get_experiment_by_name(cfg.experiment)
    if found is not None:
        return found.experiment_id
    uri = tracking_uri(cfg)
    beside = None
    if uri.startswith("sqlite:////"):
        folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / cfg.experiment
        beside = folder.as_uri()
    return client.create_experiment(cfg.experiment, artifact_location=beside)


class Tracker:
    """Carries a run's journal to MLflow from a thread of its own, which alone speaks to the server.

    Whatever goes wrong there is told once on standard error and tried again, less and less often; the run goes
    on, and the journal keeps every point. A server that does not answer costs `PATIENCE_S` at the start and at
    the end.
    """

    def __init__(
        self, cfg: TrackingFlags, run: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        self._uri, self._cfg, self._run, self._name = tracking_uri(cfg), cfg, run, name
        self._params, self._tags = params, tags
        self._client: MlflowClient | None = None
        self._created: str | None = None
        self._pending: list[Metric] = []
        self._told = False
        self._pause_s, self._next_try = 1.0, 0.0
        self._status = "FAILED"
        self._artifacts: Path | None = None
        self._arrived = False
        self._tried, self._stop = threading.Event(), threading.Event()
        self.run_id: str | None = None
        self._thread = threading.Thread(target=self._carry, name="tracking", daemon=True)
        self._thread.start()
        self._tried.wait(PATIENCE_S)

    def close(self, status: str, artifacts: Path | None = None) -> bool:
        """Carries the rest, copies `artifacts` as `checkpoint`, ends the run. Whether everything arrived."""
        self._status, self._artifacts = status, artifacts
        self._stop.set()
        self._thread.join(None if self.run_id else PATIENCE_S)
        if self._thread.is_alive():
            self._tell("no answer in time")
        return self._arrived

    def _carry(self) -> None:
        self._attempt(self._ensure_run)
        self._tried.set()
        for lines in follow(self._run, self._stop):
            for line in lines:
                self._pending += points(line)
            if self._pending and time.monotonic() >= self._next_try:
                self._attempt(self._flush)
        self._arrived = self._attempt(self._flush) and self._attempt(self._finish)

    def _ensure_run(self) -> tuple[MlflowClient, str]:
        client = self._client = self._client or MlflowClient(self._uri)
        if self._created is None:
            journal = {"journal": str(self._run)}
            made = client.create_run(experiment_id(client, self._cfg), run_name=self._name, tags=journal)
            self._created = made.info.run_id
        if self.run_id is None:
            params = [Param(key, str(value)[:6000]) for key, value in self._params.items()]
            tags = [RunTag(key, value) for key, value in self._tags.items()]
            client.log_batch(self._created, params=params, tags=tags)
            self.run_id = self._created
        return client, self.run_id

    def _flush(self) -> None:
        client, run_id = self._ensure_run()
        while self._pending:
            client.log_batch(run_id, metrics=self._pending[:BATCH])
            del self._pending[:BATCH]

    def _finish(self) -> None:
        client, run_id = self._ensure_run()
        if self._artifacts is not None:
            client.log_artifacts(run_id, str(self._artifacts), "checkpoint")
        client.set_terminated(run_id, self._status)

    def _attempt(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except TRACKING_ERRORS as error:
            self._tell(shown((str(error) or type(error).__name__).splitlines()[0])[:200])
            self._next_try = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return False
        self._pause_s = 1.0
        return True

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            print(
                f"tracking: {shown(self._uri)} does not answer ({reason}); the run goes on, and "
                f"{self._run}/journal.jsonl keeps every point",
                file=sys.stderr,
            )


def points(line: Mapping[str, Any]) -> list[Metric]:
    """The metrics of one journal line: every number of a step or an epoch, at its optimizer step."""
    if line["kind"] not in ("step", "epoch"):
        return []
    prefix = "train" if line["kind"] == "step" else "epoch"
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
