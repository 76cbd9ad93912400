"""An event log in an object store, where nothing can be appended: parts, each named by the byte that it begins at.

The one writer replaces its newest part by a longer one until that is large, then begins another. A part counts up to
where the next begins. So a writer that took over from this byte on is right, whatever the one before still sends; and
that one finds a part behind its own, and stops.
"""

import threading
from pathlib import Path

from ray_app.errors import StoreError
from ray_app.runs.event_log import EVENT_LOG
from ray_app.store.atomic import disk_errors
from ray_app.store.filesystem import RemoteDir

PARTS = "event_log"
PART_BYTES = 2**20
"""A part of this size or more is not replaced any more."""


class RemoteEventLog:
    """Between `events.jsonl` in a process's own folder and its parts below `there`."""

    def __init__(self, run: Path, there: RemoteDir) -> None:
        self._path, self._there = run / EVENT_LOG, there
        self._begin = self._sent = 0
        """Where the part begins that is written here, and up to where it has been sent."""
        self._lengths = {0}
        """What this part's length may be there; several after a write of which nobody knows how it ended."""
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Appends what is new there. StoreError: a part is missing."""
        sizes = self._sizes()
        if not sizes and not self._path.exists():
            return  # it has not begun
        with self._lock, disk_errors(self._path), self._path.open("ab") as file:
            have = file.tell()
            begins = sorted(sizes)
            for begin, end in zip(begins, [*begins, None][1:], strict=True):
                if begin > have:
                    raise StoreError(
                        f"{self._there.file(PARTS)} lacks the bytes from {have} to {begin}: a part of the "
                        "event log is missing"
                    )
                if have < begin + sizes[begin] and (end is None or have < end):
                    data = self._there.read(_name(begin))[: end and end - begin][have - begin :]
                    file.write(data[: data.rfind(b"\n") + 1])
                    have = file.tell()
            self._begin, self._sent, self._lengths = have, have, {0}

    def push(self) -> None:
        """Sends whole lines that are new here. StoreError: another process has taken over, or it cannot be done."""
        with self._lock:
            with self._path.open("rb") as file:
                file.seek(self._begin)
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            if self._begin + len(data) == self._sent:
                return
            sizes = self._sizes()
            if max(sizes, default=0) > self._begin or sizes.get(self._begin, 0) not in self._lengths:
                raise StoreError(f"{self._there} goes on in another process, which has taken over; this one ends")
            self._there.mkdir(PARTS)
            self._lengths.add(len(data))
            self._there.write(_name(self._begin), data)
            self._sent, self._lengths = self._begin + len(data), {len(data)}
            if len(data) >= PART_BYTES:
                self._begin, self._lengths = self._sent, {0}

    def _sizes(self) -> dict[int, int]:
        """Bytes of each part by where it begins."""
        try:
            found = self._there.sizes(PARTS)
        except FileNotFoundError:
            return {}
        return {int(name.partition(".")[0]): size for name, size in found.items()}


def _name(begin: int) -> str:
    return f"{PARTS}/{begin:012d}.jsonl"
