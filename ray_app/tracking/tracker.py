"""Mirrors a run's event log to MLflow from a background thread; training never waits for it.

Nor for its import: MLflow takes seconds to import, and the thread does that.
"""

import shlex
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_app.config.base import TrackingFlags
from ray_app.core.back_off import back_off_s
from ray_app.errors import RegistryError, StoreError
from ray_app.parsing.redact import redact
from ray_app.runs.event_log import EVENT_LOG, entries, tail
from ray_app.tracking.uri import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

FLUSH_S = 5.0
"""Time between two requests: each costs a core tens of milliseconds, which workers on a small machine would miss."""
MAX_PAUSE_S = 30.0
"""Longest pause between two tries to reach a server that is away."""
PATIENCE_S = 20.0
"""Longest wait at a run's end for a server that never answered."""


class Tracker:
    """Sends a run's event log to MLflow from its own thread, the only one that talks to the server.

    Training never waits for it. An error is printed once on standard error and the request is repeated, less and less
    often; the event log keeps every point, and `ray-app sync` sends them at any later time. A server that does not
    answer costs `PATIENCE_S` at the end of a run.
    """

    def __init__(self, cfg: TrackingFlags, run: Path, name: str = "") -> None:
        """`run`: its folder; `name`: the path or URI that `sync` takes, if that is another."""
        self._uri, self._run, self._name = tracking_uri(cfg), run, name or str(run)
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._warned = False
        self._failures, self._next_try = 0, 0.0
        self._complete = False
        self._stop = threading.Event()
        self.run_id: str | None = None
        self.artifacts: str | None = None
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)
        self._thread.start()

    def summary(self) -> dict[str, Any]:
        """Return the MLflow run, its server and its artifacts; None for what is unknown."""
        return {"mlflow_run_id": self.run_id, "tracking_uri": redact(self._uri), "artifacts": self.artifacts}

    def close(self) -> bool:
        """Send the rest, the artifacts and the run's end. Return True if the server has all of the event log."""
        self._stop.set()
        self._thread.join(None if self.run_id else PATIENCE_S)
        if self._thread.is_alive():
            self._warn("no answer in time")
        return self._complete

    def _follow(self) -> None:
        from ray_app.tracking.mlflow_logger import pending_runs, sync_run

        # A run at a URI works in a scratch folder: what is next to it is other people's.
        for earlier in pending_runs(self._run.parent) if self._name == str(self._run) else ():
            if earlier != self._run and not self._attempt(partial(sync_run, earlier, self._uri)):
                break  # the server is away: this run comes first
        self._attempt(self._send_new)
        self._attempt(self._finish)

    def _send_new(self) -> None:
        waiting = False
        for lines in tail(self._run, self._stop):
            waiting = waiting or bool(lines)
            if waiting and time.monotonic() >= self._next_try:
                self._next_try = time.monotonic() + FLUSH_S
                waiting = not self._attempt(self._flush)
            self._on_lines(lines)

    def _on_lines(self, lines: list[dict[str, Any]]) -> None:
        """Called with new lines; a sweep's tracker sends its trials here."""

    def _flush(self) -> None:
        from ray_app.tracking.mlflow_logger import connect, get_or_create_run, send_points, start_monitor

        client = self._client = self._client or connect(self._uri)
        if self.run_id is None:
            self.run_id = get_or_create_run(client, self._uri, self._name, entries(self._run))
            self._monitor = start_monitor(self.run_id, self._uri)
        send_points(client, self._run, self._uri, self.run_id)

    def _finish(self) -> None:
        from ray_app.tracking.mlflow_logger import sync_run

        if self._monitor:
            self._monitor.finish()
        result = sync_run(self._run, self._uri, self._name)
        self.run_id, self.artifacts = result["mlflow_run_id"], result["artifacts"]
        self._complete = True

    def _attempt(self, action: Callable[[], Any]) -> bool:
        from ray_app.tracking.mlflow_logger import TRACKING_ERRORS, failure_cause, is_away

        try:
            action()
        except (*TRACKING_ERRORS, RegistryError, StoreError) as error:
            self._warn(failure_cause(error), away=is_away(error))
            self._failures += 1
            self._next_try = time.monotonic() + back_off_s(self._failures, MAX_PAUSE_S)
            return False
        self._failures = 0
        return True

    def _warn(self, reason: str, *, away: bool = True) -> None:
        if not self._warned:
            self._warned = True
            problem = f" does not answer ({reason})" if away else f": {reason}"
            print(
                f"tracking: {redact(self._uri)}{problem}; the run continues, its {EVENT_LOG} keeps every point, and "
                f"`ray-app sync {shlex.quote(self._name)}` sends them later",
                file=sys.stderr,
            )
