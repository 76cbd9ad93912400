"""Driver side of `ray-app train`: resolves the run, launches the workers, records progress in the event log."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_app.cluster.connection import cluster
from ray_app.cluster.raylet_watch import explain_raylet_death
from ray_app.commands.train.context import RunContext, open_run_context, strategy_of
from ray_app.commands.train.launch import run_training, with_resume_hint
from ray_app.commands.train.plan import ResourcePlan, make_plan
from ray_app.commands.train.progress import TrainingProgress
from ray_app.commands.train.summary import render_train, run_summary
from ray_app.commands.train.worker import WorkerSpec
from ray_app.config.train import TrainConfig
from ray_app.core.advice import WHY
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.errors import RunInterrupted, RunStopped
from ray_app.runs.event_log import entries
from ray_app.runs.run_dir import RunDir, open_run
from ray_app.runs.signals import handle_signals
from ray_app.store.provenance import provenance
from ray_app.tracking.tracker import Tracker

__all__ = ["render_train", "run_train"]


def run_train(cfg: TrainConfig, parent_key: str | None = None) -> dict[str, Any]:
    """Train an adapter, or resume a run; return the --json object. `parent_key`: key of the sweep it belongs to.

    RunStopped: SIGTERM came and the run is saved. ConfigError, StoreError, ResourceError: raised before training.
    """
    context = open_run_context(cfg)
    if cfg.strategy is None:
        chosen = strategy_of(context.cfg)
        print(f"strategy: {chosen} ({WHY[chosen]}); --strategy lightweight is the reference's", file=sys.stderr)
    if context.division.reason:
        print(context.division.reason, file=sys.stderr)
    cfg = context.cfg
    with cluster(cfg.address) as info, open_run(cfg.out) as run:
        plan = make_plan(context, run.path, info)
        new = None if cfg.resume else context.metadata(context.name, parent_key)
        advice = f"What was saved is whole; resume with: {run.resume}"
        with run.exclusive(new), explain_raylet_death(advice), with_resume_hint(run):
            return _train(context, plan, run, own_cluster=info.own)


def _train(context: RunContext, plan: ResourcePlan, run: RunDir, *, own_cluster: bool) -> dict[str, Any]:
    """Train on the connected cluster, in a run that this process drives."""
    clock, started = time.perf_counter(), time.time()
    cfg, metadata = context.cfg, run.metadata()
    named = {"run": metadata["name"], "run_key": metadata["key"], "config": context.recorded}
    origin = provenance(sys.argv, context.store.fingerprint, **named)
    with run.event_log() as log:
        if any(line.get("status") == "FINISHED" for line in entries(run.path)[-1:]):
            print(f"{run} is finished; nothing is left to train", file=sys.stderr)
        log.write("run_started", **context.start(metadata, {"git": str(origin.get("git"))}, started))
    spec = WorkerSpec(str(run), context, started, plan.in_memory, plan.threads, origin)
    tracker = Tracker(cfg, run.path, str(run))
    status, best = "FAILED", None
    try:
        steps = ShardedBatchOrder(len(context.split.train), cfg.batch_size, cfg.seed).steps * cfg.num_epochs
        with stop_when_terminated(run), TrainingProgress(run.path, steps) as progress, run.synced():
            name = f"{metadata['name']}-{int(started * 1000)}"
            run_training(spec, run, plan.cpus_per_worker, name, progress.show, own_cluster=own_cluster)
        last = entries(run.path)[-1]
        if last["kind"] == "stopped":
            raise RunStopped(f"stopped on request after step {last['global_step']}; resume with: {run.resume}")
        status, best = "FINISHED", run.best()
    except RunStopped:
        status = "KILLED"
        raise
    finally:
        with run.event_log(started) as log:
            artifacts = str(best.relative_to(run.path)) if best else None
            log.write("run_ended", status=status, artifacts=artifacts, time=time.time())
        tracked = {"tracked": tracker.close(), **tracker.summary()}
    return run_summary(context, run, plan, tracked, time.perf_counter() - clock)


@contextmanager
def stop_when_terminated(run: RunDir) -> Iterator[None]:
    """Make SIGTERM ask the workers to save and end. RunInterrupted: Ctrl-C, which Ray Train answers by exiting."""
    # Ray Train installs a handler for SIGINT of its own: the one from before is put back.
    handlers = {signal.SIGTERM: lambda _: run.stop_file.touch(), signal.SIGINT: None}
    try:
        with handle_signals(handlers):
            yield
    except (KeyboardInterrupt, SystemExit):
        raise RunInterrupted(f"interrupted; what was saved before is whole, resume with: {run.resume}") from None
