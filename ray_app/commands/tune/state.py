"""State of a sweep: its trials, in memory and in the event log, and which one comes next.

Ray Tune's own snapshots are not used to resume: the event logs say exactly which trials there are and how far each
has come, without unpickling, and also after the budget was raised.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ray_app.commands.train.context import RunContext, persisted_config
from ray_app.commands.tune.searchers import Direction, TrialRecord, propose
from ray_app.commands.tune.spec import Setting, data_key, space_of, train_config
from ray_app.commands.tune.sweep_dir import SweepDir, Trial, trial_name
from ray_app.commands.tune.trial import TrialSpec
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError
from ray_app.runs.event_log import EventLog
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance


class SweepState:
    """Every trial of a sweep. It is the one writer of the sweep's event log."""

    def __init__(self, folder: SweepDir, log: EventLog, stores: dict[str, PairStore], common: dict[str, Any]) -> None:
        """`stores` by `data_key`; `common`: settings of every trial's TrainConfig, such as the tracking server."""
        self.folder, self.spec, self.log, self.stores, self.common = folder, folder.spec, log, stores, common
        self.space = space_of(self.spec)
        metadata = folder.metadata()
        self.key, self.name, self.fingerprint = (metadata[key] for key in ("key", "name", "store_fingerprint"))
        self.provenance = provenance(["ray-app", "tune", str(folder)], self.fingerprint)
        self.trials = {trial.name: trial for trial in folder.trials()}
        self.on_change: Callable[[Trial], None] = lambda _: None
        recorded = {line["name"] for line in folder.entries() if line["kind"] == "trial_ended"}
        for trial in list(self.trials.values()):
            if trial.ended_at is not None and trial.name not in recorded:  # the driver was killed as the trial ended
                self.end(trial)
        self.queue = [trial.name for trial in self.trials.values() if trial.ended_at is None]

    @property
    def left(self) -> int:
        """Number of trials that may still be proposed."""
        return max(self.spec.max_trials - len(self.trials), 0)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions of the objectives, for the search algorithm."""
        return ("maximize", "minimize") if self.spec.secondary_objective else ("maximize",)

    def next_trial(self) -> Trial | None:
        """Start the next trial that has not ended, else a new one. None if there is none."""
        if self.queue:
            return self.start(self.trials[self.queue.pop(0)])
        while self.left:
            tried = [self.record_of(trial) for trial in self.trials.values()]
            setting = propose(self.spec.search_alg, self.space, self.spec.seed, tried, self.directions)
            if setting is None:
                return None
            if trial := self.add(setting):
                return self.start(trial)
        return None

    def record_of(self, trial: Trial) -> TrialRecord:
        """Facts about a trial that the search algorithm needs."""
        values: tuple[float, ...] = () if trial.objective is None else (trial.objective,)
        if values and self.spec.secondary_objective:
            second = getattr(trial, self.spec.secondary_objective)
            values = () if second is None else (*values, float(second))
        state = trial.status if trial.ended_at is not None else "running"
        return TrialRecord(trial.setting, state, values, trial.epochs)  # type: ignore[arg-type]  # waiting ends with ended_at

    def add(self, setting: Setting) -> Trial | None:
        """Log a new trial. None if `train` refuses the setting, which is logged too."""
        index = len(self.trials)
        name = trial_name(index, setting)
        trial, reason = Trial(index, name, setting, 0), None
        try:
            cfg = self.config(name, setting)
            trial = replace(trial, parameters=RunContext.of(cfg, self.stores[data_key(cfg)]).parameters)
        except ConfigError as error:
            reason = str(error)
        fields = {key: getattr(trial, key) for key in ("index", "name", "setting", "parameters")}
        self.log.write("trial_created", **fields, time=time.time())
        self.trials[name] = trial
        if reason is None:
            return trial
        self.end(replace(trial, status="failed", reason=reason, ended_at=time.time()))
        return None

    def config(self, name: str, setting: Setting) -> TrainConfig:
        """Settings of a trial's training."""
        return train_config(self.spec, setting, str(self.folder.run(name)), **self.common)

    def trial_spec(self, trial: Trial) -> TrialSpec:
        """Message to the process that runs a trial."""
        cfg, metadata = self.config(trial.name, trial.setting), self.folder.run(trial.name).metadata()
        return TrialSpec(
            name=trial.name,
            train=cfg,
            data=data_key(cfg),
            objective=self.spec.objective,
            measure_latency=self.spec.secondary_objective == "latency_ms",
            threads=max(int(self.spec.cpus_per_worker), 1),
            provenance={**self.provenance, "run": metadata["name"], "run_key": metadata["key"]},
        )

    def start(self, trial: Trial) -> Trial:
        """Create the run folder if there is none, and log that this driver starts the trial."""
        cfg, run = self.config(trial.name, trial.setting), self.folder.run(trial.name)
        if not run.claimed:
            run.create(
                {
                    "name": f"{self.name}/{trial.name}",
                    "key": uuid.uuid4().hex,
                    "store_fingerprint": self.fingerprint,
                    "config": persisted_config(cfg),
                }
            )
        metadata = run.metadata()
        run.clear_signals()
        with run.event_log() as log:
            log.write(
                "run_started",
                name=metadata["name"],
                key=metadata["key"],
                parent_key=self.key,
                experiment=cfg.experiment,
                params={**persisted_config(cfg), "parameters": trial.parameters},
                tags={"sweep": self.name, "trial": trial.name, "dataset_fingerprint": self.fingerprint},
                workers=cfg.max_workers,
                time=time.time(),
            )
        self.on_change(trial)
        return trial

    def process_died(self, name: str, reason: str) -> None:
        """Log that a trial's process died; Tune starts it again."""
        self.log.write("trial_process_died", name=name, reason=reason, time=time.time())

    def stopped(self, name: str) -> None:
        """Log how a trial ended that Tune has completed: finished by itself, or stopped by the scheduler."""
        if self.trial_status(name).ended_at is None:
            run = self.folder.run(name)
            if self.spec.num_workers > 1:
                run.request_stop()  # its workers may be at work: they save, end, and release the event log
            with run.event_log() as log:
                log.write("run_ended", status="KILLED", artifacts=None, time=time.time())
        self.end(self.trial_status(name))

    def failed(self, name: str, reason: str) -> None:
        """Log that a trial failed for good."""
        with self.folder.run(name).event_log() as log:
            log.write("failed", error=reason, time=time.time())
            log.write("run_ended", status="FAILED", artifacts=None, time=time.time())
        self.end(self.trial_status(name))

    def trial_status(self, name: str) -> Trial:
        """A trial as its own event log has it."""
        return Trial(**asdict(self.trials[name]) | self.folder.trial_status(name, self.spec))

    def end(self, trial: Trial) -> None:
        """Log how a trial ended, and delete weights that are not kept."""
        if trial.status == "failed":
            died = [line for line in self.folder.entries() if line["kind"] == "trial_process_died"]
            reasons = [line["reason"] for line in died if line["name"] == trial.name and line["reason"]]
            if reasons:
                trial = replace(trial, reason=f"{trial.reason} (the last time: {reasons[-1]})")
        self.trials[trial.name] = trial
        self.folder.end_trial(self.log, trial)
        self.folder.prune_checkpoints(list(self.trials.values()), self.spec.num_to_keep)
        self.on_change(trial)
