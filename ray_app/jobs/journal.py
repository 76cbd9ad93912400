"""The journal of a run: one JSON object a line, appended as things happen, before anyone else hears of them.

Kinds: `step` (each optimizer step), `epoch` (training means and validation), `start`, `resume`, `failure`.
"""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

JOURNAL = "journal.jsonl"
POLL_S = 0.25
"""How often a follower looks for new lines."""


class Journal:
    """Appends to a run's journal; every line is with the operating system before `write` returns."""

    def __init__(self, run: Path) -> None:
        path = run / JOURNAL
        if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)  # a line that its writer was killed in
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """One line. A number that is not finite raises ValueError: JSON has none."""
        self._file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()


def entries(run: Path) -> list[dict[str, Any]]:
    """All whole lines so far."""
    path = run / JOURNAL
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def follow(run: Path, stop: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """New lines as they come, in batches that may be empty; ends once `stop` is set and all has been read."""
    path = run / JOURNAL
    done = 0
    while True:
        last = stop.is_set()
        with path.open("rb") as file:
            file.seek(done)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        done += len(whole)
        yield [json.loads(line) for line in whole.splitlines()]
        if last:
            return
        stop.wait(POLL_S)
