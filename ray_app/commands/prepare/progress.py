"""Progress of a preparation: a bar on a terminal, a line now and then elsewhere, and what the store has to say."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ray_app.commands.prepare.store_builder import BuiltTask
from ray_app.terminal import make_console

SECONDS_PER_LINE = 30.0


class PrepareProgress:
    """Pairs done, windows/s, events/s, encoded images/s and time left, on standard error."""

    def __init__(self, total: int, images_per_pair: int = 0) -> None:
        self._console = make_console(stderr=True)
        self._bar = Progress(
            TextColumn("prepare"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} pairs"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[rejected]} rejected"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, speed="waiting for room on the cluster", rejected=0)
        self._total, self._done, self._kept, self._rejected = total, 0, 0, 0
        self._windows = self._events = self._images = 0
        self._images_per_pair = images_per_pair
        self._began = self._printed_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, doing: str) -> None:
        """Show what is done before the first file is finished."""
        self._bar.update(self._task, speed=doing, refresh=True)
        if not self._console.is_terminal:
            self._console.print(f"{self._total:,} pairs: {doing}", soft_wrap=True)

    def add(self, done: BuiltTask, kept: bool, messages: str) -> None:
        """Count a finished task, or one `kept` from an earlier start; `messages` come from its worker's store."""
        pairs = done.num_pairs + len(done.rejected)
        self._done, self._rejected = self._done + pairs, self._rejected + len(done.rejected)
        if kept:
            self._kept += pairs
        else:
            self._windows, self._events = self._windows + done.windows, self._events + done.events_drawn
            self._images += done.num_pairs * self._images_per_pair
        for sentence in messages.splitlines():
            self._console.print(sentence, soft_wrap=True)
        now = time.monotonic()
        speed = self._speed(now - self._began)
        self._bar.update(self._task, completed=self._done, speed=speed, rejected=self._rejected)
        if not self._console.is_terminal and now - self._printed_at >= SECONDS_PER_LINE:
            self._printed_at = now
            left_s = (self._total - self._done) * (now - self._began) / max(self._done - self._kept, 1)
            self._console.print(
                f"{self._done:,} of {self._total:,} pairs, {speed}, {left_s:,.0f} s left, {self._rejected} rejected",
                soft_wrap=True,
            )

    def _speed(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        events = f", {self._events / seconds / 1e6:,.1f} million events/s" if self._events else ""
        images = f", {self._images / seconds:,.1f} images/s" if self._images else ""
        return f"{self._windows / seconds:,.2f} windows/s{events}{images}"
