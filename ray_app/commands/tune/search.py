# ruff: noqa: ARG002 - the names of arguments are Tune's
"""Search: Ray Tune runs the trials that the sweep's state proposes, and its callbacks log what becomes of them."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.tune.datasets import INITS_DIR, with_starts
from ray_app.commands.tune.progress import SweepView
from ray_app.commands.tune.spec import SweepSpec
from ray_app.commands.tune.state import SweepState
from ray_app.commands.tune.sweep_dir import Trial
from ray_app.commands.tune.trial import GROUP_RESOURCES, run_group_trial, run_trial
from ray_app.errors import RunInterrupted, RunStopped
from ray_app.runs.signals import handle_signals

MAX_FAILURES = 8
"""Times that Tune starts a trial again; one that dies twice at the same step ends sooner."""


def search(state: SweepState, placed: dict[str, SharedDataset], concurrent: int) -> None:
    """Run all trials that are left, `concurrent` at a time. RunStopped: the search was asked to stop."""
    spec, folder = state.spec, state.folder
    budget = Budget(spec, folder.used_seconds(), sum(trial.seconds for trial in state.trials.values()))
    num_trials = len(state.queue) + state.left
    if not num_trials or budget.stop_all():
        return
    placed = with_starts(spec, placed, folder.path / INITS_DIR)
    run, resources = run_trial, {"CPU": spec.cpus_per_worker, **({"GPU": 1.0} if spec.use_gpu else {})}
    if spec.num_workers > 1:
        run, resources = run_group_trial, GROUP_RESOURCES
    with SweepView(transient=True) as view, stop_on_signal(budget):
        state.on_change = lambda trial: view.trial_changed(trial, folder.entries(), list(state.trials.values()))
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run, placed=placed), resources),
            tune_config=tune.TuneConfig(
                search_alg=StateSearcher(state),
                scheduler=make_scheduler(state),
                num_samples=num_trials,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"{int(time.time() * 1000)}",
                storage_path=str(folder.path / "ray"),
                stop=budget,
                callbacks=[SweepCallback(state, budget)],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        ).fit()
    if budget.signal:
        raise RunInterrupted if budget.signal == signal.SIGINT else RunStopped
    if budget.spent and (unfinished := sum(trial.ended_at is None for trial in state.trials.values())):
        print(
            f"{budget.spent}: {unfinished} trials have not ended; resume them with {folder.resume} and a larger "
            "budget",
            file=sys.stderr,
        )


class NotPickled:
    """Mix-in for objects that Tune pickles into its snapshots, which are never restored here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StateSearcher(NotPickled, Searcher):
    """Search algorithm of Tune that asks the sweep's state for each trial."""

    def __init__(self, state: SweepState) -> None:
        super().__init__(metric="compared", mode="max")
        self.state = state

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config, or FINISHED."""
        trial = self.state.next_trial()
        return Searcher.FINISHED if trial is None else {"trial": self.state.trial_spec(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: SweepCallback logs the end."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the event log."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the event log."""


class SweepCallback(NotPickled, tune.Callback):
    """Callback of Tune that logs what happens to trials."""

    def __init__(self, state: SweepState, budget: "Budget") -> None:
        self.state, self.budget = state, budget

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Start to count the trial's time."""
        self.budget.started(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Log the death of the trial's process."""
        self.state.process_died(trial.config["trial"].name, reason_of(trial))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Log that the trial failed for good."""
        self.budget.ended(trial.trial_id)
        self.state.failed(trial.config["trial"].name, reason_of(trial) or "its process failed too often")

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Log how the trial ended; one that a spent budget cut off has not ended, and can be resumed."""
        name = trial.config["trial"].name
        self.budget.ended(trial.trial_id)
        if not self.budget.spent or self.state.trial_status(name).ended_at is not None:
            self.state.stopped(name)


def reason_of(trial: TuneTrial) -> str:
    """Last line of a failure that Tune has caught, or of what killed the process; empty if Tune has none."""
    error = trial.get_pickled_error() or trial.get_error()
    if error is None:
        return ""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if type(error).__name__ != "TuneError" else lines[-1]) if lines else type(error).__name__


class Budget(NotPickled, tune.Stopper):
    """Stopper of Tune: ends the search when hours or GPU hours are used up, or at a signal."""

    def __init__(self, spec: SweepSpec, used_s: float, trial_s: float) -> None:
        """`used_s`: seconds of earlier starts; `trial_s`: seconds of all trials so far."""
        self._spec, self._used_s, self._trial_s = spec, used_s, trial_s
        self._started = time.monotonic()
        self._running: dict[str, float] = {}
        self.signal = 0
        """Number of the signal that asked it to stop, or 0."""

    @property
    def used_hours(self) -> float:
        """Hours of search, all starts together."""
        return (self._used_s + time.monotonic() - self._started) / 3600

    @property
    def used_gpu_hours(self) -> float:
        """GPU hours of all trials."""
        running = sum(time.monotonic() - started for started in self._running.values())
        return (self._trial_s + running) / 3600 * (self._spec.num_workers if self._spec.use_gpu else 0)

    @property
    def spent(self) -> str | None:
        """Reason to end the search, or None."""
        if self.signal:
            return "the search was asked to stop"
        if self._spec.max_hours and self.used_hours >= self._spec.max_hours:
            return f"--max-hours {self._spec.max_hours:g} are used up"
        if self._spec.max_gpu_hours and self.used_gpu_hours >= self._spec.max_gpu_hours:
            return f"--max-gpu-hours {self._spec.max_gpu_hours:g} are used up"
        return None

    def started(self, trial_id: str) -> None:
        """Start to count a trial's time; also again, after its process died."""
        self.ended(trial_id)
        self._running[trial_id] = time.monotonic()

    def ended(self, trial_id: str) -> None:
        """Add a trial's time."""
        self._trial_s += time.monotonic() - self._running.pop(trial_id, time.monotonic())

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no trial alone."""
        return False

    def stop_all(self) -> bool:
        """Return True if the search ends."""
        return self.spent is not None


@contextmanager
def stop_on_signal(budget: Budget) -> Iterator[None]:
    """End the search at SIGTERM or Ctrl-C, with what every trial has saved, instead of this process."""

    def stop(number: int) -> None:
        budget.signal = number

    with handle_signals({signal.SIGTERM: stop, signal.SIGINT: stop}):
        yield


def make_scheduler(state: SweepState) -> TrialScheduler:
    """Tune's scheduler of the sweep; ASHA gets the results of trials that ended under earlier drivers."""
    spec = state.spec
    if spec.scheduler == "none":
        return FIFOScheduler()
    scheduler = make_asha(spec)
    for trial in state.trials.values():
        if trial.ended_at is not None:
            replay_results(scheduler, state, trial)
    return scheduler


def make_asha(spec: SweepSpec) -> ASHAScheduler:
    """Scheduler that stops, at each rung, what is not in the best `1 / reduction_factor` of the trials so far."""
    return ASHAScheduler(
        time_attr="epoch",
        metric="compared",
        mode="max",
        max_t=spec.num_epochs,
        grace_period=min(spec.grace_period, spec.num_epochs),
        reduction_factor=spec.reduction_factor,
        stop_last_trials=False,
    )


def replay_results(scheduler: TrialScheduler, state: SweepState, trial: Trial) -> None:
    """Give an ended trial's epochs to a scheduler; ASHA reads no more of a trial than its id."""
    ended: Any = type("EndedTrial", (), {"trial_id": trial.name})()
    controller: Any = None
    scheduler.on_trial_add(controller, ended)
    for epoch, value in state.folder.curve(trial.name, state.spec.objective):
        scheduler.on_trial_result(controller, ended, {"epoch": epoch, "compared": value})
