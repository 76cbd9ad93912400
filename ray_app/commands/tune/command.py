"""`ray-app tune`: from the YAML file of a sweep to a winner that is evaluated on the test part."""

import json
import shlex
import sys
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

from rich.console import Console

from ray_app.cluster.autoscaler import wait_for_autoscaler
from ray_app.cluster.connection import cluster
from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.tune.datasets import open_stores, require_same_store, share_parts
from ray_app.commands.tune.estimate import Estimate, estimate_sweep, largest, max_concurrent
from ray_app.commands.tune.final_training import run_final
from ray_app.commands.tune.progress import trials_table, watch
from ray_app.commands.tune.report import write_page
from ray_app.commands.tune.search import search
from ray_app.commands.tune.spec import SweepSpec, describe_space, read_spec
from ray_app.commands.tune.state import SweepState
from ray_app.commands.tune.summary import sweep_summary
from ray_app.commands.tune.sweep_dir import SWEEP, SweepDir, Trial, best_of, open_sweep
from ray_app.commands.tune.trial import normalise_error
from ray_app.config.base import TrackingFlags, flat
from ray_app.config.tune import TuneConfig
from ray_app.errors import ConfigError, RunInterrupted, RunStopped, TrainingError
from ray_app.parsing.redact import redact
from ray_app.runs.event_log import EVENT_LOG, EventLog
from ray_app.runs.run_dir import RunDir
from ray_app.terminal import make_console
from ray_app.tracking.mlflow_logger import Tracker, sync_run, tracking_uri

BUDGET = ("max_trials", "max_hours", "max_gpu_hours")
"""Settings that a resumed sweep may change."""


def run_tune(cfg: TuneConfig) -> dict[str, Any]:
    """Search, or resume a sweep, or show one; return the --json object.

    ConfigError, StoreError, ResourceError: before the first trial. RunStopped: it was asked to stop and can be
    resumed. TrainingError: all trials failed, or none finished an epoch.
    """
    if cfg.watch:
        with open_sweep(cfg.watch) as folder:
            watch(folder)
            return sweep_summary(folder)
    uri = tracking_uri(cfg)  # fails early on a bad URI
    with ExitStack() as stack:
        if cfg.resume:
            folder = stack.enter_context(open_sweep(cfg.resume))
            require_resumable(cfg, folder)
            log = stack.enter_context(folder.exclusive())
            spec = load_for_resume(cfg, folder)
        else:
            spec = new_sweep_spec(cfg)
            folder = stack.enter_context(open_sweep(spec.out))
            folder.require_free()
        stores = open_stores(spec)
        if cfg.resume:
            require_same_store(folder, stores)
        info = stack.enter_context(cluster(cfg.address, dashboard=spec.num_workers > 1))
        most = largest(spec, next(iter(stores.values())))
        at_once = spec.num_workers * (spec.max_concurrent_trials or 1)
        info = wait_for_autoscaler(info, at_once, spec.cpus_per_worker, spec.use_gpu)
        max_concurrent(spec, info, {}, most)  # fails early on a space that is too large
        placed = share_parts(spec, stores)
        concurrent = max_concurrent(spec, info, placed, most)
        if not cfg.resume:
            confirm_estimate(cfg, spec, estimate_sweep(spec, placed, concurrent))
            log = stack.enter_context(folder.exclusive(sweep_metadata(folder, spec, placed, uri)))
        log_start(folder, spec, log, cfg, {"concurrent_trials": concurrent, "cpus": info.cpus})
        tracking = {"tracking_uri": uri, "experiment": cfg.experiment, "model_name": cfg.model_name}
        run_sweep(cfg, SweepState(folder, log, stores, tracking), placed, concurrent)
        return sweep_summary(folder)


def run_sweep(cfg: TuneConfig, state: SweepState, placed: dict[str, SharedDataset], concurrent: int) -> None:
    """Search, then train the winner; log the end in any case. RunStopped: it was asked to stop."""
    folder, log = state.folder, state.log
    tracker = SweepTracker(cfg, folder)
    status = "FAILED"
    try:
        search(state, placed, concurrent)
        best = best_trial(state)
        if cfg.final:
            placed.clear()  # the final training needs its memory
            run_final(cfg, folder, log, best)
        status = "FINISHED"
    except (RunStopped, KeyboardInterrupt) as stop:
        status = "KILLED"
        kind = RunInterrupted if isinstance(stop, KeyboardInterrupt) else type(stop)
        raise kind(f"stopped on request; resume with: {folder.resume}") from None
    finally:
        log.write("run_ended", status=status, artifacts=None, time=time.time())
        write_page(folder)
        tracker.close()


def new_sweep_spec(cfg: TuneConfig) -> SweepSpec:
    """The sweep of the YAML file, with the flags' changes."""
    assert cfg.file is not None
    changes = {name: getattr(cfg, name) for name in ("store", "out", *BUDGET)}
    return read_spec(cfg.file, {**changes, "use_gpu": cfg.use_gpu or None})


def require_resumable(cfg: TuneConfig, folder: SweepDir) -> None:
    """Raise ConfigError if more than the budget is to change, StoreError if there is no sweep or no event log."""
    folder.refresh()
    folder.metadata()
    folder.entries()
    if cfg.store or cfg.out or cfg.use_gpu:
        raise ConfigError(
            "--resume takes the sweep's own store, out and use_gpu: leave --store, --out and --use-gpu out"
        )


def load_for_resume(cfg: TuneConfig, folder: SweepDir) -> SweepSpec:
    """The sweep as it was started; a changed budget is written to `sweep.json`."""
    changes = {name: value for name in BUDGET if (value := getattr(cfg, name)) is not None}
    if changes:
        metadata = folder.metadata()
        metadata["spec"] |= changes
        folder.write(SWEEP, json.dumps(metadata, indent=1).encode())
    return folder.spec


def sweep_metadata(folder: SweepDir, spec: SweepSpec, placed: dict[str, SharedDataset], uri: str) -> dict[str, Any]:
    """Content of `sweep.json`."""
    store = next(iter(placed.values())).store
    return {
        "name": folder.name,
        "key": uuid.uuid4().hex,
        "created": time.time(),
        "store_fingerprint": store.fingerprint,
        "source": store.manifest.source,
        "tracking_uri": uri if uri == redact(uri) else None,
        "data": {key: part.describe() for key, part in placed.items()},
        "spec": spec.model_dump(mode="json", exclude_unset=True),
    }


def log_start(folder: SweepDir, spec: SweepSpec, log: EventLog, cfg: TuneConfig, resources: dict[str, Any]) -> None:
    """Log that a driver starts, with what the tracking server shows of the sweep."""
    metadata = folder.metadata()
    params = {**flat(spec), "tracking_uri": redact(tracking_uri(cfg)), **resources}
    log.write(
        "run_started",
        name=metadata["name"],
        key=metadata["key"],
        experiment=cfg.experiment,
        params={k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in params.items()},
        tags={"sweep": metadata["name"], "dataset_fingerprint": metadata["store_fingerprint"]},
        workers=spec.num_workers,
        time=time.time(),
    )


def confirm_estimate(cfg: TuneConfig, spec: SweepSpec, estimate: Estimate) -> None:
    """Print the estimate; ask if it is above a limit. ConfigError: the answer is no, or there is no terminal."""
    most = f" (at most {estimate.hours:.2g} h)" if estimate.hours_expected < estimate.hours else ""
    gpus = f", {estimate.gpu_hours:.2g} GPU hours at most" if estimate.gpu_hours else ""
    seeds = f"{spec.num_final_seeds} seeds of the winner"
    final = f", then about {estimate.final_hours:.2g} h for {seeds}" if cfg.final else ""
    print(
        f"about {estimate.hours_expected:.2g} h{most}{gpus} for {estimate.trials} trials, {estimate.concurrent} at a "
        f"time{final}; {estimate.measured}",
        file=sys.stderr,
    )
    above = [
        f"{value:.2g} {unit} is above {name} {limit:g}"
        for value, unit, name, limit in (
            (estimate.hours_expected, "h", "max_hours", spec.max_hours),
            (estimate.gpu_hours, "GPU hours", "max_gpu_hours", spec.max_gpu_hours),
        )
        if limit and value > limit
    ]
    if not above or cfg.yes:
        return
    question = f"The estimate of {' and '.join(above)}: the search will end there, with trials unfinished."
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Add --yes to start in spite of it, or raise the limit.")
    if make_console(stderr=True).input(f"{question} Start? [y/N] ", markup=False).strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was started")


def best_trial(state: SweepState) -> Trial:
    """The best trial. TrainingError: there is none, with the reasons of those that failed."""
    trials = [state.trial_status(name) if trial.ended_at is None else trial for name, trial in state.trials.items()]
    if best := best_of(trials):
        return best
    failed = [trial.reason or "" for trial in state.folder.trials() if trial.status == "failed"]
    if failed:
        first = {normalise_error(reason): reason for reason in reversed(failed)}
        grouped = Counter(map(normalise_error, failed)).most_common()
        reasons = "; ".join(f"{count} times: {first[kind]}" for kind, count in grouped)
        raise TrainingError(f"no trial of {state.folder} finished an epoch. Failed: {reasons}")
    raise TrainingError(
        f"no trial of {state.folder} has finished an epoch yet; resume with: {state.folder.resume} and a larger "
        "budget"
    )


def render_tune(result: dict[str, Any], console: Console) -> None:
    """Print the best trials, the winner on the test part, and the command that promotes it."""
    with open_sweep(result["sweep"]) as folder:
        folder.refresh()
        console.print(trials_table(folder.trials()))
    best, final = result["best"], result["final"]
    if best:
        verdict = "" if best["lift"] > 0 else ": no better than a rule without learning"
        console.print(
            f"best: {best['trial']} ({describe_space(best['config'])}), "
            f"{100 * best['objective']:.1f} % on the validation part, lift {100 * best['lift']:+.1f} points{verdict}",
        )
    if final:
        console.print(final["sentence"], style="bold")
        command = f"ray-app promote {shlex.quote(final['run'])}"
        if (lift := final["seeds"][0]["lift"]) > 0:
            offer = f"promote it with:\n  {command}"
        else:
            offer = (
                f"its first seed is not above the best baseline (lift {100 * lift:+.1f} points). {final['try_next']}"
            )
            offer += f"\nas it is, it is promoted with:\n  {command}"
        console.print(offer, soft_wrap=True)
    for path in result["files"]:
        if path.endswith(".html"):
            console.print(path, soft_wrap=True)


class SweepTracker(Tracker):
    """Mirrors the sweep's event log to MLflow as a run, and each trial that has ended as a run nested in it.

    A trial's points are sent when it ends, not as they happen: one more request for each step would slow a small
    machine down. `ray-app tune --watch` shows trials live.
    """

    def __init__(self, cfg: TrackingFlags, sweep: SweepDir) -> None:
        self._folder = sweep
        self._ended: list[RunDir] = []
        super().__init__(cfg, sweep.path, str(sweep))

    def _on_lines(self, lines: list[dict[str, Any]]) -> None:
        ended = [self._folder.run(line["name"]) for line in lines if line["kind"] == "trial_ended"]
        self._ended += [run for run in ended if (run.path / EVENT_LOG).is_file()]  # a refused trial has no run
        while self.run_id and self._ended and self._attempt(partial(self._sync, self._ended[0])):
            del self._ended[0]

    def _sync(self, run: RunDir) -> None:
        sync_run(run.path, self._uri, str(run))
