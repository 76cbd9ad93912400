"""`ray-app tune`: from the settings of a sweep to a winner that is evaluated on the test part."""

import json
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

from rich.console import Console

from ray_app.cluster.autoscaler import wait_for_autoscaler
from ray_app.cluster.connection import cluster
from ray_app.commands.train.context import persisted_config
from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.estimate import confirm_estimate, estimate_sweep, max_concurrent
from ray_app.commands.tune.final import final_result, run_final
from ray_app.commands.tune.progress import trials_table, watch
from ray_app.commands.tune.report import write_page
from ray_app.commands.tune.search import SweepSearcher, run_search
from ray_app.commands.tune.space import describe, pareto_front, read_space
from ray_app.commands.tune.sweep_dir import SWEEP, SweepDir, open_sweep
from ray_app.commands.tune.trial import normalise_error
from ray_app.commands.tune.trials import STATUS_OF_END, Trial, best_of
from ray_app.config.base import TrackingFlags, changed_settings
from ray_app.config.tune import TOKENS, TuneConfig
from ray_app.errors import RunInterrupted, RunStopped, StoreError, TrainingError
from ray_app.runs.event_log import EVENT_LOG, EventLog
from ray_app.runs.run_dir import RunDir
from ray_app.tracking.mlflow_logger import sync_run
from ray_app.tracking.tracker import Tracker
from ray_app.tracking.uri import tracking_uri

SWEEP_RESUME_OVERRIDABLE = {
    *("max_trials", "max_hours", "max_gpu_hours"),
    *("resume", "watch", "yes", "final", "address", "tracking_uri", "experiment", "model_name"),
}
"""Settings that a resumed sweep may change: its budget, and what is done around the search."""


def run_tune(cfg: TuneConfig) -> dict[str, Any]:
    """Search, or resume a sweep, or show one; return the --json object.

    ConfigError, StoreError, ResourceError: before the first trial. RunStopped: it was asked to stop and can be
    resumed. TrainingError: all trials failed, or none finished an epoch.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(open_sweep(cfg.watch or cfg.resume or cfg.out))
        if cfg.watch:
            watch(folder)
            return sweep_summary(folder)
        tracking_uri(cfg)  # fails early on a bad URI
        if cfg.resume:
            folder.refresh()
            folder.entries()  # StoreError: it is missing
            log = stack.enter_context(folder.exclusive())
        else:
            folder.require_free()
        sweep = SweepContext.open(cfg)
        if cfg.resume:
            require_resumable(sweep, folder)
        info = stack.enter_context(cluster(cfg.address, dashboard=cfg.num_workers > 1))
        at_once = cfg.num_workers * (cfg.max_concurrent_trials or 1)
        info = wait_for_autoscaler(info, at_once, cfg.cpus_per_worker, cfg.use_gpu)
        max_concurrent(sweep, info)  # fails early on a space that is too large
        pairs = sweep.share()
        concurrent = max_concurrent(sweep, info, sum(part.num_bytes for part in pairs.values()))
        if not cfg.resume:
            confirm_estimate(cfg, estimate_sweep(sweep, concurrent))
            log = stack.enter_context(folder.exclusive(new_metadata(sweep, folder, pairs)))
        log_start(sweep, folder, log, {"concurrent_trials": concurrent, "cpus": info.cpus})
        search_and_finish(SweepSearcher(sweep, folder, log), pairs, concurrent)
        return sweep_summary(folder)


def search_and_finish(searcher: SweepSearcher, pairs: dict[str, SharedDataset], concurrent: int) -> None:
    """Search, then train the winner; log the end in any case. RunStopped: it was asked to stop."""
    cfg, folder, log = searcher.sweep.cfg, searcher.folder, searcher.log
    tracker = SweepTracker(cfg, folder)
    status = "FAILED"
    try:
        run_search(searcher, pairs, concurrent)
        best = best_trial(folder)
        if cfg.final:
            pairs.clear()  # the final training needs its memory
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


def require_resumable(sweep: SweepContext, folder: SweepDir) -> None:
    """Raise ConfigError or StoreError if it would be another sweep; a changed budget is written to `sweep.json`."""
    metadata = folder.metadata()
    if sweep.fingerprint != metadata["store_fingerprint"]:
        raise StoreError(
            f"{folder} searched on pairs of fingerprint {metadata['store_fingerprint']}, {sweep.cfg.store} now has "
            f"{sweep.fingerprint}: its trials could not be compared. Restore the old store, or start a new sweep."
        )
    if changed_settings(str(folder), folder.config, sweep.cfg, SWEEP_RESUME_OVERRIDABLE) - {"resume"}:
        metadata["config"] = recorded_config(sweep.cfg)
        folder.write(SWEEP, json.dumps(metadata, indent=1).encode())


def recorded_config(cfg: TuneConfig) -> dict[str, Any]:
    """Settings as `sweep.json` has them."""
    return {**persisted_config(cfg), "resume": None}


def new_metadata(sweep: SweepContext, folder: SweepDir, pairs: dict[str, SharedDataset]) -> dict[str, Any]:
    """Content of `sweep.json`."""
    store = next(iter(sweep.stores.values()))
    return {
        "name": folder.name,
        "key": uuid.uuid4().hex,
        "created": time.time(),
        "store_fingerprint": store.fingerprint,
        "source": store.manifest.source,
        "data": {key: part.describe() for key, part in pairs.items()},
        "config": recorded_config(sweep.cfg),
    }


def log_start(sweep: SweepContext, folder: SweepDir, log: EventLog, resources: dict[str, Any]) -> None:
    """Log that a driver starts, with what the tracking server shows of the sweep."""
    metadata = folder.metadata()
    params = {**recorded_config(sweep.cfg), **resources}
    log.write(
        "run_started",
        name=metadata["name"],
        key=metadata["key"],
        experiment=sweep.cfg.experiment,
        params={k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in params.items()},
        tags={"sweep": metadata["name"], "dataset_fingerprint": sweep.fingerprint},
        workers=sweep.cfg.num_workers,
        time=time.time(),
    )


def best_trial(folder: SweepDir) -> Trial:
    """The best trial. TrainingError: there is none, with the reasons of those that failed."""
    trials = folder.trials()
    if best := best_of(trials):
        return best
    failed = [trial.reason or "" for trial in trials if trial.status == "failed"]
    if failed:
        first = {normalise_error(reason): reason for reason in reversed(failed)}
        grouped = Counter(map(normalise_error, failed)).most_common()
        reasons = "; ".join(f"{count} times: {first[kind]}" for kind, count in grouped)
        raise TrainingError(f"no trial of {folder} finished an epoch. Failed: {reasons}")
    raise TrainingError(
        f"no trial of {folder} has finished an epoch yet; resume with: {folder.resume} and a larger budget"
    )


def sweep_summary(folder: SweepDir) -> dict[str, Any]:
    """Return the --json object, from what the sweep left on disk."""
    cfg, trials = folder.config, folder.trials()
    best = best_of(trials)
    kept = best and folder.kept_checkpoint(best.name)
    shown = (
        *("status", "objective", "lift", TOKENS, "cos_sim", "steps", "epochs", "parameters", "latency_ms"),
        *("seconds", "reason"),
    )
    front = pareto_front(trials, read_space(cfg), cfg.secondary_objective or "parameters")
    return {
        "sweep": str(folder),
        "status": STATUS_OF_END.get(folder.entries()[-1].get("status", ""), "running"),
        "best": best
        and {
            "trial": best.name,
            "config": best.setting,
            "objective": best.objective,
            "lift": best.lift,
            "parameters": best.parameters,
            "checkpoint": kept and folder.shown(folder.path / kept),
        },
        "pareto_front": [trial.name for trial in front],
        "trials": [
            {"id": trial.name, "config": trial.setting, **{key: getattr(trial, key) for key in shown}}
            for trial in trials
        ],
        "final": final_result(folder, best),
        "files": folder.files(),
    }


def render_tune(result: dict[str, Any], console: Console) -> None:
    """Print the best trials, the winner on the test part, and the command that promotes it."""
    with open_sweep(result["sweep"]) as folder:
        folder.refresh()
        drafting = folder.config.drafting
        console.print(trials_table(folder.trials(), drafting=drafting))
    best, final = result["best"], result["final"]
    if best:
        value = f"{best['objective']:.3f} tokens per target pass on the validation part"
        if not drafting:
            verdict = "" if best["lift"] > 0 else ": no better than a rule without learning"
            value = (
                f"{100 * best['objective']:.1f} % on the validation part, lift {100 * best['lift']:+.1f} "
                f"points{verdict}"
            )
        console.print(f"best: {best['trial']} ({describe(best['config'])}), {value}")
    if final:
        console.print(final["sentence"], style="bold")
        offer = "promote it with:"
        if not drafting and (lift := final["seeds"][0]["lift"]) <= 0:
            offer = (
                f"its first seed is not above the best baseline (lift {100 * lift:+.1f} points). "
                f"{final['try_next']}\n"
                "as it is, it is promoted with:"
            )
        console.print(f"{offer}\n  {final['promote']}", soft_wrap=True)
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
