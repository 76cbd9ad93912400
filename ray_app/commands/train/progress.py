"""Progress of a training run, from its event log: a bar on a terminal, a line for each epoch elsewhere."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ray_app.runs.event_log import tail
from ray_app.terminal import make_console


class TrainingProgress:
    """Follows a run's event log from a thread of its own, until it is left."""

    def __init__(self, run: Path, total_steps: int) -> None:
        self._run, self._stop = run, threading.Event()
        self._console = make_console(stderr=True)
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}  step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:.4f}  cos_sim {task.fields[cos_sim]:.4f}"),
            TextColumn("{task.fields[speed]:.1f} pairs/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        nothing: dict[str, Any] = {"epoch": 0, "loss": float("nan"), "cos_sim": float("nan"), "speed": 0.0}
        self._task = self._bar.add_task("", total=total_steps, **nothing)
        self._workers = 1
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _show(self) -> None:
        for lines in tail(self._run, self._stop):
            for line in lines:
                if line["kind"] == "step":
                    self._print_workers(line)
                    self._bar.update(
                        self._task,
                        completed=line["global_step"],
                        epoch=line["epoch"],
                        loss=line["loss"],
                        cos_sim=line["cos_sim"],
                        speed=line["pairs"] / max(line["seconds"], 1e-9),
                    )
                elif line["kind"] == "validation":
                    message = f"after step {line['global_step']}: {validation_line(line['val'])}"
                    self._console.print(message, soft_wrap=True)
                elif line["kind"] == "epoch":
                    self._console.print(epoch_line(line), soft_wrap=True)

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
    return (
        f"val loss {val['loss']:.4f} cos_sim {val['cos_sim_mean']:.4f} "
        f"accepted at 0.80 {val['cosine_accept_rate']['0.80']:.1%}"
    )
