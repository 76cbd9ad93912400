"""A run at a URI: each process works in a folder of its own, which this keeps in step with the URI.

Objects can be neither appended to nor renamed, and nodes of a cluster need share no disk. So the driver and every
worker have a copy of what they need; what a worker finishes goes up, and what
the others need comes down. The URI alone is the run: copies go with their processes, and the next start goes on from
what lies there.
"""

import fcntl
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_app.errors import CheckpointError, StoreError
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.remote_event_log import RemoteEventLog
from ray_app.runs.run_dir import (
    CHECKPOINTS,
    QUARANTINE,
    RESIZE,
    RUN,
    STATES,
    STOP,
    RunDir,
    run_metadata,
    validate_relative_path,
)
from ray_app.store.checkpoint import CHECKSUMS_FILE
from ray_app.store.checkpoint_transfer import download_dir, upload_dir
from ray_app.store.filesystem import LocalDir, RemoteDir, StorageDir, absolute, open_storage

SYNC_INTERVAL_S = 2.0
"""How often new event log lines go up, and come down to the driver; a sign takes two of these at most."""
STOP_S = 30.0
"""How long a run that is asked to stop is waited for, before its event log is taken over."""
PREFIX = "ray-app-copy-"
MIN_SCRATCH_AGE_S = 60.0
"""A copy of this age may belong to a process that has not marked it as its own yet."""


@contextmanager
def open_run(where: str) -> Iterator[RunDir]:
    """The run that a path or URI names, or will be there. A copy of one at a URI goes when the block ends."""
    there = open_storage(where)
    if isinstance(there, LocalDir):
        yield RunDir(there.path)
    elif isinstance(there, RemoteDir):
        with scratch_dir() as folder:
            yield RemoteRun(folder, there)


def settings_of_run(where: str) -> dict[str, Any]:
    """What the run that lies there was started with, as settings of `train`. StoreError: not a run."""
    return {**run_metadata(open_storage(where))["config"], "out": absolute(where)}


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """A folder of this process; those of processes that were killed go now."""
    parent = Path(tempfile.gettempdir())
    for old in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if old.stat().st_uid == os.getuid() and time.time() - old.stat().st_mtime > MIN_SCRATCH_AGE_S:
                with _held(old):
                    shutil.rmtree(old)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name,
        _held(Path(name)),
    ):
        yield Path(name)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """BlockingIOError: it is another process's."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def run_in_background(*acts: Callable[[], None]) -> Iterator[None]:
    """These again and again; what the store refuses is tried the next time, and by whoever needs it done."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(SYNC_INTERVAL_S):
            for act in acts:
                with suppress(StoreError, OSError):
                    act()

    thread = threading.Thread(target=run, name="exchange", daemon=True)
    thread.start()
    with ExitStack() as end:
        end.callback(thread.join)
        end.callback(stop.set)
        yield


@dataclass(frozen=True)
class RemoteRun(RunDir):
    """`path` is this process's copy of the run at `there`."""

    there: RemoteDir
    """Where the run lies."""
    _parts: RemoteEventLog = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", RemoteEventLog(self.path, self.there))

    def __str__(self) -> str:
        return self.there.uri

    @property
    def _there(self) -> StorageDir:
        return self.there

    def shown(self, path: Path) -> str:
        return self.there.uri_of(str(path.relative_to(self.path))) if path != self.path else str(self)

    def refresh(self) -> None:
        self._parts.pull()

    def create(self, about: Mapping[str, Any]) -> None:
        with suppress(FileNotFoundError):
            if self.there.listdir():
                raise StoreError(
                    f"--out {self.there} already holds something; name a new one, nothing is overwritten"
                )
        super().create(about)
        self.there.mkdir()
        self.there.write(RUN, (self.path / RUN).read_bytes())

    @property
    def claimed(self) -> bool:
        try:
            return RUN in self.there.listdir()
        except FileNotFoundError:
            return False

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        (self.path / RUN).write_bytes(json.dumps(self.metadata()).encode())
        with super().exclusive():
            yield

    def clear_signals(self) -> None:
        super().clear_signals()
        self._push_signs()

    def request_stop(self) -> None:
        """Who writes the event log has some time to save, and to end it."""
        super().request_stop()
        self._push_signs()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            self.refresh()
            if entries(self.path)[-1]["kind"] in ("stopped", "run_ended"):
                return
            time.sleep(SYNC_INTERVAL_S / 4)

    def metadata(self) -> dict[str, Any]:
        return run_metadata(self.there)

    @contextmanager
    def event_log(self) -> Iterator[EventLog]:
        self._parts.pull()
        with EventLog(self.path) as log:
            try:
                with run_in_background(self._parts.push, self._pull_signs):
                    yield log
            finally:
                self._parts.push()

    @contextmanager
    def synced(self) -> Iterator[None]:
        try:
            with run_in_background(self._push_signs, self._parts.pull):
                yield
        finally:
            self._parts.pull()

    @contextmanager
    def released(self, log: EventLog) -> Iterator[None]:
        self._parts.push()
        with super().released(log):
            try:
                yield
            finally:
                self._parts.pull()

    def download(self, *folders: str) -> None:
        for folder in map(validate_relative_path, folders):
            with suppress(FileNotFoundError):
                if CHECKSUMS_FILE in self.there.listdir(folder):
                    download_dir(self.there, folder, self.path / folder)

    def upload(self, folder: str) -> None:
        if (self.path / folder).is_dir():
            upload_dir(self.path / folder, self.there, folder)

    def save(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Steps up to here are told there before there is a place after them."""
        self._parts.push()
        super().save(name, *args, **kwargs)

    def prune_checkpoints(self, newest: str, best_epoch: int) -> None:
        for kind in (STATES, CHECKPOINTS):
            self.upload(f"{kind}/{newest}")
        super().prune_checkpoints(newest, best_epoch)

    def best(self) -> Path | None:
        path = super().best()
        return path and download_dir(self.there, str(path.relative_to(self.path)), path)

    def _drop(self, folder: str) -> None:
        if CHECKSUMS_FILE in self.there.listdir(folder):
            self.there.delete(f"{folder}/{CHECKSUMS_FILE}")  # what is left of it, should this break off, is none
        self.there.delete(folder)
        if (self.path / folder).is_dir():
            shutil.rmtree(self.path / folder)

    def _sound(self, folder: str) -> bool:
        try:
            download_dir(self.there, folder, self.path / folder)
        except CheckpointError as error:
            print(f"not gone on from: {error}", file=sys.stderr)
            with suppress(FileNotFoundError):  # without a list it is never taken for what a later save puts there
                sums = self.there.read(f"{folder}/{CHECKSUMS_FILE}")
                self.there.mkdir(f"{QUARANTINE}/{folder}")
                self.there.write(f"{QUARANTINE}/{folder}/{CHECKSUMS_FILE}", sums)
                self.there.delete(f"{folder}/{CHECKSUMS_FILE}")
            return False
        return True

    def _push_signs(self) -> None:
        there = self.there.listdir()
        for sign in (STOP, RESIZE):
            if (self.path / sign).exists() and sign not in there:
                self.there.write(sign, b"")
            elif sign in there and not (self.path / sign).exists():
                self.there.delete(sign)

    def _pull_signs(self) -> None:
        there = self.there.listdir()
        for sign in (STOP, RESIZE):
            if sign in there:
                (self.path / sign).touch()
            else:
                (self.path / sign).unlink(missing_ok=True)
