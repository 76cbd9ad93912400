"""A sweep at a URI: the driver has a copy of its journals, and each trial is a run at `URI/trials/NAME`.

Nodes need share no disk: a trial's process and the driver meet at the URI alone, as those of one run do
(`run_copy.py`). What the driver was killed with is gone; the next one goes on from what lies there.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray_app.commands.tune.sweep_dir import HANDOVER_S, SWEEP, SweepFolder
from ray_app.errors import StoreError
from ray_app.runs.event_log import JOURNAL, Journal, entries
from ray_app.runs.remote_event_log import JournalParts
from ray_app.runs.remote_run import RunCopy, meanwhile, own_folder
from ray_app.runs.run_dir import RunFolder
from ray_app.store.filesystem import Disk, ObjectStore, Place, place

RUN_OF_SWEEP = re.compile(r"(trials|final)/[A-Za-z0-9_-]+(/seed_\d+)?")


@contextmanager
def sweep_at(where: str) -> Iterator[SweepFolder]:
    """The sweep that a path or URI names, or will be there. A copy of one at a URI goes when the block ends."""
    there = place(where)
    if isinstance(there, Disk):
        yield SweepFolder(there.path)
    elif isinstance(there, ObjectStore):
        with own_folder() as folder:
            yield SweepCopy(folder, there)


@dataclass(frozen=True)
class SweepCopy(SweepFolder):
    """`path` is this process's copy of the sweep at `there`."""

    there: ObjectStore
    """Where the sweep lies."""
    _parts: JournalParts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", JournalParts(self.path, self.there))

    def __str__(self) -> str:
        return self.there.uri

    @property
    def name(self) -> str:
        return str(self.there).rpartition("/")[2]

    @property
    def _there(self) -> Place:
        return self.there

    def shown(self, path: Path) -> str:
        return self.there.below(str(path.relative_to(self.path)))

    def pull(self) -> None:
        try:
            (self.path / SWEEP).write_bytes(self.there.read(SWEEP))
        except FileNotFoundError as error:
            raise StoreError(f"{self.there} is not the folder of a sweep: it has no {SWEEP}") from error
        self._parts.pull()
        if not (self.path / JOURNAL).is_file():
            return  # it is about to begin
        lines = self.entries()
        ended = {line["name"] for line in lines if line["kind"] == "ended"}
        for line in lines:
            if line["kind"] == "final":
                self._run(line["run"]).pull()
            elif line["kind"] == "trial":
                run = self.run(line["name"])
                if line["name"] not in ended or not (run.path / JOURNAL).is_file():
                    run.pull()

    def bring_artifacts(self) -> None:
        for path in self.runs("final/*/*"):
            if (artifacts := entries(path)[-1].get("artifacts")) is not None:
                self._run(str(path.relative_to(self.path))).bring(artifacts)

    def publish(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.there.write(str(path.relative_to(self.path)), path.read_bytes())

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        self.there.make()
        self.there.write(name, data)

    def has_driver(self) -> bool:
        """Nobody can tell from afar: what is quiet may be a long epoch."""
        return True

    @contextmanager
    def driven(self) -> Iterator[Journal]:
        self._parts.pull()
        with Journal(self.path, HANDOVER_S) as journal:
            try:
                with meanwhile(self._parts.push):
                    yield journal
            finally:
                self._parts.push()

    def _run(self, folder: str) -> RunFolder:
        if not RUN_OF_SWEEP.fullmatch(folder):  # as others have written it
            raise StoreError(f"{self.there} is damaged: its journal names {folder!r}, which is no run of a sweep")
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        return RunCopy(self.path / folder, ObjectStore(self.there.below(folder), self.there.patience_s))
