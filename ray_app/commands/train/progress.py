"""Progress of a training run: what it does before its first step, then its event log.

A bar on a terminal; elsewhere a line for each thing that it does and for each epoch.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ray_app.config.tune import TOKENS
from ray_app.core.thresholds import THETA, rate_key
from ray_app.runs.event_log import tail
from ray_app.terminal import make_console


class TrainingProgress:
    """Follows a run's event log from a thread of its own, until it is left."""

    def __init__(self, run: Path, total_steps: int) -> None:
        self._run, self._stop, self._total = run, threading.Event(), total_steps
        self._console = make_console(stderr=True)
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, shown="starting")
        self._workers, self._steps = 1, 0
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def show(self, doing: str) -> None:
        """Show what is done before the next step."""
        self._bar.update(self._task, shown=doing, refresh=True)
        if not self._console.is_terminal:
            self._console.print(doing, soft_wrap=True)

    def _follow(self) -> None:
        for lines in tail(self._run, self._stop):
            for line in lines:
                if line["kind"] == "step":
                    self._print_workers(line)
                    self._steps = line["global_step"]
                    self._bar.update(self._task, completed=line["global_step"], shown=self._step(line))
                elif line["kind"] == "workers_started":
                    self.show("workers started; the next step follows" if self._steps else "first step")
                elif line["kind"] == "validation":
                    message = f"after step {line['global_step']}: {validation_line(line['val'])}"
                    self._console.print(message, soft_wrap=True)
                elif line["kind"] == "epoch":
                    self._console.print(epoch_line(line), soft_wrap=True)

    def _step(self, line: dict[str, Any]) -> str:
        """Format one optimizer step."""
        speed = line["pairs"] / max(line["seconds"], 1e-9)
        return (
            f"epoch {line['epoch']}  step {line['global_step']}/{self._total}  loss {line['loss']:.4f}  "
            f"cos_sim {line['cos_sim']:.4f}  {speed:.1f} pairs/s"
        )

    def _print_workers(self, line: dict[str, Any]) -> None:
        if (workers := line.get("workers", self._workers)) != self._workers:
            self._workers = workers
            noun = "worker" if workers == 1 else "workers"
            self._console.print(f"from step {line['global_step']} on: {workers} {noun}")


def epoch_line(line: dict[str, Any]) -> str:
    """Format one epoch as a line."""
    train = line["train"]
    val = f"{validation_line(line['val'])}  " if line["val"] else ""
    return (
        f"epoch {line['epoch']:>3}  train loss {train['loss']:.4f} cos_sim {train['cos_sim']:.4f}  "
        f"{val}{train['pairs'] / max(train['seconds'], 1e-9):.1f} pairs/s"
    )


def validation_line(val: dict[str, Any]) -> str:
    """Format the metrics of a validation."""
    tokens = f" {val[TOKENS]:.2f} tokens per target pass" if TOKENS in val else ""
    return f"val loss {val['loss']:.4f} cos_sim {val['cos_sim_mean']:.4f} {acceptance(val)}{tokens}"


def acceptance(val: dict[str, Any]) -> str:
    """Format acceptance at θ with that of the best baseline, where there are baselines."""
    rate = f"accepted at {rate_key(THETA)} {val['cosine_accept_rate'][rate_key(THETA)]:.1%}"
    if not (baselines := val.get("baselines")):
        return rate
    best = max(baselines, key=lambda name: baselines[name])
    return f"{rate} (best baseline {best} {baselines[best]:.1%})"
