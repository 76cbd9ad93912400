"""One trial of a sweep: the functions that Ray Tune runs, for trials of one worker and of several.

A trial's run folder is all of its state: a process that replaces a killed one resumes from there. Each process
reports the epochs of earlier ones to Tune as well, so that the scheduler of a restarted driver knows them.
"""

import re
import threading
import time
from collections.abc import Set
from dataclasses import dataclass, replace
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
from ray_app.commands.tune.sweep_dir import scheduler_metric, scores
from ray_app.config.train import TrainConfig
from ray_app.core.metrics import THETA, rate_key
from ray_app.runs.event_log import EventLog, entries, entries_since_start, last_start_time, tail
from ray_app.runs.run_dir import RunDir, open_run

RATE_METRIC = f"cosine_accept_rate_{rate_key(THETA)}"
GROUP_RESOURCES = {"CPU": 0.0, "memory": 1_000_000}
"""Resources of the process that waits for a worker group: no CPU, which its workers may need; Ray wants a claim."""


@dataclass(frozen=True)
class TrialSpec:
    """Message from the driver to the process that runs a trial."""

    name: str
    """Name of the trial."""
    train: TrainConfig
    """Settings of its training; `out` is its run folder."""
    data: str
    """Key of its data set in `placed`."""
    objective: str
    """Objective of the sweep."""
    measure_latency: bool
    """Measure the latency of one pair."""
    threads: int
    """Threads that a worker computes with."""
    provenance: dict[str, Any]
    """Provenance of its checkpoints."""

    def __str__(self) -> str:
        """Return the name, which Ray Tune puts into names of folders."""
        return self.name


def run_trial(config: dict[str, TrialSpec], placed: dict[str, SharedDataset]) -> None:
    """Train a trial of one worker in this process; `config["trial"]` is its TrialSpec.

    A failure that another attempt would repeat is logged, and the trial ends. Any other error is raised, so that
    Tune starts the trial again; the second one of the same cause ends the trial as well.
    """
    spec = config["trial"]
    torch.set_num_threads(spec.threads)
    with open_run(spec.train.out) as run, run.event_log() as log:
        spec = replace(spec, train=spec.train.at(run.path))
        if entries(run.path)[-1]["kind"] == "run_ended":
            return  # the process before this one was killed between its last line and its last report
        reporter = TrialReporter(spec, run, log)
        lines = entries_since_start(run.path)
        nodes = {line["node"] for line in lines if line["kind"] == "workers_started"}
        if reason := give_up_reason(lines, dead_nodes(nodes)):
            reporter.fail(reason)
            return
        log.write("workers_started", node=ray.get_runtime_context().get_node_id(), time=time.time())
        try:
            reporter.report_past_epochs()
            data = placed[spec.data]
            device = torch.device("cuda" if spec.train.use_gpu else "cpu")
            context = RunContext.of(spec.train, data.store, data.split)
            worker = WorkerContext(context, 0, 1, device, shared_init(data, context))
            train_epochs(worker, run, shared_worker_data(data, worker), log, spec.provenance, reporter.report_epoch)
        except Exception as error:
            reporter.retry_or_fail(error)
        else:
            if any(line["kind"] == "failed" for line in entries_since_start(run.path)):
                reporter.end("FAILED")


class TrialReporter:
    """Reports of a trial of one worker, to its event log and to Tune."""

    def __init__(self, spec: TrialSpec, run: RunDir, log: EventLog) -> None:
        self.spec, self.run, self.log = spec, run, log

    def report_epoch(self, state: TrainState, _: dict[str, Any]) -> None:
        """Report one epoch. The end is logged first, since Tune may stop this process at a report."""
        lines = entries(self.run.path)
        if self.spec.measure_latency and not any(line["kind"] == "latency" for line in lines):
            self.log.write("latency", ms=latency_ms(state.objective.adapter))
        if is_finished(state, self.spec.train):
            self.end("FINISHED")
        self._report(lines, state.epoch)

    def report_past_epochs(self) -> None:
        """Report what earlier processes have done."""
        lines = entries(self.run.path)
        for n, line in enumerate(lines, 1):
            if line["kind"] == "epoch":
                self._report(lines[:n], line["epoch"])

    def _report(self, lines: list[dict[str, Any]], epoch: int) -> None:
        """Report to Tune, with the log released: Tune may stop this process here, and the driver ends the log."""
        with self.run.released(self.log):
            tune.report(metrics_of(lines, epoch, self.spec.objective))

    def end(self, status: str) -> None:
        """Log the end, without artifacts: checkpoints of trials stay in their folders."""
        self.log.write("run_ended", status=status, artifacts=None, time=time.time())

    def fail(self, reason: str) -> None:
        """End the trial for a reason."""
        self.log.write("failed", error=reason, time=time.time())
        self.end("FAILED")

    def retry_or_fail(self, error: Exception) -> None:
        """Raise the error for another attempt, or end the trial if it is the second error of its cause."""
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        repeated = is_repeated(cause, entries_since_start(self.run.path))
        self.log.write("exception", cause=cause, time=time.time())
        if not repeated:
            raise error
        self.fail(f"twice the same: {cause}")


def run_group_trial(config: dict[str, TrialSpec], placed: dict[str, SharedDataset]) -> None:
    """Train a trial of several workers as a Ray Train group; `config` as in `run_trial`.

    This process waits and reports. Workers that die are started again by Ray Train, not by Tune.
    """
    spec = config["trial"]
    with open_run(spec.train.out) as run:
        run.refresh()
        with run.mirror.syncing():  # without signals, which are the sweep driver's: this process would delete them
            error = train_group(spec, run, placed[spec.data])
        if error and not isinstance(error, RayActorError | WorkerGroupError):
            raise error
        lines = entries_since_start(run.path)
        with run.event_log() as log:
            if error:
                log.write("failed", error=f"its workers died: {str(error).splitlines()[0]}", time=time.time())
            failed = error is not None or any(line["kind"] == "failed" for line in lines)
            log.write("run_ended", status="FAILED" if failed else "FINISHED", artifacts=None, time=time.time())
        lines = entries(run.path)
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch"]
    if epochs and epochs[-1] == spec.train.num_epochs:  # reported last, since Tune may stop this process at a report
        tune.report(metrics_of(lines, epochs[-1], spec.objective))


def train_group(spec: TrialSpec, run: RunDir, data: SharedDataset) -> Exception | None:
    """Run the group to its end, and report each epoch but the last to Tune. Return what the group raised, or None."""
    cfg, errors, done = spec.train, list[Exception](), threading.Event()

    def work() -> None:
        name, cpus = f"{spec.name}-{int(time.time() * 1000)}", cfg.cpus_per_worker or 1.0
        started = last_start_time(run.path)
        try:
            context = RunContext.of(cfg, data.store, data.split)
            worker_spec = WorkerSpec(str(run), context, started, True, spec.threads, spec.provenance, data)
            run_worker_group(worker_spec, run, cpus, name)
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
            if line["kind"] == "epoch" and line["epoch"] < cfg.num_epochs:
                tune.report(metrics_of(lines, line["epoch"], spec.objective))
    return errors[0] if errors else None


def metrics_of(lines: list[dict[str, Any]], epoch: int, objective: str) -> dict[str, Any]:
    """Metrics that Tune gets after an epoch."""
    best = scores(lines, objective)
    return {
        "epoch": epoch,
        "compared": scheduler_metric(lines, objective),
        RATE_METRIC: best["accept_rate"],
        "lift": best["lift"],
    }


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
