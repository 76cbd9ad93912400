"""Processes that follow each other at a run in an object store: who may write its event log, and who drives it.

An upload of a process that was cut off may arrive at any later time, and object stores offer no lock. So each process
writes an object of its own, named by a number that rises, and the newest one counts: a late upload changes nothing.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_app.errors import StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.store.filesystem import RemoteDir

SYNC_INTERVAL_S = 2.0
"""Time between two uploads of new event log lines, between two downloads, and between two renewals of a lease."""
LEASE_S = 20.0
"""A driver whose lease is not renewed for so long is gone."""


class TakenOver(StoreError):
    """Another process has the right that this one had."""


class Successors:
    """Objects `KIND.NUMBER-TOKEN` in a folder, one for each process that had a right; the newest process has it."""

    def __init__(self, remote: RemoteDir, kind: str) -> None:
        """`kind`: first part of the objects' names."""
        self._remote, self._kind, self.own = remote, kind, ""

    def names(self) -> list[str]:
        """Return names of its objects, the newest last."""
        try:
            listed = self._remote.listdir()
        except FileNotFoundError:
            return []
        return sorted(
            name for name in listed if re.fullmatch(rf"{re.escape(self._kind)}\.\d{{6}}-[0-9a-f]{{8}}", name)
        )

    def read(self) -> bytes:
        """Return the newest content that is not empty; b"" if there is none."""
        while True:
            try:
                contents = (self._remote.read(name) for name in reversed(self.names()))
                return next((data for data in contents if data), b"")
            except FileNotFoundError:  # its successor has just deleted it
                continue

    def join(self, data: bytes = b"") -> None:
        """Become the newest process, with an object of its own."""
        last = (self.names() or [f"{self._kind}.{0:06d}-"])[-1]
        number = int(last[len(self._kind) + 1 :].partition("-")[0]) + 1
        self.own = f"{self._kind}.{number:06d}-{uuid.uuid4().hex[:8]}"
        self._remote.write(self.own, data)

    def write(self, data: bytes) -> None:
        """Write this process's object. TakenOver: it does not count, for there is a newer process."""
        self._remote.write(self.own, data)
        self.require()

    def require(self) -> None:
        """Raise TakenOver if another process has joined since."""
        if self.names()[-1:] != [self.own]:
            raise TakenOver(f"{self._remote} continues in another process, which has taken over; this one ends")

    def delete_older(self) -> None:
        """Delete the objects of the processes before."""
        for name in self.names():
            if name < self.own:
                self._remote.delete(name)

    def leave(self) -> None:
        """Delete this process's object."""
        self._remote.delete(self.own)


class Lease:
    """The right to drive a run: the holder's object says when it was renewed last."""

    def __init__(self, remote: RemoteDir, kind: str) -> None:
        """`kind`: first part of the objects' names."""
        self._remote, self._drivers = remote, Successors(remote, kind)
        self._holder = {"host": socket.gethostname(), "process": os.getpid()}

    def take(self) -> None:
        """Take it if it is free, or not renewed for `LEASE_S`. StoreError: another process has it."""
        before, first, began = self._drivers.names(), self._read(), time.monotonic()
        limit_s = LEASE_S if self.is_fresh() else 2 * SYNC_INTERVAL_S  # clocks of two machines may differ
        while (last := self._read()) is not None:
            if last != first:
                raise self._refusal(last)
            if time.monotonic() - began > limit_s:
                break
            time.sleep(SYNC_INTERVAL_S / 2)
        self._drivers.join(self._content(time.time()))
        time.sleep(SYNC_INTERVAL_S / 2)  # any process that looked before this one joined has joined by now
        if any(name not in before for name in self._drivers.names() if name < self._drivers.own):
            self._drivers.leave()  # of several at one moment the first one continues
            raise self._refusal(self._read())
        self._drivers.delete_older()

    def renew(self) -> None:
        """Write the time into it. TakenOver: another process has taken it."""
        self._drivers.write(self._content(time.time()))

    def release(self) -> None:
        """Let the next process have it at once."""
        with suppress(StoreError):
            self._drivers.write(self._content(0.0))

    def is_fresh(self) -> bool:
        """Return True if another process has renewed it within `LEASE_S`, by this machine's clock."""
        last = self._read()
        return last is not None and time.time() - last["renewed"] < LEASE_S

    def _content(self, renewed: float) -> bytes:
        return json.dumps({**self._holder, "renewed": renewed}).encode()

    def _read(self) -> dict[str, Any] | None:
        """Return the newest object of another process; None if it was released, or there is none."""
        try:
            holder = parse_object(self._drivers.read() or b"{}")
        except ValueError as error:  # half-written, where the file system does not write whole objects
            raise StoreError(f"the lease in {self._remote} cannot be read: {error}") from error
        return holder if holder.get("renewed") else None

    def _refusal(self, holder: dict[str, Any] | None) -> StoreError:
        who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
        return StoreError(f"{self._remote} is driven by {who}; wait for its end, or stop it")


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
    try:
        yield
    finally:
        stop.set()
        thread.join()
