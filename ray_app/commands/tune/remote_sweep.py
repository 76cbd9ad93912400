"""A sweep at a URI: the driver has a copy of its event logs, and each trial is a run at `URI/trials/NAME`.

Nodes need share no disk: a trial's process and the driver meet at the URI alone, as those of one run do
(`run_copy.py`). What the driver was killed with is gone; the next one goes on from what lies there.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray_app.commands.tune.sweep_dir import HANDOVER_S, SWEEP, SweepDir
from ray_app.errors import StoreError
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries
from ray_app.runs.remote_event_log import RemoteEventLog
from ray_app.runs.remote_run import RemoteRun, run_in_background, scratch_dir
from ray_app.runs.run_dir import RunDir
from ray_app.store.filesystem import LocalDir, RemoteDir, StorageDir, open_storage

RUN_OF_SWEEP = re.compile(r"(trials|final)/[A-Za-z0-9_-]+(/seed_\d+)?")


@contextmanager
def open_sweep(where: str) -> Iterator[SweepDir]:
    """The sweep that a path or URI names, or will be there. A copy of one at a URI goes when the block ends."""
    there = open_storage(where)
    if isinstance(there, LocalDir):
        yield SweepDir(there.path)
    elif isinstance(there, RemoteDir):
        with scratch_dir() as folder:
            yield RemoteSweep(folder, there)


@dataclass(frozen=True)
class RemoteSweep(SweepDir):
    """`path` is this process's copy of the sweep at `there`."""

    there: RemoteDir
    """Where the sweep lies."""
    _parts: RemoteEventLog = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", RemoteEventLog(self.path, self.there))

    def __str__(self) -> str:
        return self.there.uri

    @property
    def name(self) -> str:
        return str(self.there).rpartition("/")[2]

    @property
    def _there(self) -> StorageDir:
        return self.there

    def shown(self, path: Path) -> str:
        return self.there.uri_of(str(path.relative_to(self.path)))

    def refresh(self) -> None:
        try:
            (self.path / SWEEP).write_bytes(self.there.read(SWEEP))
        except FileNotFoundError as error:
            raise StoreError(f"{self.there} is not the folder of a sweep: it has no {SWEEP}") from error
        self._parts.pull()
        if not (self.path / EVENT_LOG).is_file():
            return  # it is about to begin
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
        for path in self.runs("final/*/*"):
            if (artifacts := entries(path)[-1].get("artifacts")) is not None:
                self._run(str(path.relative_to(self.path))).download(artifacts)

    def upload(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.there.write(str(path.relative_to(self.path)), path.read_bytes())

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        self.there.mkdir()
        self.there.write(name, data)

    def has_driver(self) -> bool:
        """Nobody can tell from afar: what is quiet may be a long epoch."""
        return True

    @contextmanager
    def exclusive(self) -> Iterator[EventLog]:
        self._parts.pull()
        with EventLog(self.path, HANDOVER_S) as log:
            try:
                with run_in_background(self._parts.push):
                    yield log
            finally:
                self._parts.push()

    def _run(self, folder: str) -> RunDir:
        if not RUN_OF_SWEEP.fullmatch(folder):  # as others have written it
            raise StoreError(f"{self.there} is damaged: its event log names {folder!r}, which is no run of a sweep")
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        return RemoteRun(self.path / folder, RemoteDir(self.there.uri_of(folder), self.there.patience_s))
