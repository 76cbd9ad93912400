"""A sweep at the tracking server: its own run, and one nested in it for each trial, all out of event logs."""

from functools import partial
from typing import Any

from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.config.base import TrackingFlags
from ray_app.runs.event_log import EVENT_LOG
from ray_app.runs.run_dir import RunDir
from ray_app.tracking.mlflow_logger import Tracker, sync_run


class SweepTracker(Tracker):
    """Carries the sweep's event log as a run's; and each trial's, once that has ended.

    A trial's points come when it ends and not as they happen: one request more for each step would be felt on a small
    machine. `ray-app tune --watch` shows trials live.
    """

    def __init__(self, cfg: TrackingFlags, sweep: SweepDir) -> None:
        self._folder = sweep
        self._ended: list[RunDir] = []
        super().__init__(cfg, sweep.path, str(sweep))

    def _on_lines(self, lines: list[dict[str, Any]]) -> None:
        ended = [self._folder.run(line["name"]) for line in lines if line["kind"] == "trial_ended"]
        self._ended += [run for run in ended if (run.path / EVENT_LOG).is_file()]  # one that was refused never began
        while self.run_id and self._ended and self._attempt(partial(self._sync, self._ended[0])):
            del self._ended[0]

    def _sync(self, run: RunDir) -> None:
        sync_run(run.path, self._uri, str(run))
