"""Working folder of a run or a sweep, and the place where it is kept: the folder itself, or a URI.

Objects can be neither appended to nor renamed, and nodes of a cluster need share no disk. So each process works in a
scratch folder and a `Mirror` copies: the event log is one object that is uploaded again every few seconds, a
checkpoint is uploaded once, and lease objects say which process drives the run and which one writes its event log.
The URI alone is the run: scratch folders go with their processes.
"""

import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ray_app.errors import StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.runs.event_log import EVENT_LOG
from ray_app.store.atomic import CHECKSUMS_FILE, disk_errors, verify_folder, write_file
from ray_app.store.checkpoint_transfer import download_dir, upload_dir
from ray_app.store.filesystem import LocalDir, RemoteDir, StorageDir

QUARANTINE = "quarantine"
DRIVER_LEASE, WRITER_LEASE = "driver.lease", "writer.lease"
SYNC_INTERVAL_S = 2.0
"""Time between two uploads of new event log lines, and between two downloads; a signal takes two of these at most."""
LEASE_S = 20.0
"""A driver whose lease is not renewed for so long is gone."""
PREFIX = "ray-app-copy-"
MIN_SCRATCH_AGE_S = 60.0
"""A younger scratch folder may belong to a process that has not locked it yet."""


class InPlace:
    """A run or sweep in its own folder on a disk: nothing is copied."""

    def __init__(self, path: Path) -> None:
        """`path`: its folder."""
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def storage(self) -> StorageDir:
        """The place where it is kept, from which another process resumes."""
        return LocalDir(self.path)

    def child(self, folder: str) -> RemoteDir | None:
        """Return the URI of a run in a sweep; None on a disk."""

    def pull(self) -> None:
        """Download new lines of the event log."""

    def push(self) -> None:
        """Upload new lines of the event log. StoreError: another process has taken over, or the upload fails."""

    def download_file(self, name: str) -> None:
        """Download a file. FileNotFoundError: there is none."""

    def upload_files(self, folder: Path) -> None:
        """Upload a file, or a folder with all that is in it."""

    def download(self, folder: str) -> None:
        """Download a folder with checksums, if there is one."""

    def upload(self, folder: str) -> None:
        """Upload a folder with checksums, if there is one."""

    def push_signals(self, *names: str) -> None:
        """Make the stored signal files those of the working folder."""

    def lease(self) -> AbstractContextManager[None]:
        """Drive it alone. StoreError: another process does."""
        return nullcontext()

    def writing(self, *_: str) -> AbstractContextManager[None]:
        """Upload the event log in the background, as its only writer, and download signals."""
        return nullcontext()

    def syncing(self, *_: str) -> AbstractContextManager[None]:
        """Download the event log in the background, and upload signals."""
        return nullcontext()

    def released(self) -> AbstractContextManager[None]:
        """Let another process write the event log in the meantime."""
        return nullcontext()

    def is_driven(self) -> bool | None:
        """Return True if a driver has renewed its lease; None on a disk, where there are no leases."""

    def delete(self, folder: str) -> None:
        """Delete a folder."""
        with disk_errors(self.path / folder):
            self.storage.delete(folder)

    def verify(self, folder: str) -> None:
        """Check all files of a folder against its checksums, after a download. CheckpointError names the bad one."""
        verify_folder(self.path / folder)

    def quarantine(self, folder: str) -> None:
        """Move a folder that must not be used to `quarantine/`; nothing is deleted."""
        path = self.path / folder
        with disk_errors(self.path):
            aside = self.path / QUARANTINE / f"{folder}-{path.stat().st_mtime_ns}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)


class Mirror(InPlace):
    """A scratch folder of this process, kept in step with a URI."""

    def __init__(self, path: Path, remote: RemoteDir) -> None:
        """`remote`: the place where the run is kept."""
        super().__init__(path)
        path.mkdir(parents=True, exist_ok=True)
        self.remote = remote
        self._sent = b""
        self._lock = threading.Lock()
        self._writer, self._driver = Lease(remote, WRITER_LEASE), Lease(remote, DRIVER_LEASE)

    def __str__(self) -> str:
        return self.remote.uri

    @property
    def storage(self) -> StorageDir:
        return self.remote

    def child(self, folder: str) -> RemoteDir:
        return RemoteDir(self.remote.uri_of(folder), self.remote.timeout_s)

    def pull(self) -> None:
        try:
            data = self.remote.read(EVENT_LOG)
        except FileNotFoundError:
            return  # the run has not started
        data, path = data[: data.rfind(b"\n") + 1], self.path / EVENT_LOG
        with self._lock, disk_errors(path):
            local = path.read_bytes() if path.is_file() else b""
            if data.startswith(local):
                with path.open("ab") as file:  # its reader has a position in it
                    file.write(data[len(local) :])
            elif not local.startswith(data):  # lines that a writer added after another had taken over
                write_file(path, data)

    def push(self) -> None:
        with self._lock:
            data = (self.path / EVENT_LOG).read_bytes()
            data = data[: data.rfind(b"\n") + 1]
            if data != self._sent:
                self._writer.require()
                self.remote.write(EVENT_LOG, data)
                self._sent = data

    def download_file(self, name: str) -> None:
        write_file(self.path / name, self.remote.read(name))

    def upload_files(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file():
                self.remote.write(str(path.relative_to(self.path)), path.read_bytes())

    def download(self, folder: str) -> None:
        with suppress(FileNotFoundError):
            if CHECKSUMS_FILE in self.remote.listdir(folder):
                download_dir(self.remote, folder, self.path / folder)

    def upload(self, folder: str) -> None:
        if (self.path / folder).is_dir():
            upload_dir(self.path / folder, self.remote, folder)

    def push_signals(self, *names: str) -> None:
        stored = self.remote.listdir()
        for name in names:
            if (self.path / name).exists() and name not in stored:
                self.remote.write(name, b"")
            elif name in stored and not (self.path / name).exists():
                self.remote.delete(name)

    def _pull_signals(self, *names: str) -> None:
        stored = self.remote.listdir()
        for name in names:
            if name in stored:
                (self.path / name).touch()
            else:
                (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def lease(self) -> Iterator[None]:
        self._driver.wait_for()
        try:
            with run_in_background(self._driver.renew):
                yield
        finally:
            self._driver.release()

    @contextmanager
    def writing(self, *signals: str) -> Iterator[None]:
        self._writer.take()
        self.pull()
        self._sent = b""
        try:
            with run_in_background(self.push, lambda: self._pull_signals(*signals)):
                yield
        finally:
            self.push()

    @contextmanager
    def syncing(self, *signals: str) -> Iterator[None]:
        try:
            with run_in_background(lambda: self.push_signals(*signals), self.pull):
                yield
        finally:
            self.pull()

    @contextmanager
    def released(self) -> Iterator[None]:
        self.push()
        try:
            yield
        finally:
            self._writer.take()
            self.pull()

    def is_driven(self) -> bool | None:
        return self._driver.is_fresh()

    def delete(self, folder: str) -> None:
        if CHECKSUMS_FILE in self.remote.listdir(folder):
            self.remote.delete(f"{folder}/{CHECKSUMS_FILE}")  # a deletion that breaks off leaves no checkpoint
        self.remote.delete(folder)
        shutil.rmtree(self.path / folder, ignore_errors=True)

    def verify(self, folder: str) -> None:
        download_dir(self.remote, folder, self.path / folder)

    def quarantine(self, folder: str) -> None:
        """Move its checksums to `quarantine/`: without them a later save does not take its files for its own."""
        with suppress(FileNotFoundError):
            sums = self.remote.read(f"{folder}/{CHECKSUMS_FILE}")
            self.remote.write(f"{QUARANTINE}/{folder}/{CHECKSUMS_FILE}", sums)
            self.remote.delete(f"{folder}/{CHECKSUMS_FILE}")
        shutil.rmtree(self.path / folder, ignore_errors=True)


class Lease:
    """An object that names the process with a right: to drive a run, or to write its event log."""

    def __init__(self, remote: RemoteDir, name: str) -> None:
        """`name`: the object's, below `remote`."""
        self._remote, self._name = remote, name
        self._holder = {"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex}

    def wait_for(self) -> None:
        """Take it from a process that does not renew it for `LEASE_S`. StoreError: it is renewed."""
        first, began = self._read(), time.monotonic()
        limit_s = LEASE_S if self.is_fresh() else 2 * SYNC_INTERVAL_S  # clocks of two machines may differ
        while (last := self._read()) is not None and last["token"] != self._holder["token"]:
            if last != first:
                raise StoreError(
                    f"{self._remote} is driven by process {last['process']} on {last['host']}; wait, or stop it"
                )
            if time.monotonic() - began > limit_s:
                break
            time.sleep(SYNC_INTERVAL_S / 2)
        self.take()

    def take(self) -> None:
        """Write it, also if another process has it."""
        self._remote.write(self._name, json.dumps({**self._holder, "renewed": time.time()}).encode())

    def require(self) -> None:
        """Raise StoreError if another process has taken it."""
        if (last := self._read()) is None or last["token"] != self._holder["token"]:
            raise StoreError(f"{self._remote} continues in another process, which has taken over; this one ends")

    def renew(self) -> None:
        """Write it again. StoreError: another process has taken it."""
        self.require()
        self.take()

    def release(self) -> None:
        """Delete it, if it is still this process's."""
        with suppress(StoreError):
            self.require()
            self._remote.delete(self._name)

    def is_fresh(self) -> bool:
        """Return True if a process has renewed it within `LEASE_S`, by this machine's clock."""
        last = self._read()
        return last is not None and time.time() - last["renewed"] < LEASE_S

    def _read(self) -> dict[str, Any] | None:
        try:
            return parse_object(self._remote.read(self._name))
        except FileNotFoundError:
            return None
        except ValueError as error:  # half-written, where the file system does not write whole objects
            raise StoreError(f"{self._remote.file(self._name)} cannot be read: {error}") from error


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """Make a scratch folder of this process, and delete those of processes that were killed."""
    parent = Path(tempfile.gettempdir())
    for old in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if old.stat().st_uid == os.getuid() and time.time() - old.stat().st_mtime > MIN_SCRATCH_AGE_S:
                with _locked(old):
                    shutil.rmtree(old)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name,
        _locked(Path(name)),
    ):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder. BlockingIOError: another process has."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def run_in_background(*actions: Callable[[], None]) -> Iterator[None]:
    """Run these every `SYNC_INTERVAL_S`; one that fails is tried again the next time."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(SYNC_INTERVAL_S):
            for action in actions:
                with suppress(StoreError, OSError):
                    action()

    thread = threading.Thread(target=run, name="mirror", daemon=True)
    thread.start()
    with ExitStack() as end:
        end.callback(thread.join)
        end.callback(stop.set)
        yield
