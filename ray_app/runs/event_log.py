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
from ray_app.parsing.json_text import parse_object
from ray_app.store.atomic import disk_errors, write_file

EVENT_LOG = "events.jsonl"
POLL_S = 0.25
"""Time between two looks for new lines."""
HANDOVER_S = 20.0
"""Longest wait for the writer before, which may be a process that has just been killed."""
UNSYNCED = ("step",)
"""Kinds that may be in the operating system's buffers; other lines are on the disk when `write` returns."""


class EventLog:
    """The only writer of a run's event log. A killed process loses no line for which `write` has returned."""

    def __init__(self, run: Path, patience_s: float = HANDOVER_S) -> None:
        """Open `run`'s event log. StoreError: another process writes it, or a line is damaged."""
        self._path = run / EVENT_LOG
        self._fd = self._open()
        try:
            self._lock(patience_s)
            data = self._path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.ftruncate(self._fd, data.rfind(b"\n") + 1)  # its writer was killed within a line
            if (once := without_repeated_block(data)) != data:
                write_file(self._path, once)
                os.dup2(self._open(), self._fd)
                self._lock(patience_s)
            lines = entries(run)
        except BaseException:
            os.close(self._fd)
            raise
        self.last_step = max((line["global_step"] for line in lines if line["kind"] == "step"), default=0)
        """Last optimizer step in the log."""
        self.last_validation = max(
            (line["global_step"] for line in lines if line["kind"] == "validation"), default=-1
        )
        """Optimizer step of the last validation within an epoch in the log."""
        self.last_epoch = max((line["epoch"] for line in lines if line["kind"] == "epoch"), default=0)
        """Last epoch in the log."""

    def write(self, kind: str, **values: Any) -> None:
        """Write one line. ValueError: a number is not finite, which JSON cannot say. StoreError: the disk refuses."""
        line = format_line({"kind": kind, **values})
        size = os.fstat(self._fd).st_size
        with disk_errors(self._path, len(line)):
            try:
                if os.write(self._fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if kind not in UNSYNCED:
                    os.fsync(self._fd)
            except OSError:
                with suppress(OSError):  # the next writer cuts off part of a line, too
                    os.ftruncate(self._fd, size)
                raise

    def step(self, global_step: int, **values: Any) -> None:
        """Write a `step` line, unless the log has it."""
        if global_step > self.last_step:
            self.write("step", global_step=global_step, time=time.time(), **values)
            self.last_step = global_step

    def validation(self, global_step: int, **values: Any) -> None:
        """Write a `validation` line, unless the log has it."""
        if global_step > self.last_validation:
            self.write("validation", global_step=global_step, time=time.time(), **values)
            self.last_validation = global_step

    def epoch(self, epoch: int, **values: Any) -> None:
        """Write an `epoch` line, unless the log has it."""
        if epoch > self.last_epoch:
            self.write("epoch", epoch=epoch, time=time.time(), **values)
            self.last_epoch = epoch

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let another process write in the meantime; this one does not."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        try:
            yield
        finally:
            self._lock(HANDOVER_S)

    def _open(self) -> int:
        with disk_errors(self._path):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

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
    """Return one line with its checksum as the last value."""
    text = json.dumps(values, allow_nan=False).encode()
    return b'%s, "crc": "%08x"}\n' % (text[:-1], zlib.crc32(text))


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Return the values of a line without its checksum. StoreError, naming `where`, if the checksum differs."""
    if (text := checked_text(line)) is None:
        raise StoreError(f"{where} is damaged: its checksum differs. Move the file away to continue without it.")
    try:
        return parse_object(text)
    except ValueError as error:
        raise StoreError(f"{where} is damaged: {error}. Move the file away to continue without it.") from error


def checked_text(line: bytes) -> bytes | None:
    """Return a line's JSON without its checksum; None if that differs."""
    body, mark, tail = line.rpartition(b', "crc": "')
    text = body + b"}"
    return text if mark and tail.rstrip(b"\n") == b'%08x"}' % zlib.crc32(text) else None


def without_repeated_block(data: bytes) -> bytes:
    """Return an event log without a block that is in it twice, as a file system may leave it after a failure.

    Between the copies there is one damaged line, of the end of the block and its beginning; or none, if the block is
    of whole lines. Other damage stays.
    """
    lines = data.splitlines(keepends=True)
    seen: dict[bytes, int] = {}
    for n, line in enumerate(lines):
        damaged = checked_text(line) is None
        again = n + damaged  # first line of the second copy
        count = n - seen.get(lines[again], n) if again < len(lines) else 0
        if damaged or count:
            before, after = lines[n - count - 1 : n - count], [*lines[again + count :], b""]
            joined = before and is_joined_of(line, after[0], before[0])
            if lines[n - count : n] == lines[again : again + count] and (joined or not damaged):
                return b"".join(lines[:n] + after)
        seen[line] = n
    return data


def is_joined_of(line: bytes, beginning: bytes, end: bytes) -> bool:
    """Return True if a line is the beginning of one and the end of another."""
    return any(beginning.startswith(line[:k]) and end.endswith(line[k:]) for k in range(len(line)))


def entries(run: Path) -> list[dict[str, Any]]:
    """Return all whole lines so far, without a last one that is cut. StoreError names a damaged line."""
    path = run / EVENT_LOG
    lines = path.read_bytes().splitlines(keepends=True)
    return [parse_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.endswith(b"\n")]


def is_locked(run: Path) -> bool:
    """Return True if a process on this machine, or on one that shares the disk, has the event log open to write."""
    with (run / EVENT_LOG).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def entries_since_start(run: Path) -> list[dict[str, Any]]:
    """Return the lines after the newest `run_started`: those of one driver."""
    lines = entries(run)
    return lines[max(n for n, line in enumerate(lines, 1) if line["kind"] == "run_started") :]


def last_start_time(run: Path) -> float:
    """Return when the newest driver started, in Unix time."""
    return [line["time"] for line in entries(run) if line["kind"] == "run_started"][-1]


def require_latest_driver(run: Path, started: float) -> None:
    """Raise StoreError if another driver has started since; then neither this one nor its workers may write."""
    if (newest := last_start_time(run)) != started:
        raise StoreError(
            f"another driver took over this run {newest - started:.0f} s after this one started; this one ends"
        )


def tail(run: Path, stop: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """Yield new lines in batches, which may be empty, until `stop` is set and all is read.

    All lines come again if one that has been read is replaced: at a URI, those of a writer that was taken over from.
    """
    path = run / EVENT_LOG
    done, newest = 0, b""
    while True:
        last = stop.is_set()
        with path.open("rb") as file:
            file.seek(done - len(newest))
            data = file.read()
            if not data.startswith(newest):
                file.seek(done := 0)
                newest, data = b"", file.read()
        whole = data[len(newest) : data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        yield [parse_line(line, f"{path}, after byte {done}") for line in lines]
        done, newest = done + len(whole), lines[-1] if lines else newest
        if last:
            return
        stop.wait(POLL_S)
