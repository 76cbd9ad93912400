# ruff: noqa: ARG002 - the names of arguments are Tune's
"""The driver's side of a sweep: Ray Tune runs trials, this tells it which, and writes down what becomes of them.

Tune's own records are not gone back to: which trials there are and how they stand is read from the sweep's event log.
"""

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_app.commands.train.command import persisted_config
from ray_app.commands.train.state import parameters
from ray_app.commands.tune.searchers import Direction, TrialRecord, propose
from ray_app.commands.tune.spec import Setting, SweepSpec, space_of, train_config
from ray_app.commands.tune.sweep_dir import SweepDir, Trial, trial_name
from ray_app.config.base import flat
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError
from ray_app.runs.event_log import EventLog
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance


class SweepState:
    """Every trial of the sweep, in memory and in the event log that this is the one writer of."""

    def __init__(self, folder: SweepDir, log: EventLog, stores: dict[str, PairStore], more: dict[str, Any]) -> None:
        """`stores` by `data_key`; `more`: settings of every trial's TrainConfig, such as the tracking server."""
        self.folder, self.spec, self.log, self.stores, self.more = folder, folder.spec, log, stores, more
        self.space = space_of(self.spec)
        about = folder.metadata()
        self.sweep_key, self.name = about["key"], about["name"]
        self.provenance = provenance(["ray-app", "tune", str(folder)], about["store_fingerprint"])
        self.trials = {trial.name: trial for trial in folder.trials()}
        self.on_change: Callable[[Trial], None] = lambda _: None
        for trial in list(self.trials.values()):
            if trial.status in ("finished", "failed", "stopped") and not self.is_recorded(trial):
                self.end(trial)
        self.queue = [trial.name for trial in self.trials.values() if trial.ended_at is None]

    def is_recorded(self, trial: Trial) -> bool:
        """Whether the sweep's event log says how it ended."""
        return any(line["kind"] == "trial_ended" and line["name"] == trial.name for line in self.folder.entries())

    @property
    def left(self) -> int:
        """Trials that may still be proposed."""
        return max(self.spec.max_trials - len(self.trials), 0)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return ("maximize", "minimize") if self.spec.secondary_objective else ("maximize",)

    def next_trial(self) -> Trial | None:
        """One that has not ended yet, else a new one; None where there is none."""
        while self.queue:
            return self.log_start(self.trials[self.queue.pop(0)])
        while self.left:
            tried = [self.tried(trial) for trial in self.trials.values()]
            setting = propose(self.spec.search_alg, self.space, self.spec.seed, tried, self.directions)
            if setting is None:
                return None
            if trial := self.add(setting):
                return self.log_start(trial)
        return None

    def tried(self, trial: Trial) -> TrialRecord:
        """A trial as the searcher knows it."""
        values: tuple[float, ...] = ()
        second = getattr(trial, self.spec.secondary_objective) if self.spec.secondary_objective else None
        if trial.objective is not None:
            values = (trial.objective,)
            if self.spec.secondary_objective:
                values = (trial.objective, float(second)) if second is not None else ()
        state = trial.status if trial.ended_at is not None else "running"
        return TrialRecord(trial.setting, state, values, trial.epochs)  # type: ignore[arg-type]  # waiting ends with ended_at

    def add(self, setting: Setting) -> Trial | None:
        """Writes a new trial down. None: `train` refuses the setting, which is written down too."""
        index = self.spec.max_trials - self.left
        name = trial_name(index, setting)
        try:
            cfg = self.config(name, setting)
        except ConfigError as error:
            trial = self.write(Trial(index, name, setting, 0))
            self.end(replace(trial, status="failed", reason=str(error), ended_at=time.time()))
            return None
        return self.write(Trial(index, name, setting, parameters(cfg, self.stores[data_key(cfg)])))

    def write(self, trial: Trial) -> Trial:
        """A trial that is tried from now on."""
        told = {key: getattr(trial, key) for key in ("index", "name", "setting", "parameters")}
        self.log.write("trial_created", **told, time=time.time())
        self.trials[trial.name] = trial
        return trial

    def trial_config(self, trial: Trial) -> dict[str, Any]:
        """What `run_trial` is told."""
        cfg, about = self.config(trial.name, trial.setting), self.folder.run(trial.name).metadata()
        return {
            "name": trial.name,
            "setting": trial.setting,
            "train": flat(cfg),
            "data": data_key(cfg),
            "objective": self.spec.objective,
            "latency": self.spec.secondary_objective == "latency_ms",
            "threads": max(int(self.spec.cpus_per_worker), 1),
            "provenance": {**self.provenance, "run": about["name"], "run_key": about["key"]},
        }

    def config(self, name: str, setting: Setting) -> TrainConfig:
        """A trial's settings of `train`."""
        return train_config(self.spec, setting, str(self.folder.run(name)), **self.more)

    def log_start(self, trial: Trial) -> Trial:
        """Its run folder, and a word to its event log that a driver begins."""
        cfg, run = self.config(trial.name, trial.setting), self.folder.run(trial.name)
        fingerprint = self.folder.metadata()["store_fingerprint"]
        if not run.claimed:
            run.create(
                {
                    "name": f"{self.name}/{trial.name}",
                    "key": uuid.uuid4().hex,
                    "store_fingerprint": fingerprint,
                    "config": persisted_config(cfg),
                }
            )
        about = run.metadata()
        run.clear_signals()
        with run.event_log() as log:
            log.write(
                "run_started",
                name=about["name"],
                key=about["key"],
                parent_key=self.sweep_key,
                experiment=cfg.experiment,
                params={**persisted_config(cfg), "parameters": trial.parameters},
                tags={"sweep": self.name, "trial": trial.name, "dataset_fingerprint": fingerprint},
                workers=cfg.max_workers,
                time=time.time(),
            )
        return trial

    def died(self, name: str, reason: str) -> None:
        """A trial's process did; it is started again."""
        self.log.write("trial_process_died", name=name, reason=reason, time=time.time())

    def stopped(self, name: str) -> None:
        """The scheduler stopped a trial: its event log ends, and how it stands is written down."""
        trial = self.trial_status(name)
        if trial.ended_at is None:
            run = self.folder.run(name)
            if self.spec.num_workers > 1:
                run.request_stop()  # its workers may be at work: they save, end, and let the event log go
            with run.event_log() as log:
                log.write("run_ended", status="KILLED", artifacts=None, time=time.time())
        self.end(self.trial_status(name))

    def failed(self, name: str, reason: str) -> None:
        """A trial failed for good."""
        with self.folder.run(name).event_log() as log:
            log.write("failed", error=reason, time=time.time())
            log.write("run_ended", status="FAILED", artifacts=None, time=time.time())
        self.end(self.trial_status(name))

    def trial_status(self, name: str) -> Trial:
        """How a trial stands by its own event log."""
        return Trial(**asdict(self.trials[name]) | self.folder.trial_status(name, self.spec))

    def end(self, trial: Trial) -> None:
        """Writes down how a trial ended; weights that nobody will ask for go."""
        if trial.status == "failed" and (deaths := [d["reason"] for d in self.deaths(trial.name) if d["reason"]]):
            trial = replace(trial, reason=f"{trial.reason} (the last time: {deaths[-1]})")
        self.trials[trial.name] = trial
        self.folder.end_trial(self.log, trial)
        self.folder.prune_checkpoints(list(self.trials.values()), self.spec.num_to_keep)
        self.on_change(trial)

    def deaths(self, name: str) -> Iterable[dict[str, Any]]:
        """What was told of a trial's processes."""
        return [
            line for line in self.folder.entries() if line["kind"] == "trial_process_died" and line["name"] == name
        ]


def data_key(cfg: TrainConfig) -> str:
    """Which of a sweep's data sets a run uses."""
    return "+".join(cfg.durations) or "all"


class NotPickled:
    """Tune pickles what it is given, for a restore that is never asked of it here: nothing of ours goes in."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ReplaySearcher(NotPickled, Searcher):
    """Hands the record's trials to Tune. It keeps nothing, so there is nothing to save."""

    def __init__(self, record: SweepState) -> None:
        super().__init__(metric="compared", mode="max")
        self.record = record

    def suggest(self, trial_id: str) -> Any:
        trial = self.record.next_trial()
        return Searcher.FINISHED if trial is None else {"trial": self.record.trial_config(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The recorder has seen to it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class SweepCallback(NotPickled, tune.Callback):
    """Writes down what Tune tells of trials."""

    def __init__(self, record: SweepState, budget: "Budget") -> None:
        self.record, self.budget = record, budget

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        self.budget.started(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        self.record.died(trial.config["trial"]["name"], reason_of(trial))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        self.budget.ended(trial.trial_id)
        self.record.failed(trial.config["trial"]["name"], reason_of(trial) or "its process failed too often")

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        name = trial.config["trial"]["name"]
        self.budget.ended(trial.trial_id)
        if not self.budget.spent or self.record.trial_status(name).ended_at is not None:
            self.record.stopped(name)


def reason_of(trial: TuneTrial) -> str:
    """The last line of what Tune knows of a failure; nothing of one that the trial's event log tells of."""
    error = trial.get_pickled_error() or trial.get_error()
    if error is None:
        return ""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if type(error).__name__ != "TuneError" else lines[-1]) if lines else type(error).__name__


class Budget(NotPickled, tune.Stopper):
    """Ends the search when hours or GPU hours are used up, or when it is asked to stop."""

    def __init__(self, spec: SweepSpec, used_s: float, trial_s: float) -> None:
        """`used_s`: of earlier starts; `trial_s`: of all trials so far."""
        self._spec, self._before_s, self._trial_s = spec, used_s, trial_s
        self._began = time.monotonic()
        self._running: dict[str, float] = {}
        self.asked = 0
        """The signal that asked it to stop."""

    @property
    def used_hours(self) -> float:
        """Of search, all starts together."""
        return (self._before_s + time.monotonic() - self._began) / 3600

    @property
    def used_gpu_hours(self) -> float:
        """Of all trials."""
        running = sum(time.monotonic() - began for began in self._running.values())
        return (self._trial_s + running) / 3600 * (self._spec.num_workers if self._spec.use_gpu else 0)

    @property
    def spent(self) -> str | None:
        """What ends the search, in words."""
        if self.asked:
            return "it was asked to stop"
        if self._spec.max_hours and self.used_hours >= self._spec.max_hours:
            return f"--max-hours {self._spec.max_hours:g} are used up"
        if self._spec.max_gpu_hours and self.used_gpu_hours >= self._spec.max_gpu_hours:
            return f"--max-gpu-hours {self._spec.max_gpu_hours:g} are used up"
        return None

    def started(self, trial_id: str) -> None:
        self._running[trial_id] = time.monotonic()

    def ended(self, trial_id: str) -> None:
        self._trial_s += time.monotonic() - self._running.pop(trial_id, time.monotonic())

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.spent is not None


def scheduler_of(spec: SweepSpec, record: SweepState) -> TrialScheduler:
    """Tune's scheduler; one that compares is told of the trials that ended under earlier drivers."""
    if spec.scheduler == "none":
        return FIFOScheduler()
    scheduler = asha_of(spec)
    for trial in record.trials.values():
        if trial.ended_at is not None:
            replay_results(scheduler, record, trial)
    return scheduler


def asha_of(spec: SweepSpec) -> ASHAScheduler:
    """Stops at each rung what is not among the best one in `reduction_factor` of those that were there before."""
    return ASHAScheduler(
        time_attr="epoch",
        metric="compared",
        mode="max",
        max_t=spec.num_epochs,
        grace_period=min(spec.grace_period, spec.num_epochs),
        reduction_factor=spec.reduction_factor,
        stop_last_trials=False,
    )


def replay_results(scheduler: TrialScheduler, record: SweepState, trial: Trial) -> None:
    """An ended trial's epochs, to a scheduler that never saw them. It reads no more of a trial than its id."""
    named: Any = type("Past", (), {"trial_id": trial.name})()
    controller: Any = None
    scheduler.on_trial_add(controller, named)
    for epoch, value in record.folder.curve(trial.name, record.spec.objective):
        scheduler.on_trial_result(controller, named, {"epoch": epoch, "compared": value})
