"""Progress of a sweep on standard error: the same table in the terminal that drives it and with `tune --watch`."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_app.commands.tune.space import describe
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.commands.tune.trials import Trial, ranked
from ray_app.terminal import make_console

NUM_SHOWN = 15
"""Trials in the table."""
STATUSES = ("running", "finished", "stopped", "failed")
REFRESH_S = 1.0
"""Seconds between two looks of `watch` at the event logs."""
DRIVERLESS_S = 5.0
"""Seconds without a writer of the sweep's event log after which its driver counts as dead."""
LIFT_HEAD = "lift (points)"
LIFT_STYLES = {"+": "green", "-": "red"}
"""Colours by a cell's sign, which only a lift has."""


class SweepView:
    """Header and table of the best trials, live on a terminal; elsewhere printed once, at the end."""

    def __init__(self, folder: SweepDir, *, transient: bool = False) -> None:
        """`transient`: nothing of the table stays at the end."""
        self.folder, self.console = folder, make_console(stderr=True)
        self._live = Live(console=self.console, auto_refresh=False, transient=transient)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._live.stop()

    def update(self, trials: list[Trial]) -> None:
        """Show the sweep as its event log and these trials have it."""
        table = trials_table(trials, drafting=self.folder.config.drafting)
        self._live.update(Group(header(self.folder.entries(), trials), table), refresh=True)

    def trial_changed(self, trial: Trial, trials: list[Trial]) -> None:
        """Show the sweep after a trial started or ended; print a line for one that ended."""
        if trial.ended_at is not None:
            cells = trial_cells(trial, drafting=self.folder.config.drafting)
            line = ", ".join(f"{head} {cell}" for head, cell in cells.items() if cell)
            self.console.print(line, soft_wrap=True)
        self.update(trials)


def watch(folder: SweepDir) -> None:
    """Show the sweep until it ends or has no driver any more; one that has ended is shown once."""
    folder.refresh()
    folder.metadata()
    driven_at = time.monotonic()
    with SweepView(folder) as view:
        while True:
            if lines := folder.entries():  # none yet: it is about to start
                view.update(folder.trials())
                if lines[-1]["kind"] == "run_ended":
                    return
            if folder.has_driver():
                driven_at = time.monotonic()
            elif time.monotonic() - driven_at > DRIVERLESS_S:
                break
            time.sleep(REFRESH_S)
            folder.refresh()
    hint = f"no driver is running; resume the sweep with: {folder.resume}"
    view.console.print(hint, soft_wrap=True)


def header(lines: list[dict[str, Any]], trials: list[Trial]) -> Text:
    """Name, number of trials by status and elapsed minutes, on one line."""
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    statuses = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    num_finals = sum(line["kind"] == "final_seed" for line in lines)
    ended = lines[-1]["kind"] == "run_ended"
    minutes = ((lines[-1]["time"] if ended else time.time()) - lines[0]["time"]) / 60
    return Text(
        f"{lines[0]['name']}: {len(trials)} trials ({statuses or 'none yet'}), "
        f"{f'{num_finals} final runs evaluated, ' if num_finals else ''}{minutes:.1f} min since the start"
        f"{', ended' if ended else ''}",
        style="bold",
    )


def trials_table(trials: list[Trial], *, drafting: bool = False) -> Table:
    """Table of the best trials, best first; those without a number last. `drafting`: they train drafters."""
    table = Table(box=None, header_style="bold")
    for head in trial_heads(drafting=drafting):
        left = head in ("trial", "status", "setting")
        table.add_column(
            head, justify="left" if left else "right", no_wrap=left and head != "setting", overflow="fold"
        )
    for trial in ranked(trials)[:NUM_SHOWN]:
        cells = trial_cells(trial, drafting=drafting).values()
        table.add_row(*(Text(cell, style=LIFT_STYLES.get(cell[:1], "")) for cell in cells))
    return table


def duration_words(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever is readable."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def trial_heads(*, drafting: bool) -> tuple[str, ...]:
    """Heads of `trial_cells`, in the terminal and on the page."""
    numbers = ("tokens per target pass", "cosine") if drafting else ("accepted at 0.80", LIFT_HEAD)
    return ("trial", "status", "epochs", *numbers, "parameters", "time", "setting")


def trial_cells(trial: Trial, *, drafting: bool) -> dict[str, str]:
    """A trial as a row of text by head, with its latency and the reason of its failure after its setting."""
    numbers = (
        "" if trial.accept_rate is None else f"{100 * trial.accept_rate:.1f} %",
        "" if trial.lift is None else f"{100 * trial.lift:+.1f}",
    )
    if drafting:
        numbers = (
            "" if trial.tokens_per_target_pass is None else f"{trial.tokens_per_target_pass:.3f}",
            "" if trial.cos_sim is None else f"{trial.cos_sim:.3f}",
        )
    setting = (
        describe(trial.setting)
        + ("" if trial.latency_ms is None else f"; one pair {trial.latency_ms:.2f} ms")
        + (f"; {trial.reason}" if trial.reason else "")
    )
    first = (trial.name, trial.status, str(trial.epochs))
    last = (f"{trial.parameters:,}", duration_words(trial.seconds), setting)
    return dict(zip(trial_heads(drafting=drafting), (*first, *numbers, *last), strict=True))
