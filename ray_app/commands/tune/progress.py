"""A sweep for the eye: a table of its best trials, live from another terminal, or a line for each trial that ends."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ray_app.commands.tune.driver import SweepState
from ray_app.commands.tune.spec import describe
from ray_app.commands.tune.sweep_dir import SweepDir, Trial, best_of

SHOWN = 15
"""Trials in the table."""
STATUSES = ("running", "finished", "stopped", "failed")
REFRESH_S = 1.0
"""Between two looks at the event logs."""
DRIVERLESS_S = 5.0
"""So long nobody may write the sweep's event log before its driver counts as gone."""


def watch(folder: SweepDir) -> None:
    """Shows the sweep on standard error until it ends or has no driver any more; one that has ended is shown once."""
    folder.refresh()
    folder.metadata()
    console = Console(stderr=True)
    driven = time.monotonic()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if lines := folder.entries():  # none yet: it is about to begin
                trials = folder.trials()
                live.update(Group(header(lines, trials), trials_table(trials)), refresh=True)
                if lines[-1]["kind"] == "run_ended":
                    return
            if folder.has_driver():
                driven = time.monotonic()
            elif time.monotonic() - driven > DRIVERLESS_S:
                break
            time.sleep(REFRESH_S)
            folder.refresh()
    told = f"no driver is at work; go on with: {folder.resume}"
    console.print(told, soft_wrap=True, markup=False, highlight=False)


def header(lines: list[dict[str, Any]], trials: list[Trial]) -> Text:
    """Where the sweep stands, on one line."""
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    finals = sum(line["kind"] == "final_seed" for line in lines)
    ended = lines[-1]["kind"] == "run_ended"
    minutes = ((lines[-1]["time"] if ended else time.time()) - lines[0]["time"]) / 60
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return Text(
        f"{lines[0]['name']}: {len(trials)} trials ({told or 'none yet'}), "
        f"{f'{finals} final runs judged, ' if finals else ''}{minutes:.1f} min since it began"
        f"{', ended' if ended else ''}",
        style="bold",
    )


def trials_table(trials: list[Trial]) -> Table:
    """The best trials first; those without a number last."""
    table = Table(box=None, header_style="bold")
    table.add_column("trial", no_wrap=True)
    table.add_column("status")
    for name in ("epochs", "accepted at 0.80", "lift (points)", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("setting", overflow="fold")
    judged = sorted((trial for trial in trials if trial.objective is not None), key=lambda trial: trial.rank)
    others = [trial for trial in trials if trial.objective is None]
    for trial in [*judged, *others][:SHOWN]:
        rate = f"{100 * trial.accept_rate:.1f} %" if trial.accept_rate is not None else ""
        lift = f"{100 * trial.lift:+.1f}" if trial.lift is not None else ""
        told = describe(trial.setting) + (f": {trial.reason}" if trial.reason else "")
        table.add_row(
            trial.name,
            trial.status,
            str(trial.epochs),
            rate,
            Text(lift, style="green" if (trial.lift or 0) > 0 else "red"),
            f"{trial.parameters:,}",
            told,
        )
    return table


class SweepProgress:
    """On the driver's standard error: a bar on a terminal, a line for each trial that ends."""

    def __init__(self, record: SweepState) -> None:
        self._record, self._console = record, Console(stderr=True)
        self._bar = Progress(
            TextColumn("tune"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} trials  best {task.fields[best]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(record.trials) + record.left, best="–")

    def __enter__(self) -> Self:
        self._bar.start()
        self._show()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bar.stop()

    def ended(self, trial: Trial) -> None:
        """One trial more has ended."""
        self._console.print(trial_line(trial), highlight=False, soft_wrap=True, markup=False)
        self._show()

    def _show(self) -> None:
        trials = list(self._record.trials.values())
        best = best_of(trials)
        told = f"{100 * (best.objective or 0):.1f} % ({best.name})" if best else "–"
        self._bar.update(self._task, completed=sum(trial.ended_at is not None for trial in trials), best=told)


def trial_line(trial: Trial) -> str:
    """One trial in words."""
    numbers = "no epoch"
    if trial.accept_rate is not None and trial.lift is not None:
        numbers = f"accepted at 0.80 {100 * trial.accept_rate:.1f} %, lift {100 * trial.lift:+.1f}"
    why = f": {trial.reason}" if trial.reason else ""
    return f"{trial.name} {trial.status} after {trial.epochs} epochs: {numbers}  ({describe(trial.setting)}){why}"
