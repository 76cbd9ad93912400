"""One trial of a sweep: the functions that Ray Tune runs, for trials of one worker and of several.

A trial's run folder is all of its state: a process that replaces a killed one resumes from there. Each process
reports the epochs of earlier ones to Tune as well, so that the scheduler of a restarted driver knows them.
"""

import re
import threading
import time
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from ray_app.cluster.reachability import node_is_alive
from ray_app.commands.evaluate.latency import latency_ms
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.launch import run_worker_group
from ray_app.commands.train.loop import WorkerContext, is_finished, train_epochs
from ray_app.commands.train.shared_dataset import SharedDataset, shared_init, shared_worker_data
from ray_app.commands.train.state import TrainState
from ray_app.commands.train.worker import WorkerSpec
from ray_app.commands.tune.context import data_key
from ray_app.commands.tune.trials import Trial
from ray_app.config.train import TrainConfig
from ray_app.runs.event_log import EventLog, entries, entries_since_start, last_start_time, tail
from ray_app.runs.run_dir import RunDir, open_run

GROUP_RESOURCES = {"CPU": 0.0, "memory": 1_000_000}
"""Resources of the process that waits for a worker group: no CPU, which its workers may need; Ray wants a claim."""


@dataclass(frozen=True)
class TrialSpec:
    """Message from the driver to the process that runs a trial."""

    trial: Trial
    """The trial."""
    train: TrainConfig
    """Settings of its training; `out` is its run folder."""
    objective: str
    """Objective of the sweep."""
    measure_latency: bool
    """Measure the latency of one pair."""
    provenance: dict[str, Any]
    """Provenance of its checkpoints."""

    def __str__(self) -> str:
        """Return the name, which Ray Tune puts into names of folders."""
        return self.trial.name

    @property
    def cpus(self) -> float:
        """CPUs of each worker."""
        return self.train.cpus_per_worker or 1.0

    @property
    def threads(self) -> int:
        """Threads that a worker computes with."""
        return max(int(self.cpus), 1)

    def after(self, lines: list[dict[str, Any]]) -> Trial:
        """Return the trial as these lines of its event log have it."""
        return self.trial.after(lines, self.objective)


def log_end(log: EventLog, status: str, error: str | None = None) -> None:
    """Log how a trial ended, without artifacts: its checkpoints stay in its folder."""
    if error is not None:
        log.write("failed", error=error, time=time.time())
    log.write("run_ended", status=status, artifacts=None, time=time.time())


def run_trial(config: dict[str, TrialSpec], placed: dict[str, SharedDataset]) -> None:
    """Train a trial of one worker in this process; `config["trial"]` is its TrialSpec.

    A failure that another attempt would repeat is logged, and the trial ends. Any other error is raised, so that
    Tune starts the trial again; the second one of the same cause ends the trial as well.
    """
    spec = config["trial"]
    torch.set_num_threads(spec.threads)
    with open_run(spec.train.out) as run, run.event_log() as log:
        if entries(run.path)[-1]["kind"] == "run_ended":
            return  # the process before this one was killed between its last line and its last report
        lines = entries_since_start(run.path)
        nodes = {line["node"] for line in lines if line["kind"] == "workers_started"}
        if reason := give_up_reason(lines, dead_nodes(nodes)):
            log_end(log, "FAILED", reason)
            return
        log.write("workers_started", node=ray.get_runtime_context().get_node_id(), time=time.time())
        try:
            train_here(spec, run, log, placed[data_key(spec.train)])
        except Exception as error:
            cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            repeated = is_repeated(cause, entries_since_start(run.path))
            log.write("exception", cause=cause, time=time.time())
            if not repeated:
                raise
            log_end(log, "FAILED", f"twice the same: {cause}")
        else:
            kinds = [line["kind"] for line in entries_since_start(run.path)]
            if "failed" in kinds:
                log_end(log, "FAILED")
            elif kinds[-1] not in ("run_ended", "stopped"):  # its last epoch was saved by a process that was killed
                log_end(log, "FINISHED")


def train_here(spec: TrialSpec, run: RunDir, log: EventLog, data: SharedDataset) -> None:
    """Train in this process and report each epoch to Tune, first those that earlier processes have finished.

    The log is released during a report: Tune may stop this process there, and then the driver logs the end. So an end
    that is reached is logged before its report.
    """

    def report(trial: Trial) -> None:
        with run.released(log):
            tune.report(trial.metrics)

    def epoch_ended(state: TrainState, _: dict[str, Any]) -> None:
        lines = entries(run.path)
        if spec.measure_latency and not any(line["kind"] == "latency" for line in lines):
            log.write("latency", ms=latency_ms(state.objective.adapter))
        if is_finished(state, context.cfg):
            log_end(log, "FINISHED")
        report(spec.after(lines))

    for earlier in spec.trial.after_each_epoch(entries(run.path), spec.objective):
        report(earlier)
    context = RunContext.of(spec.train.at(run.path), data.store, data.split)
    device = torch.device("cuda" if context.cfg.use_gpu else "cpu")
    worker = WorkerContext(context, 0, 1, device, shared_init(data, context))
    train_epochs(worker, run, shared_worker_data(data, worker), log, spec.provenance, epoch_ended)


def run_group_trial(config: dict[str, TrialSpec], placed: dict[str, SharedDataset]) -> None:
    """Train a trial of several workers as a Ray Train group; `config` as in `run_trial`.

    This process waits and reports. Workers that die are started again by Ray Train, not by Tune.
    """
    spec = config["trial"]
    with open_run(spec.train.out) as run:
        run.refresh()
        with run.mirror.syncing():  # without signals, which are the sweep driver's: this process would delete them
            error = train_group(spec, run, placed[data_key(spec.train)])
        if error and not isinstance(error, RayActorError | WorkerGroupError):
            raise error
        lines = entries_since_start(run.path)
        with run.event_log() as log:
            reason = f"its workers died: {str(error).splitlines()[0]}" if error else None
            failed = error is not None or any(line["kind"] == "failed" for line in lines)
            log_end(log, "FAILED" if failed else "FINISHED", reason)
        lines = entries(run.path)
    if any(line["kind"] == "epoch" and line["epoch"] == spec.train.num_epochs for line in lines):
        tune.report(spec.after(lines).metrics)  # last, since Tune may stop this process here


def train_group(spec: TrialSpec, run: RunDir, data: SharedDataset) -> Exception | None:
    """Run the group to its end, and report each epoch but the last to Tune. Return what the group raised, or None."""
    errors, done = list[Exception](), threading.Event()

    def work() -> None:
        name, started = f"{spec}-{int(time.time() * 1000)}", last_start_time(run.path)
        try:
            context = RunContext.of(spec.train, data.store, data.split)
            worker_spec = WorkerSpec(str(run), context, started, True, spec.threads, spec.provenance, data)
            run_worker_group(worker_spec, run, spec.cpus, name)
            run.refresh()
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="group", daemon=True).start()
    lines: list[dict[str, Any]] = []
    for new in tail(run.path, done):
        for line in new:
            lines.append(line)
            if line["kind"] == "epoch" and line["epoch"] < spec.train.num_epochs:
                tune.report(spec.after(lines).metrics)
    return errors[0] if errors else None


def is_repeated(cause: str, lines: list[dict[str, Any]]) -> bool:
    """Return True if an earlier error of these lines has the same cause."""
    return normalise_error(cause) in [normalise_error(line["cause"]) for line in lines if line["kind"] == "exception"]


def normalise_error(cause: str) -> str:
    """Replace the numbers of a cause: addresses, sizes and steps differ from one attempt to the next."""
    return re.sub(r"\b(0x[0-9a-f]+|nan|inf|\d[\d.,_]*(e[+-]?\d+)?)\b", "#", cause, flags=re.IGNORECASE)


def dead_nodes(nodes: Set[str]) -> Set[str]:
    """Node ids, out of these, that have no live raylet."""
    return nodes - {node["NodeID"] for node in ray.nodes() if node["NodeID"] in nodes and node_is_alive(node)}


def give_up_reason(lines: list[dict[str, Any]], dead: Set[str]) -> str | None:
    """Reason not to start a trial again: its process died twice under one driver without a step in between.

    A process that died with its node does not count: the trial did not cause that.
    """
    attempts: list[tuple[int, str]] = []
    step = 0
    for line in lines:
        if line["kind"] == "step":
            step = line["global_step"]
        elif line["kind"] == "workers_started":
            attempts.append((step, line["node"]))
        elif line["kind"] == "exception":  # its process lived to log it
            attempts.pop()
    deaths = [died_at for died_at, node in attempts if node not in dead]
    if len(deaths) >= 2 and deaths[-1] == step:
        return f"its process died twice before step {step + 1}"
    return None
