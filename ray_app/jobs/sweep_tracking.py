"""A sweep at the tracking server: its own run, and one nested in it for each trial, all out of journals."""

from functools import partial
from pathlib import Path
from typing import Any

from ray_app.config.base import TrackingFlags
from ray_app.jobs.journal import JOURNAL
from ray_app.jobs.sweep_folder import SweepFolder
from ray_app.jobs.tracking import Tracker, sync_run


class SweepTracker(Tracker):
    """Carries the sweep's journal as a run's; and each trial's, once that has ended.

    A trial's points come when it ends and not as they happen: one request more for each step would be felt on a small
    machine. `ray-app tune --watch` shows trials live.
    """

    def __init__(self, cfg: TrackingFlags, sweep: Path) -> None:
        self._folder = SweepFolder(sweep)
        self._ended: list[Path] = []
        super().__init__(cfg, sweep)

    def _also(self, lines: list[dict[str, Any]]) -> None:
        ended = [self._folder.run(line["name"]).path for line in lines if line["kind"] == "ended"]
        self._ended += [run for run in ended if (run / JOURNAL).is_file()]  # a trial that was refused never began
        while self.run_id and self._ended and self._attempt(partial(sync_run, self._ended[0], self._uri)):
            del self._ended[0]
