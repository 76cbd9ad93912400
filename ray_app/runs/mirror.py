"""Working folder of a run or a sweep, and the place where it is kept: the folder itself, or a URI.

Objects can be neither appended to nor renamed, and nodes of a cluster need share no disk. So each process works in a
scratch folder and a `Mirror` copies: the event log is one object of its writer that is uploaded again every few
seconds, and a checkpoint is uploaded once. `succession.py` says which process drives the run, and which one writes.
The URI alone is the run: scratch folders go with their processes.
"""

import itertools
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_app.runs.event_log import EVENT_LOG
from ray_app.runs.signals import handle_signals
from ray_app.runs.succession import Lease, Successors, TakenOver, run_in_background
from ray_app.store.atomic import CHECKSUMS_FILE, disk_errors, verify_folder, write_file
from ray_app.store.checkpoint_transfer import download_dir, upload_dir
from ray_app.store.filesystem import LocalDir, RemoteDir, StorageDir

QUARANTINE = "quarantine"
DRIVER_LEASE = "driver.lease"


class Mirror:
    """The folder of a run or sweep, kept in step with a URI if it has one. On a disk nothing is copied."""

    def __init__(self, path: Path, remote: RemoteDir | None = None) -> None:
        """`path`: the run's folder, or a scratch folder of this process where the run is kept at `remote`."""
        self.path, self.remote = path, remote
        self._sent = b""
        self._lock = threading.Lock()
        self._lost: TakenOver | None = None
        if remote:
            path.mkdir(parents=True, exist_ok=True)
            self._logs = Successors(remote, EVENT_LOG)

    def __str__(self) -> str:
        """Return the path or URI that commands take."""
        return self.remote.uri if self.remote else str(self.path)

    @property
    def storage(self) -> StorageDir:
        """Place where it is kept, from which another process resumes."""
        return self.remote or LocalDir(self.path)

    def child(self, folder: str) -> RemoteDir | None:
        """Return the URI of a run in a sweep; None on a disk."""
        return self.remote and RemoteDir(self.remote.uri_of(folder), self.remote.timeout_s)

    def pull(self) -> None:
        """Download new lines of the event log."""
        if self.remote:
            data = whole_lines(self._logs.read())
            with self._lock:
                local = self._local_log()
                if not local.startswith(data):
                    self._set_log(local, data)

    def push(self) -> None:
        """Upload new lines of the event log. TakenOver: another process writes it now."""
        if self.remote:
            with self._lock:
                data = whole_lines(self._local_log())
                if data == self._sent:
                    self._logs.require()
                else:
                    self._logs.write(data)
                    self._sent = data

    def download_file(self, name: str) -> None:
        """Download a file. FileNotFoundError: there is none."""
        if self.remote:
            write_file(self.path / name, self.remote.read(name))

    def upload_files(self, folder: Path) -> None:
        """Upload a file, or a folder with all that is in it."""
        if self.remote:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
                if path.is_file():
                    self.remote.write(str(path.relative_to(self.path)), path.read_bytes())

    def download(self, folder: str) -> None:
        """Download a folder with checksums, if there is one."""
        with suppress(FileNotFoundError):
            if self.remote and CHECKSUMS_FILE in self.remote.listdir(folder):
                download_dir(self.remote, folder, self.path / folder)

    def upload(self, folder: str) -> None:
        """Upload a folder with checksums, if there is one."""
        if self.remote and (self.path / folder).is_dir():
            upload_dir(self.path / folder, self.remote, folder)

    def push_signals(self, *names: str) -> None:
        """Make the stored signal files those of the working folder, if this process still drives the run."""
        if not self.remote or self._lost:
            return
        stored = self.remote.listdir()
        for name in names:
            if (self.path / name).exists() and name not in stored:
                self.remote.write(name, b"")
            elif name in stored and not (self.path / name).exists():
                self.remote.delete(name)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Drive it alone. StoreError: another process does. TakenOver: one does now; the block is interrupted."""
        if not self.remote:
            yield
            return
        driver, thread = Lease(self.remote, DRIVER_LEASE), threading.current_thread()

        def renew() -> None:
            try:
                driver.renew()
            except TakenOver as error:
                if not self._lost and thread is threading.main_thread():
                    signal.pthread_kill(thread.ident or 0, signal.SIGINT)
                self._lost = error

        driver.take()
        # A script's background process ignores SIGINT; this one must arrive all the same.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        try:
            with handle_signals({signal.SIGINT: _interrupt if ignored else None}), run_in_background(renew):
                yield
        except BaseException:
            if self._lost:
                raise self._lost from None
            raise
        finally:
            driver.release()
        if self._lost:
            raise self._lost

    @contextmanager
    def writing(self, *signal_files: str) -> Iterator[None]:
        """Upload the event log in the background, as its only writer, and download signals.

        If another process takes over, the signals ask for an end, and the save that it begins with is refused.
        """
        if not self.remote:
            yield
            return

        def exchange() -> None:
            try:
                self.push()
                stored = self.storage.listdir()
            except TakenOver:
                stored = set(signal_files)
            for name in signal_files:
                if name in stored:
                    (self.path / name).touch()
                else:
                    (self.path / name).unlink(missing_ok=True)

        self._take_log()
        try:
            with run_in_background(exchange):
                yield
        finally:
            self.push()

    @contextmanager
    def syncing(self, *signal_files: str) -> Iterator[None]:
        """Download the event log in the background, and upload signals."""
        if not self.remote:
            yield
            return
        try:
            with run_in_background(lambda: self.push_signals(*signal_files), self.pull):
                yield
        finally:
            self.pull()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let another process write the event log in the meantime."""
        self.push()
        try:
            yield
        finally:
            self._take_log()

    def is_driven(self) -> bool | None:
        """Return True if a driver has renewed its lease; None on a disk, where there are no leases."""
        return Lease(self.remote, DRIVER_LEASE).is_fresh() if self.remote else None

    def delete(self, folder: str) -> None:
        """Delete a folder, its checksums first: a deletion that breaks off leaves no checkpoint."""
        with disk_errors(self.path / folder):
            if CHECKSUMS_FILE in self.storage.listdir(folder):
                self.storage.delete(f"{folder}/{CHECKSUMS_FILE}")
            self.storage.delete(folder)
            shutil.rmtree(self.path / folder, ignore_errors=True)  # the copy of what was kept at a URI

    def verify(self, folder: str) -> None:
        """Check all files of a folder against its checksums, after a download. CheckpointError names the bad one."""
        if self.remote:
            download_dir(self.remote, folder, self.path / folder)
        else:
            verify_folder(self.path / folder)

    def quarantine(self, folder: str) -> None:
        """Move a folder that must not be used to `quarantine/`; nothing is deleted on a disk.

        At a URI its checksums move: without them a later save does not take its files for its own.
        """
        path = self.path / folder
        if self.remote:
            with suppress(FileNotFoundError):
                sums = self.remote.read(f"{folder}/{CHECKSUMS_FILE}")
                self.remote.write(f"{QUARANTINE}/{folder}/{CHECKSUMS_FILE}", sums)
                self.remote.delete(f"{folder}/{CHECKSUMS_FILE}")
            shutil.rmtree(path, ignore_errors=True)
        else:
            with disk_errors(self.path):
                aside = self.path / QUARANTINE / f"{folder}-{path.stat().st_mtime_ns}"
                aside.parent.mkdir(parents=True, exist_ok=True)
                path.rename(aside)

    def _take_log(self) -> None:
        """Become the writer of the event log, with all lines for which the `push` of a writer before has returned.

        It joins without a content: what is in the object of the writer before is final then.
        """
        if not self.remote:
            return
        if self._lost:
            raise self._lost
        with self._lock:  # a push between the steps of this would take its own process for another
            self._logs.join()
            data = whole_lines(self._logs.read())
            self._set_log(self._local_log(), data)
            self._logs.write(data)
            self._sent = data
        self._logs.delete_older()

    def _local_log(self) -> bytes:
        path = self.path / EVENT_LOG
        return path.read_bytes() if path.is_file() else b""

    def _set_log(self, local: bytes, data: bytes) -> None:
        """Replace lines in place from the first one that differs: readers and writers have the file open."""
        both = zip(local.splitlines(keepends=True), data.splitlines(keepends=True), strict=False)
        kept = sum(len(line) for line, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        with disk_errors(self.path / EVENT_LOG), (self.path / EVENT_LOG).open("ab") as file:
            file.truncate(kept)
            file.write(data[kept:])


def whole_lines(data: bytes) -> bytes:
    """Return what is before the end of the last line."""
    return data[: data.rfind(b"\n") + 1]


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt
