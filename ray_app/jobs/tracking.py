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
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from ray_app.config import TrackingFlags
from ray_app.errors import ConfigError
from ray_app.jobs.journal import follow

TRACKING_ERRORS = (MlflowException, RequestException, SQLAlchemyError, OSError)
"""What a tracking server that is away, slow or broken shows itself as."""
BATCH = 900
"""Points in one request; MLflow takes 1,000."""
LONGEST_PAUSE_S = 30.0
"""Between two tries to reach a server that is away."""


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
    """Carries a run's journal to MLflow from a thread of its own.

    Whatever goes wrong there is told once on standard error and tried again, less and less often; the run goes
    on, and the journal keeps every point.
    """

    def __init__(
        self, cfg: TrackingFlags, run: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        self._cfg, self._run, self._name, self._params, self._tags = cfg, run, name, params, tags
        self._stop = threading.Event()
        self._client: MlflowClient | None = None
        self._pending: list[Metric] = []
        self._told = False
        self._pause_s, self._next_try = 1.0, 0.0
        self.run_id: str | None = None
        self._attempt(self._ensure_run)
        self._thread = threading.Thread(target=self._carry, name="tracking", daemon=True)
        self._thread.start()

    def close(self, status: str, artifacts: Path | None = None) -> bool:
        """Carries the rest, copies `artifacts` as `checkpoint`, ends the run. Whether everything arrived."""
        self._stop.set()
        self._thread.join()
        self._next_try = 0.0

        def finish() -> None:
            run_id = self._ensure_run()
            assert self._client
            if artifacts is not None:
                self._client.log_artifacts(run_id, str(artifacts), "checkpoint")
            self._client.set_terminated(run_id, status)

        return self._attempt(self._flush) and self._attempt(finish)

    def _carry(self) -> None:
        for lines in follow(self._run, self._stop):
            for line in lines:
                self._pending += points(line)
            if self._pending and time.monotonic() >= self._next_try:
                self._attempt(self._flush)

    def _flush(self) -> None:
        run_id = self._ensure_run()
        assert self._client
        while self._pending:
            self._client.log_batch(run_id, metrics=self._pending[:BATCH])
            del self._pending[:BATCH]

    def _ensure_run(self) -> str:
        if self.run_id is None:
            self._client = MlflowClient(tracking_uri(self._cfg))
            run = self._client.create_run(
                experiment_id(self._client, self._cfg), run_name=self._name, tags={"journal": str(self._run)}
            )
            params = [Param(key, str(value)[:6000]) for key, value in self._params.items()]
            tags = [RunTag(key, value) for key, value in self._tags.items()]
            self._client.log_batch(run.info.run_id, params=params, tags=tags)
            self.run_id = run.info.run_id
        return self.run_id

    def _attempt(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except TRACKING_ERRORS as error:
            if not self._told:
                print(
                    f"tracking: {shown(tracking_uri(self._cfg))} does not answer "
                    f"({shown(str(error).splitlines()[0])[:200]}); the run goes on, and {self._run}/journal.jsonl keeps "
                    "every point",
                    file=sys.stderr,
                )
                self._told = True
            self._next_try = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return False
        self._pause_s = 1.0
        return True


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
