# ruff: noqa: ARG002 - the names of arguments are Tune's
"""Search: Ray Tune runs the trials, and the sweep's event log records them.

Ray Tune's own snapshots are not used to resume: the event logs say exactly which trials there are and how far each
has come, without unpickling, and also after the budget was raised.
"""

import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.progress import SweepView
from ray_app.commands.tune.space import propose
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.commands.tune.trial import GROUP_RESOURCES, TrialSpec, log_end, run_group_trial, run_trial
from ray_app.commands.tune.trials import Setting, Trial, ranked, trial_name
from ray_app.config.tune import TuneConfig
from ray_app.errors import ConfigError, RunInterrupted, RunStopped
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries
from ray_app.runs.run_dir import CHECKPOINTS, STATES
from ray_app.runs.signals import handle_signals
from ray_app.store.provenance import provenance

INITS_DIR = "init"
"""Folder of a sweep that keeps what its trials start from."""
MAX_FAILURES = 8
"""Times that Tune starts a trial again; one that dies twice at the same step ends sooner."""


def run_search(searcher: "SweepSearcher", pairs: dict[str, SharedDataset], concurrent: int) -> None:
    """Run all trials that are left, `concurrent` at a time. RunStopped: the search was asked to stop."""
    cfg, folder = searcher.sweep.cfg, searcher.folder
    budget = Budget(cfg, folder.used_seconds(), list(searcher.trials.values()))
    if not searcher.num_left or budget.stop_all():
        return
    pairs = searcher.sweep.share_inits(pairs, folder.path / INITS_DIR)
    run, resources = run_trial, {"CPU": cfg.cpus_per_worker, **({"GPU": 1.0} if cfg.use_gpu else {})}
    if cfg.num_workers > 1:
        run, resources = run_group_trial, GROUP_RESOURCES
    with SweepView(folder, transient=True) as searcher.view, handle_signals(dict.fromkeys(SIGNALS, budget.stop)):
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run, placed=pairs), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=make_scheduler(cfg, folder, list(searcher.trials.values())),
                num_samples=searcher.num_left,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"{int(time.time() * 1000)}",
                storage_path=str(folder.path / "ray"),
                stop=budget,
                callbacks=[SweepCallback(searcher, budget)],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        ).fit()
    if budget.signal:
        raise RunInterrupted if budget.signal == signal.SIGINT else RunStopped
    if budget.spent and (unfinished := sum(trial.ended_at is None for trial in searcher.trials.values())):
        print(
            f"{budget.spent}: {unfinished} trials have not ended; resume them with {folder.resume} and a larger "
            "budget",
            file=sys.stderr,
        )


class NotPickled:
    """Mix-in for objects that Tune pickles into its snapshots, which are never restored here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SweepSearcher(NotPickled, Searcher):
    """Every trial of a sweep, and which one comes next. It is the one writer of the sweep's event log."""

    def __init__(self, sweep: SweepContext, folder: SweepDir, log: EventLog) -> None:
        super().__init__(metric="compared", mode="max")
        self.sweep, self.folder, self.log = sweep, folder, log
        self.metadata = folder.metadata()
        self.provenance = provenance(["ray-app", "tune", str(folder)], sweep.fingerprint)
        self.view: SweepView | None = None
        self.trials = {trial.name: trial for trial in folder.trials()}
        recorded = {line["name"] for line in folder.entries() if line["kind"] == "trial_ended"}
        for trial in list(self.trials.values()):
            if trial.ended_at is not None and trial.name not in recorded:  # the driver was killed as the trial ended
                self.record_end(trial)
        self.queue = [trial.name for trial in self.trials.values() if trial.ended_at is None]

    @property
    def num_left(self) -> int:
        """Number of trials that may still be started."""
        return len(self.queue) + max(self.sweep.cfg.max_trials - len(self.trials), 0)

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial, or FINISHED."""
        trial = self.next_trial()
        return Searcher.FINISHED if trial is None else {"trial": self.start(trial)}

    def next_trial(self) -> Trial | None:
        """Return the next trial that has not ended, else a new one. None if there is none."""
        if self.queue:
            return self.trials[self.queue.pop(0)]
        while self.num_left and (setting := propose(self.sweep.cfg, self.sweep.space, list(self.trials.values()))):
            if (trial := self.create(setting)).ended_at is None:
                return trial
        return None

    def create(self, setting: Setting) -> Trial:
        """Log a new trial. One whose setting `train` refuses has failed."""
        index = len(self.trials)
        trial, reason = Trial(index, trial_name(index, setting), setting, 0), None
        try:
            trial = replace(trial, parameters=self.sweep.run(setting).parameters)
        except ConfigError as error:
            reason = str(error)
        fields = {key: getattr(trial, key) for key in ("index", "name", "setting", "parameters")}
        self.log.write("trial_created", **fields, time=time.time())
        self.trials[trial.name] = trial
        if reason is None:
            return trial
        return self.record_end(replace(trial, status="failed", reason=reason, ended_at=time.time()))

    def start(self, trial: Trial) -> TrialSpec:
        """Create the run folder if there is none, log that this driver starts the trial; return the message to it."""
        run = self.folder.run(trial.name)
        context = self.sweep.run(trial.setting, str(run))
        if not run.claimed:
            run.create(context.metadata(f"{self.metadata['name']}/{trial.name}", self.metadata["key"]))
        metadata = run.metadata()
        run.clear_signals()
        tags = {"sweep": self.metadata["name"], "trial": trial.name}
        with run.event_log() as log:
            log.write("run_started", **context.start(metadata, tags, time.time()))
        self.trials[trial.name] = replace(trial, status="running")
        self.show(trial)
        return TrialSpec(
            trial=trial,
            train=context.cfg,
            objective=self.sweep.cfg.objective,
            measure_latency=self.sweep.cfg.secondary_objective == "latency_ms",
            provenance=self.provenance
            | {"run": metadata["name"], "run_key": metadata["key"], "config": context.recorded},
        )

    def process_died(self, name: str, reason: str) -> None:
        """Log that a trial's process died; Tune starts it again."""
        self.log.write("trial_process_died", name=name, reason=reason, time=time.time())

    def end(self, name: str, status: str, error: str | None = None) -> None:
        """Log how a trial ended; also in its own event log, unless its process has done that."""
        trial, run = self.current(name), self.folder.run(name)
        if trial.ended_at is None:
            if status == "KILLED" and self.sweep.cfg.num_workers > 1:
                run.request_stop()  # its workers may be at work: they save, end, and release the event log
            with run.event_log() as log:
                log_end(log, status, error)
            trial = self.current(name)
        self.record_end(trial)

    def current(self, name: str) -> Trial:
        """Return a trial as its own event log has it."""
        return self.folder.current(self.trials[name], self.sweep.cfg.objective)

    def record_end(self, trial: Trial) -> Trial:
        """Log a trial that has ended; delete what only resuming it would need, and weights that are not kept."""
        if trial.status == "failed":
            died = [line for line in self.folder.entries() if line["kind"] == "trial_process_died"]
            reasons = [line["reason"] for line in died if line["name"] == trial.name and line["reason"]]
            if reasons:
                trial = replace(trial, reason=f"{trial.reason} (the last time: {reasons[-1]})")
        self.trials[trial.name] = trial
        self.log.write("trial_ended", **trial.to_dict())
        run = self.folder.run(trial.name)
        best = run.best_on_disk
        for kind in (STATES, CHECKPOINTS):
            run.delete_checkpoints(kind, best)
        if num := self.sweep.cfg.num_to_keep:
            for worse in ranked(list(self.trials.values()))[num:]:
                if worse.ended_at is not None:
                    self.folder.run(worse.name).delete_checkpoints(CHECKPOINTS)
        self.show(trial)
        return trial

    def show(self, trial: Trial) -> None:
        """Show the sweep after this trial has started or ended."""
        if self.view:
            self.view.trial_changed(trial, list(self.trials.values()))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: SweepCallback logs the end."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the event log."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the event log."""


class SweepCallback(NotPickled, tune.Callback):
    """Callback of Tune that logs what happens to trials."""

    def __init__(self, searcher: SweepSearcher, budget: "Budget") -> None:
        self.searcher, self.budget = searcher, budget

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Log the death of the trial's process."""
        self.searcher.process_died(str(trial.config["trial"]), reason_of(trial))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Log that the trial failed for good."""
        reason = reason_of(trial) or "its process failed too often"
        self.searcher.end(str(trial.config["trial"]), "FAILED", reason)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:
        """Log how the trial ended; one that a spent budget cut off has not ended, and can be resumed."""
        name = str(trial.config["trial"])
        if not self.budget.spent or self.searcher.current(name).ended_at is not None:
            self.searcher.end(name, "KILLED")


def reason_of(trial: TuneTrial) -> str:
    """Last line of a failure that Tune has caught, or of what killed the process; empty if Tune has none."""
    error = trial.get_pickled_error() or trial.get_error()
    if error is None:
        return ""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if type(error).__name__ != "TuneError" else lines[-1]) if lines else type(error).__name__


SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""End the search with what every trial has saved, instead of this process."""


class Budget(NotPickled, tune.Stopper):
    """Stopper of Tune: ends the search when hours or GPU hours are used up, or at a signal."""

    def __init__(self, cfg: TuneConfig, used_s: float, trials: list[Trial]) -> None:
        """`used_s`: seconds of search of earlier starts."""
        self._cfg, self._started = cfg, time.monotonic() - used_s
        self._seconds = {trial.name: trial.seconds for trial in trials}
        self.signal = 0
        """Number of the signal that asked it to stop, or 0."""

    def stop(self, number: int) -> None:
        """End the search because of a signal."""
        self.signal = number

    @property
    def spent(self) -> str | None:
        """Reason to end the search, or None."""
        hours = (time.monotonic() - self._started) / 3600
        gpu_hours = sum(self._seconds.values()) / 3600 * (self._cfg.num_workers if self._cfg.use_gpu else 0)
        if self.signal:
            return "the search was asked to stop"
        if self._cfg.max_hours and hours >= self._cfg.max_hours:
            return f"--max-hours {self._cfg.max_hours:g} are used up"
        if self._cfg.max_gpu_hours and gpu_hours >= self._cfg.max_gpu_hours:
            return f"--max-gpu-hours {self._cfg.max_gpu_hours:g} are used up"
        return None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Count the trial's seconds so far, of all its processes; stop no trial alone."""
        if "trial" in result:  # one that ends without a report has none of our metrics
            self._seconds[result["trial"]] = result["seconds"]
        return False

    def stop_all(self) -> bool:
        """Return True if the search ends."""
        return self.spent is not None


def make_scheduler(cfg: TuneConfig, folder: SweepDir, trials: list[Trial]) -> TrialScheduler:
    """Tune's scheduler of the sweep; ASHA gets the results of trials that ended under earlier drivers."""
    if cfg.scheduler == "none":
        return FIFOScheduler()
    scheduler, controller = make_asha(cfg), cast(Any, None)
    for trial in trials:
        path = folder.run(trial.name).path
        if trial.ended_at is not None and (path / EVENT_LOG).is_file():
            ended: Any = SimpleNamespace(trial_id=trial.name)  # ASHA reads no more of a trial than its id
            scheduler.on_trial_add(controller, ended)
            for then in trial.after_each_epoch(entries(path), cfg.objective):
                scheduler.on_trial_result(controller, ended, then.metrics)
    return scheduler


def make_asha(cfg: TuneConfig) -> ASHAScheduler:
    """Scheduler that stops, at each rung, what is not in the best `1 / reduction_factor` of the trials so far."""
    return ASHAScheduler(
        time_attr="epoch",
        metric="compared",
        mode="max",
        max_t=cfg.num_epochs,
        grace_period=min(cfg.grace_period, cfg.num_epochs),
        reduction_factor=cfg.reduction_factor,
        stop_last_trials=False,
    )
