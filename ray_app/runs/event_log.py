"""The event log of a run: one JSON object per line, appended before anything else learns of the event.

Kinds: `run_started` (one per driver, with what the tracking server needs), `workers_started` (one per worker group;
in a sweep's trial with its node), `resumed`, `step` (each optimizer step), `validation` (within an epoch, if asked
for), `epoch` (training means and validation), `stopped` (saved on request), `failed`, `exception`, `run_ended`. Every
line ends with a CRC-32 of the rest of it. Work repeated after a restart is not logged again, so each step, validation
and epoch appears once.
"""

import errno
import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray_app.errors import StoreError
from ray_app.store.atomic import disk_errors

EVENT_LOG = "events.jsonl"
POLL_S = 0.25
"""How often a follower looks for new lines."""
HANDOVER_S = 20.0
"""How long a writer waits for the one before it, which may be a process that has just been killed."""
UNSYNCED = ("step",)
"""Kinds that are left to the operating system; each other line is on the disk before `write` returns."""


class EventLog:
    """The one writer of a run's event log; every line is with the operating system before `write` returns."""

    def __init__(self, run: Path, patience_s: float = HANDOVER_S) -> None:
        """StoreError: another process is writing, or a line is damaged."""
        self._path = run / EVENT_LOG
        with disk_errors(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock(patience_s)
            data = self._path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.ftruncate(self._fd, data.rfind(b"\n") + 1)  # a line that its writer was killed in
            lines = entries(run)
        except BaseException:
            os.close(self._fd)
            raise
        self.last_step = max((line["global_step"] for line in lines if line["kind"] == "step"), default=0)
        """Last optimizer step that is told."""
        self.last_validation = max(
            (line["global_step"] for line in lines if line["kind"] == "validation"), default=-1
        )
        """Steps before the last validation within an epoch that is told."""
        self.last_epoch = max((line["epoch"] for line in lines if line["kind"] == "epoch"), default=0)
        """Last epoch that is told."""

    def write(self, kind: str, **values: Any) -> None:
        """One line. ValueError: a number that is not finite, which JSON has not. StoreError: it cannot be written."""
        line = format_line({"kind": kind, **values})
        size = os.fstat(self._fd).st_size
        with disk_errors(self._path, len(line)):
            try:
                if os.write(self._fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if kind not in UNSYNCED:
                    os.fsync(self._fd)
            except OSError:
                with suppress(OSError):  # what is left of a line is cut off by the next writer, too
                    os.ftruncate(self._fd, size)
                raise

    def step(self, global_step: int, **values: Any) -> None:
        """A `step` line, unless that step is told already."""
        if global_step > self.last_step:
            self.write("step", global_step=global_step, time=time.time(), **values)
            self.last_step = global_step

    def validation(self, global_step: int, **values: Any) -> None:
        """A `validation` line, unless that of this step is told already."""
        if global_step > self.last_validation:
            self.write("validation", global_step=global_step, time=time.time(), **values)
            self.last_validation = global_step

    def epoch(self, epoch: int, **values: Any) -> None:
        """An `epoch` line, unless that epoch is told already."""
        if epoch > self.last_epoch:
            self.write("epoch", epoch=epoch, time=time.time(), **values)
            self.last_epoch = epoch

    @contextmanager
    def released(self) -> Iterator[None]:
        """Another process may write meanwhile; this one does not."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        try:
            yield
        finally:
            self._lock(HANDOVER_S)

    def _lock(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{self._path} is being written by another process; wait for its end, or stop it"
                    ) from error
            time.sleep(POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        os.close(self._fd)


def format_line(values: dict[str, Any]) -> bytes:
    """One line with its checksum as the last value."""
    text = json.dumps(values, allow_nan=False).encode()
    return b'%s, "crc": "%08x"}\n' % (text[:-1], zlib.crc32(text))


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The values of a line without its checksum. StoreError, with `where`, if it does not hold."""
    body, mark, tail = line.rpartition(b', "crc": "')
    text = body + b"}"
    if not mark or tail.rstrip(b"\n") != b'%08x"}' % zlib.crc32(text):
        raise StoreError(f"{where} is damaged: its checksum does not hold. Set the file aside to go on without it.")
    return json.loads(text)


def entries(run: Path) -> list[dict[str, Any]]:
    """All whole lines so far; a cut last one is not there yet. StoreError names a damaged line."""
    path = run / EVENT_LOG
    lines = path.read_bytes().splitlines(keepends=True)
    return [parse_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.endswith(b"\n")]


def is_locked(run: Path) -> bool:
    """Whether a process on this machine, or on another that shares the disk, has the event log open to write."""
    with (run / EVENT_LOG).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def entries_since_start(run: Path) -> list[dict[str, Any]]:
    """What came after the newest `start` line: the doing of one driver."""
    lines = entries(run)
    return lines[max(n for n, line in enumerate(lines, 1) if line["kind"] == "run_started") :]


def last_start_time(run: Path) -> float:
    """When the newest driver began, in Unix time."""
    return [line["time"] for line in entries(run) if line["kind"] == "run_started"][-1]


def require_latest_driver(run: Path, started: float) -> None:
    """StoreError unless the driver that began then is the newest: after another on some other machine, neither it nor
    its workers write any more."""
    if (newest := last_start_time(run)) != started:
        raise StoreError(
            f"this run goes on under another driver, which began {newest - started:.0f} s after this one, which ends"
        )


def tail(run: Path, stop: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """New lines as they come, in batches that may be empty; ends once `stop` is set and all has been read."""
    path = run / EVENT_LOG
    done = 0
    while True:
        last = stop.is_set()
        with path.open("rb") as file:
            file.seek(done)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        yield [parse_line(line, f"{path}, byte {done} on") for line in whole.splitlines()]
        done += len(whole)
        if last:
            return
        stop.wait(POLL_S)
