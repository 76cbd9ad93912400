"""`ray-app tune`: a sweep from its YAML file to a judged winner; or on with one; or a look at one."""

import json
import shlex
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray import tune
from rich.console import Console

from ray_app.cluster.connection import ClusterInfo, cluster, wait_for_autoscaler
from ray_app.commands.train.shared_dataset import SharedDataset, share_dataset
from ray_app.commands.tune.driver import Budget, ReplaySearcher, SweepCallback, SweepState, data_key, scheduler_of
from ray_app.commands.tune.estimate import Estimate, candidates, estimate, largest, max_concurrent
from ray_app.commands.tune.final_training import judgement_of, run_final
from ray_app.commands.tune.initialization import INIT, with_starts
from ray_app.commands.tune.multi_worker_trial import RESOURCES, run_group_trial
from ray_app.commands.tune.progress import SweepProgress, trials_table, watch
from ray_app.commands.tune.report import write_page
from ray_app.commands.tune.spec import Choice, SweepSpec, describe, read_spec, space_of, train_config
from ray_app.commands.tune.sweep_dir import SWEEP, SweepDir, Trial, best_of, open_sweep, pareto_front
from ray_app.commands.tune.tracking import SweepTracker
from ray_app.commands.tune.trial import normalise_error, run_trial
from ray_app.config.base import flat
from ray_app.config.tune import TuneConfig
from ray_app.errors import ConfigError, ResourceError, RunInterrupted, RunStopped, StoreError, TrainingError
from ray_app.runs.event_log import EventLog
from ray_app.runs.run_dir import RunDir
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs
from ray_app.tracking.mlflow_logger import redact_password, tracking_uri

MAX_FAILURES = 8
"""Times that Tune starts a trial again; one that dies twice at the same step ends sooner."""
BUDGET = ("max_trials", "max_hours", "max_gpu_hours")
"""What a resumed sweep may change."""


def run_tune(cfg: TuneConfig) -> dict[str, Any]:
    """Searches, or goes on, or shows; returns the --json object.

    ConfigError, StoreError, ResourceError: said before the first trial. RunStopped: it was asked to stop, and can go
    on. TrainingError: all trials failed, or none came far enough to be judged.
    """
    if cfg.watch:
        with open_sweep(cfg.watch) as folder:
            watch(folder)
            return summary(folder)
    uri = tracking_uri(cfg)  # a mistake in it is told before anything is read or written
    with ExitStack() as held:
        if cfg.resume:
            folder = held.enter_context(open_sweep(cfg.resume))
            resume_metadata(cfg, folder)
            log = held.enter_context(folder.exclusive())
            spec = load_for_resume(cfg, folder)
        else:
            spec = new_sweep_spec(cfg)
            folder = held.enter_context(open_sweep(spec.out))
            folder.require_free()
        stores = stores_of(spec)
        if cfg.resume:
            require_same_store(folder, stores)
        info = held.enter_context(cluster(cfg.address, dashboard=spec.num_workers > 1))
        most = largest(spec, next(iter(stores.values())))
        info = wait_for_autoscaler(
            info, spec.num_workers * (spec.max_concurrent_trials or 1), spec.cpus_per_worker, spec.use_gpu
        )
        max_concurrent(spec, info, {}, most)  # a space that is too large is told before anything is read or written
        placed = placed_parts(stores, spec)
        concurrent = max_concurrent(spec, info, placed, most)
        if not cfg.resume:
            confirm_estimate(cfg, spec, estimated(spec, placed, concurrent))
            folder.create(sweep_metadata(folder, spec, placed, uri))
            log = held.enter_context(folder.exclusive())
        log_start(folder, spec, log, cfg, info, concurrent)
        tracking = {"tracking_uri": uri, "experiment": cfg.experiment, "model_name": cfg.model_name}
        sweep(cfg, SweepState(folder, log, stores, tracking), placed, concurrent)
        return summary(folder)


def sweep(cfg: TuneConfig, record: SweepState, placed: dict[str, SharedDataset], concurrent: int) -> None:
    """Search and last training, with an end in the event log whatever comes. RunStopped: it was asked to stop."""
    folder, log = record.folder, record.log
    tracker = SweepTracker(cfg, folder)
    status = "FAILED"
    try:
        search(record, placed, concurrent)
        best = best_trial(record)
        if cfg.final:
            placed.clear()  # its memory is wanted by the last training
            run_final(cfg, folder, log, best)
        status = "FINISHED"
    except (RunStopped, KeyboardInterrupt) as stop:
        status = "KILLED"
        kind = RunInterrupted if isinstance(stop, KeyboardInterrupt) else type(stop)
        raise kind(f"stopped on request; go on with: {folder.resume}") from None
    finally:
        log.write("run_ended", status=status, artifacts=None, time=time.time())
        write_page(folder)
        tracker.close()


def new_sweep_spec(cfg: TuneConfig) -> SweepSpec:
    """A new sweep, as its file and the flags tell it."""
    assert cfg.file is not None
    changes = {name: getattr(cfg, name) for name in ("store", "out", *BUDGET)}
    return read_spec(cfg.file, {**changes, "use_gpu": cfg.use_gpu or None})


def resume_metadata(cfg: TuneConfig, folder: SweepDir) -> None:
    """ConfigError: more than a sweep's budget is to change. StoreError: there is none, or it lacks its record."""
    folder.refresh()
    folder.metadata()
    folder.entries()
    if cfg.store or cfg.out or cfg.use_gpu:
        raise ConfigError("--resume goes on with the sweep's own: leave --store, --out and --use-gpu out")


def load_for_resume(cfg: TuneConfig, folder: SweepDir) -> SweepSpec:
    """What is to be done of it, by the one who drives it; a changed budget is written down."""
    changes = {name: value for name in BUDGET if (value := getattr(cfg, name)) is not None}
    if changes:
        about = folder.metadata()
        about["spec"] |= changes
        folder.write(SWEEP, json.dumps(about, indent=1).encode())
    return folder.spec


def stores_of(spec: SweepSpec) -> dict[str, PairStore]:
    """The store, opened once for each choice of durations."""
    durations = space_of(spec).get("durations")
    choices = durations.values if isinstance(durations, Choice) else (None,)
    configs = [train_config(spec, {"durations": value} if value else {}, spec.out) for value in choices]
    return {data_key(config): PairStore.open(spec.store, config.durations) for config in configs}


def require_same_store(folder: SweepDir, stores: dict[str, PairStore]) -> None:
    """StoreError unless the pairs are those that the sweep began with."""
    was, store = folder.metadata()["store_fingerprint"], next(iter(stores.values()))
    if store.fingerprint != was:
        raise StoreError(
            f"{folder} searched on pairs of fingerprint {was}, {store.folder} holds {store.fingerprint} now: "
            "its trials could not be compared. Bring the former back, or start a new sweep."
        )


def placed_parts(stores: dict[str, PairStore], spec: SweepSpec) -> dict[str, SharedDataset]:
    """Training and validation pairs in shared memory, by choice of durations."""
    nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    splits = {key: split_pairs(store.index, spec.split_config) for key, store in stores.items()}
    for key, split in splits.items():
        tested = set(stores[key].index.sequence[split.test].tolist())
        for other, theirs in splits.items():
            trained = set(stores[other].index.sequence[theirs.train].tolist())
            if split.by == "sequence" and (both := tested & trained):
                print(
                    f"durations {key} test on {len(both)} drives that durations {other} train on: their numbers "
                    "stand on different drives",
                    file=sys.stderr,
                )
    placed = {key: share_dataset(store, splits[key], min(nodes) / len(stores)) for key, store in stores.items()}
    if spec.num_workers > 1 and not all(part.train for part in placed.values()):
        raise ResourceError(
            "trials of several workers need the training pairs in shared memory, where they do not fit; take "
            "`num_workers: 1`, or nodes with more (--object-store-memory of `ray start`)"
        )
    return placed


def sweep_metadata(folder: SweepDir, spec: SweepSpec, placed: dict[str, SharedDataset], uri: str) -> dict[str, Any]:
    """What `sweep.json` holds."""
    store = next(iter(placed.values())).store
    return {
        "name": folder.name,
        "key": uuid.uuid4().hex,
        "created": time.time(),
        "store_fingerprint": store.fingerprint,
        "source": store.manifest.source,
        "tracking_uri": uri if uri == redact_password(uri) else None,
        "data": {key: part.describe() for key, part in placed.items()},
        "spec": spec.model_dump(mode="json", exclude_unset=True),
    }


def log_start(
    folder: SweepDir, spec: SweepSpec, log: EventLog, cfg: TuneConfig, info: ClusterInfo, concurrent: int
) -> None:
    """A driver begins: what the tracking server needs to know of the sweep."""
    about = folder.metadata()
    told = {
        **flat(spec),
        "tracking_uri": redact_password(tracking_uri(cfg)),
        "concurrent_trials": concurrent,
        "cpus": info.cpus,
    }
    log.write(
        "run_started",
        name=about["name"],
        key=about["key"],
        experiment=cfg.experiment,
        params={
            key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in told.items()
        },
        tags={"sweep": about["name"], "dataset_fingerprint": about["store_fingerprint"]},
        workers=spec.num_workers,
        time=time.time(),
    )


def estimated(spec: SweepSpec, placed: dict[str, SharedDataset], concurrent: int) -> Estimate:
    """For a sweep that is about to begin."""
    settings = candidates(spec)
    configs = []
    for setting in settings:
        try:
            configs.append(train_config(spec, setting, spec.out))
        except ConfigError:  # such a trial fails at once
            continue
    trials = len(settings) if spec.search_alg == "grid" else spec.max_trials
    return estimate(spec, placed, configs, trials, concurrent)


def confirm_estimate(cfg: TuneConfig, spec: SweepSpec, told: Estimate) -> None:
    """Prints the estimate; where it is above a limit, asks. ConfigError: no, or nobody is there to ask."""
    most = f" (at most {told.hours:.2g} h)" if told.hours_expected < told.hours else ""
    gpus = f", {told.gpu_hours:.2g} GPU hours at most" if told.gpu_hours else ""
    final = (
        f", then about {told.final_hours:.2g} h for {spec.num_final_seeds} seeds of the winner" if cfg.final else ""
    )
    print(
        f"about {told.hours_expected:.2g} h{most}{gpus} for {told.trials} trials, {told.concurrent} at a time"
        f"{final}; {told.measured}",
        file=sys.stderr,
    )
    above = [
        f"{found:.2g} {unit} is above {name} {limit:g}"
        for found, unit, name, limit in (
            (told.hours_expected, "h", "max_hours", spec.max_hours),
            (told.gpu_hours, "GPU hours", "max_gpu_hours", spec.max_gpu_hours),
        )
        if limit and found > limit
    ]
    if not above or cfg.yes:
        return
    question = f"The estimate of {' and '.join(above)}: the search will end there, with trials unfinished."
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Say --yes to begin nevertheless, or raise the limit.")
    if Console(stderr=True).input(f"{question} Begin? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was begun")


def search(record: SweepState, placed: dict[str, SharedDataset], concurrent: int) -> None:
    """All trials that are still to run, by Ray Tune. RunStopped: it was asked to stop."""
    spec, folder = record.spec, record.folder
    trials = list(record.trials.values())
    budget = Budget(spec, folder.used_seconds(), sum(trial.seconds for trial in trials))
    left = len(record.queue) + record.left
    if not left or budget.stop_all():
        return
    placed = with_starts(spec, placed, folder.path / INIT)
    run, resources = run_trial, {"CPU": spec.cpus_per_worker, **({"GPU": 1.0} if spec.use_gpu else {})}
    if spec.num_workers > 1:
        run, resources = run_group_trial, RESOURCES
    trainable = tune.with_resources(tune.with_parameters(run, placed=placed), resources)
    with SweepProgress(record) as progress, stop_on_signal(budget):
        record.on_change = progress.ended
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=ReplaySearcher(record),
                scheduler=scheduler_of(spec, record),
                num_samples=left,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"{int(time.time() * 1000)}",
                storage_path=str(folder.path / "ray"),
                stop=budget,
                callbacks=[SweepCallback(record, budget)],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        ).fit()
    if budget.asked:
        raise RunInterrupted if budget.asked == signal.SIGINT else RunStopped
    if budget.spent and (open_ones := sum(trial.ended_at is None for trial in record.trials.values())):
        print(
            f"{budget.spent}: {open_ones} trials have not ended and can go on later, with "
            f"{folder.resume} and a larger budget",
            file=sys.stderr,
        )


@contextmanager
def stop_on_signal(budget: Budget) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the search, with what every trial has saved, instead of this process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be handled
        return

    def ask(number: int, _: Any) -> None:
        budget.asked = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def best_trial(record: SweepState) -> Trial:
    """The best trial. TrainingError: there is none, with the reasons."""
    trials = [record.trial_status(name) if trial.ended_at is None else trial for name, trial in record.trials.items()]
    if best := best_of(trials):
        return best
    failed = [trial.reason or "" for trial in record.folder.trials() if trial.status == "failed"]
    if failed:
        first = {normalise_error(reason): reason for reason in reversed(failed)}
        grouped = Counter(map(normalise_error, failed)).most_common()
        reasons = "; ".join(f"{count} times: {first[kind]}" for kind, count in grouped)
        raise TrainingError(f"no trial of {record.folder} could be judged. Failed: {reasons}")
    raise TrainingError(
        f"no trial of {record.folder} has finished an epoch yet; go on with: {record.folder.resume} and a larger "
        "budget"
    )


def summary(folder: SweepDir) -> dict[str, Any]:
    """The --json object, from what the sweep left on disk."""
    trials, lines = folder.trials(), folder.entries()
    best = best_of(trials)
    finals = [line for line in lines if line["kind"] == "final_seed" and best and line["trial"] == best.name]
    return {
        "sweep": str(folder),
        "status": {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}.get(
            lines[-1].get("status", ""), "running"
        ),
        "best": best
        and {
            "trial": best.name,
            "config": best.setting,
            "objective": best.objective,
            "lift": best.lift,
            "parameters": best.parameters,
            "checkpoint": checkpoint_of(folder.run(best.name)),
        },
        "pareto_front": [
            trial.name for trial in pareto_front(trials, folder.spec.secondary_objective or "parameters")
        ],
        "trials": [
            {
                "id": trial.name,
                "status": trial.status,
                "objective": trial.objective,
                "lift": trial.lift,
                "steps": trial.steps,
                "epochs": trial.epochs,
                "parameters": trial.parameters,
                "latency_ms": trial.latency_ms,
                "seconds": round(trial.seconds, 3),
                "config": trial.setting,
                "reason": trial.reason,
            }
            for trial in trials
        ],
        "final": judgement_of(finals, folder) if finals else None,
        "files": folder.files(),
    }


def checkpoint_of(run: RunDir) -> str | None:
    """Where a trial's best checkpoint lies, if it is kept."""
    kept = run.best_on_disk
    return run.shown(run.path / kept) if kept else None


def render_tune(result: dict[str, Any], console: Console) -> None:
    """The best trials, the winner on the test part, and how to go on."""
    with open_sweep(result["sweep"]) as folder:
        folder.refresh()
        console.print(trials_table(folder.trials()))
    best, final = result["best"], result["final"]
    if best:
        ahead = "" if best["lift"] > 0 else ": no better than a rule without learning"
        console.print(
            f"best: {best['trial']} ({describe(best['config'])}), {100 * best['objective']:.1f} % on the validation "
            f"part, lift {100 * best['lift']:+.1f} points{ahead}",
            markup=False,
        )
    if final:
        console.print(final["sentence"], style="bold", markup=False, highlight=False)
        command = f"ray-app promote {shlex.quote(final['run'])}"
        console.print(f"promote it with:\n  {command}", soft_wrap=True, markup=False, highlight=False)
    for path in result["files"]:
        if path.endswith(".html"):
            console.print(path, soft_wrap=True, markup=False)
