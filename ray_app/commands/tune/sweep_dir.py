"""A sweep: what it is, its event log, and a run for each trial. This record is all that it is.

    sweep.json  events.jsonl  trials/trial_0007-1f3a…/  final/trial_0007-1f3a…/seed_0/  sweep.html

Kinds in the event log: `run_started` (one per driver), `trial_created` (a setting is tried), `trial_process_died`
(and is started again), `trial_ended` (its result), `final_seed` (one seed's numbers on the test part), `run_ended`. A
trial's own progress is in its own event log.
"""

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_app.commands.tune.trials import Trial
from ray_app.config.tune import TuneConfig
from ray_app.errors import StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries, is_locked
from ray_app.runs.mirror import DRIVER_LEASE, Mirror
from ray_app.runs.run_dir import RunDir
from ray_app.store.atomic import disk_errors, write_file
from ray_app.store.filesystem import LocalDir, RemoteDir, StorageDir, absolute, open_storage
from ray_app.store.scratch import scratch_dir

SWEEP, PAGE = "sweep.json", "sweep.html"
SWEEP_HANDOVER_S = 5.0
"""How long a driver waits for the one before it, which may have just been killed."""
RUNS = ("trials/*", "final/*/*")
"""Patterns of run folders in a sweep."""
RUN_OF_SWEEP = re.compile(r"(trials|final)/[A-Za-z0-9_-]+(/seed_\d+)?")


@contextmanager
def open_sweep(where: str) -> Iterator["SweepDir"]:
    """Yield the sweep that a path or URI names, started or not; delete the scratch folder of one at a URI after."""
    storage = open_storage(where)
    if isinstance(storage, LocalDir):
        yield SweepDir(storage.path)
    else:
        with scratch_dir() as folder:
            yield SweepDir(folder, storage)


class SweepDir:
    """Folder of a sweep: `sweep.json`, the event log and the runs below `path`."""

    def __init__(self, path: Path, remote: RemoteDir | None = None) -> None:
        """`path`: the sweep's folder, or a scratch folder where the sweep is kept at `remote`."""
        self.path = path
        self.mirror = Mirror(path, remote)

    def __str__(self) -> str:
        """Return the path or URI that `--resume` and `--watch` take."""
        return str(self.mirror)

    @property
    def name(self) -> str:
        """Last part of the path or URI."""
        return str(self.mirror.storage).rpartition("/")[2]

    @property
    def resume(self) -> str:
        """Command that resumes the sweep."""
        return f"ray-app tune --resume {shlex.quote(str(self))}"

    def shown(self, path: Path) -> str:
        """Return the path or URI of a file or folder of the sweep, valid on every machine."""
        return str(self) if path == self.path else self.mirror.storage.uri_of(str(path.relative_to(self.path)))

    def refresh(self) -> None:
        """Download the sweep so far. StoreError: there is none, or it names a run outside of it."""
        if self.mirror.remote is None:
            return
        try:
            self.mirror.download_file(SWEEP)
        except FileNotFoundError as error:
            raise StoreError(f"{self.mirror.storage} is not the folder of a sweep: it has no {SWEEP}") from error
        self.mirror.pull()
        if not (self.path / EVENT_LOG).is_file():
            return  # it is about to start
        lines = self.entries()
        ended = {line["name"] for line in lines if line["kind"] == "trial_ended"}
        for line in lines:
            if line["kind"] == "final_seed":
                self._run(line["run"]).refresh()
            elif line["kind"] == "trial_created":
                run = self.run(line["name"])
                if line["name"] not in ended or not (run.path / EVENT_LOG).is_file():
                    run.refresh()

    def download_artifacts(self) -> None:
        """Download the checkpoints of its final runs, for the tracking server."""
        for path in self.runs("final/*/*"):
            if (artifacts := entries(path)[-1].get("artifacts")) is not None:
                self._run(str(path.relative_to(self.path))).download(artifacts)

    def upload(self, folder: Path) -> None:
        """Upload files that were made in `path`."""
        self.mirror.upload_files(folder)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the sweep."""
        write_file(self.path / name, data)
        self.mirror.upload_files(self.path / name)

    def files(self) -> list[str]:
        """Return paths or URIs of its record and its page."""
        names = sorted(self.mirror.storage.listdir())
        return [self.shown(self.path / name) for name in names if name.startswith((SWEEP, EVENT_LOG, PAGE))]

    def require_free(self) -> None:
        """Raise StoreError if anything is in the way of a new sweep."""
        try:
            names = self.mirror.storage.listdir()
        except FileNotFoundError:
            return
        except NotADirectoryError:
            names = {self.name}
        names = {name for name in names if not name.startswith(DRIVER_LEASE)}
        if SWEEP in names:
            raise StoreError(f"{self} holds a sweep already; resume it with `{self.resume}`, or name another `out`")
        if names:
            raise StoreError(f"{self} already holds something; name a new folder for the sweep")

    def create(self, metadata: Mapping[str, Any]) -> None:
        """Start a sweep here. StoreError if anything is in the way; nothing is deleted.

        Of several that start at one moment, the one that locks the event log first has the folder.
        """
        self.require_free()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with EventLog(self.path, patience_s=0.0):
            if (self.path / SWEEP).is_file():
                self.require_free()
            self.write(SWEEP, json.dumps(dict(metadata), indent=1).encode())

    @contextmanager
    def exclusive(self, created: Mapping[str, Any] | None = None) -> Iterator[EventLog]:
        """Open the sweep's event log for its one driver; start the sweep first with the metadata `created`.

        StoreError: another process drives the sweep.
        """
        with self.mirror.lease():
            if created is not None:
                self.create(created)
            with self.mirror.writing(), EventLog(self.path, SWEEP_HANDOVER_S) as log:
                yield log

    def has_driver(self) -> bool:
        """Return True if a driver holds the event log, or at a URI has renewed its lease."""
        driven = self.mirror.is_driven()
        return is_locked(self.path) if driven is None else driven

    def metadata(self) -> dict[str, Any]:
        """Return what it was started with: `name`, `key`, `created`, `config`, `store_fingerprint`, `data`.

        StoreError: no sweep.
        """
        return sweep_metadata(LocalDir(self.path), str(self))

    @property
    def config(self) -> TuneConfig:
        """Settings that the sweep was started with."""
        return TuneConfig.model_validate({**self.metadata()["config"], "out": str(self)})

    def entries(self) -> list[dict[str, Any]]:
        """Lines of the sweep's event log. StoreError: it is missing, or a line is damaged."""
        if not (self.path / EVENT_LOG).is_file():
            raise StoreError(
                f"{self.shown(self.path / EVENT_LOG)} is missing: it is the record of what was tried, and "
                "the sweep cannot be resumed without it. Restore it from a copy, or start a new sweep."
            )
        return entries(self.path)

    def runs(self, *patterns: str) -> list[Path]:
        """Run folders that have an event log, of all RUNS or of these patterns."""
        return sorted(
            path.parent for pattern in patterns or RUNS for path in self.path.glob(f"{pattern}/{EVENT_LOG}")
        )

    def used_seconds(self) -> float:
        """Seconds of search of all starts but the newest: each from its start to the last event before the next."""
        starts = [line["time"] for line in self.entries() if line["kind"] == "run_started"]
        folders = (self.path, *self.runs("trials/*"))
        times = [line["time"] for folder in folders for line in entries(folder) if "time" in line]
        return sum(
            max(moment for moment in times if begin_s <= moment < next_s) - begin_s
            for begin_s, next_s in itertools.pairwise(starts)
        )

    def run(self, name: str) -> RunDir:
        """Run folder of a trial."""
        return self._run(f"trials/{name}")

    def final(self, name: str, seed: int) -> RunDir:
        """Run folder of one seed of the final training of a trial's setting."""
        return self._run(f"final/{name}/seed_{seed}")

    def _run(self, folder: str) -> RunDir:
        if not RUN_OF_SWEEP.fullmatch(folder):  # read from a file
            raise StoreError(f"{self} is damaged: its event log names {folder!r}, which is no run of a sweep")
        return RunDir(self.path / folder, self.mirror.child(folder))

    def trials(self) -> list[Trial]:
        """All trials by number; the state of those that have not ended is read from their own event logs."""
        objective = self.config.objective
        recorded: dict[str, Trial] = {}
        for line in self.entries():
            if line["kind"] in ("trial_created", "trial_ended"):
                recorded[line["name"]] = Trial.recorded(line)
        return [trial if trial.ended_at else self.current(trial, objective) for trial in recorded.values()]

    def kept_checkpoint(self, name: str) -> str | None:
        """Folder in the sweep of a trial's best checkpoint, if it is kept."""
        best = self.run(name).best_on_disk
        return best and f"trials/{name}/{best}"

    def current(self, trial: Trial, objective: str) -> Trial:
        """Return a trial as its own event log has it; unchanged if it has not started."""
        run = self.run(trial.name)
        run.refresh()
        return trial.after(entries(run.path), objective) if (run.path / EVENT_LOG).is_file() else trial


def sweep_metadata(storage: StorageDir, name: str) -> dict[str, Any]:
    """Return what a sweep was started with; `name`: its path or URI. StoreError: not a sweep."""
    try:
        return parse_object(storage.read(SWEEP))
    except (OSError, ValueError) as error:
        raise StoreError(f"{name} is not the folder of a sweep: {SWEEP} cannot be read ({error})") from error


def settings_of_sweep(where: str) -> dict[str, Any]:
    """Return the settings of `tune` that a sweep was started with. StoreError: not a sweep."""
    return {**sweep_metadata(open_storage(where), where)["config"], "out": absolute(where)}
