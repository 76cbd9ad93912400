"""`ray-app train`: the driver's side of a run. Data is read and divided, workers train, the event log tells of it."""

import hashlib
import json
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import (
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from rich.console import Console
from rich.table import Table

from ray_app.cluster.connection import ClusterInfo, cluster, require_resources, wait_for_autoscaler
from ray_app.cluster.node_address import NodeAddressTorchConfig
from ray_app.commands.train.elastic import ElasticResizeCallback
from ray_app.commands.train.initialization import INIT, PairsThroughRay, init_requirement, make_start
from ray_app.commands.train.progress import TrainingProgress
from ray_app.commands.train.state import augmentation, parameters, training_split
from ray_app.commands.train.worker import train_loop_per_worker
from ray_app.config.base import flat
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.initialization import check_rank
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pairs_dataset import pairs_dataset
from ray_app.errors import ConfigError, ResourceError, RunInterrupted, RunStopped, StoreError, TrainingError
from ray_app.runs.event_log import entries, entries_since_start, require_latest_driver
from ray_app.runs.run_dir import NUM_CHECKPOINTS_KEPT, RunDir, open_run, run_metadata
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import verify_folder
from ray_app.store.filesystem import absolute, open_storage
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance
from ray_app.store.split import Split
from ray_app.store.split import test_fingerprint as fingerprint_of
from ray_app.tracking.mlflow_logger import Tracker, redact_password, tracking_uri

WEIGHTS_AND_MOMENTS_BYTES = 16
"""For each parameter: weight, gradient and AdamW's two moments in float32."""
NUMERICS_CHANGING = {"num_workers", "use_gpu", "cpus_per_worker", "shard_memory_gib"}
"""Settings that a resumed run may change at the price of byte-identity: another order of sums, or other kernels."""
RESUME_OVERRIDABLE = NUMERICS_CHANGING | {
    *("resume", "address", "tracking_uri", "model_name", "max_failures"),
    *("checkpoint_every", "val_every_steps", "elastic_check_interval_s"),
}
"""All that a resumed run may change."""


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """What a run needs of the cluster."""

    parameters: int
    """Trained numbers."""
    shard_bytes: int
    """Training pairs of one worker, as stored; of one of the fewest where their number changes."""
    held: bool
    """A worker holds its shard; otherwise it streams."""
    cpus_per_worker: float
    """CPUs that a worker claims."""

    @property
    def threads(self) -> int:
        """Threads that a worker computes with."""
        return max(1, int(self.cpus_per_worker))


def run_train(cfg: TrainConfig, parent_key: str | None = None) -> dict[str, Any]:
    """Trains an adapter, or goes on with a run; returns the --json object. `parent_key`: of the sweep it belongs to.

    RunStopped: SIGTERM came, the run is saved and can go on. ConfigError: a setting that may not change on the way.
    """
    places = {
        "store": absolute(cfg.store),
        "out": absolute(cfg.out),
        "init_from": cfg.init_from and cfg.init_from.absolute(),
    }
    solved = {"num_epochs": 1} if STRATEGIES[cfg.strategy].REQUIRES == "pairs" else {}
    cfg = cfg.model_copy(update=places | solved)
    tracking_uri(cfg)  # a mistake in it is told before anything is read or written
    store = PairStore.open(cfg.store, cfg.durations)
    if cfg.resume:
        check_resume_compatible(cfg, store, run_metadata(open_storage(cfg.out)))
    split = training_split(cfg, store)
    for part in ("train", "val") if not cfg.train_on_val else ("train",):
        if not len(getattr(split, part)):
            raise StoreError(
                f"{cfg.store} has too few pairs: its {part} part is empty; prepare more, or change the shares"
            )
    with cluster(cfg.address) as info, open_run(cfg.out) as run:
        info = wait_for_autoscaler(info, cfg.min_workers, cfg.cpus_per_worker or 1.0, cfg.use_gpu)
        plan = make_plan(cfg, run, store, split, info)
        if not cfg.resume:
            about = {"name": run_name(cfg, store), "key": uuid.uuid4().hex, "store_fingerprint": store.fingerprint}
            run.create({**about, "parent_key": parent_key, "config": persisted_config(cfg)})
        with run.exclusive(), with_resume_hint(run):
            return train(cfg, store, split, plan, run)


def persisted_config(cfg: TrainConfig) -> dict[str, Any]:
    """A run's settings as they are written down: the tracking server in full, unless a password is in its address."""
    uri = tracking_uri(cfg)
    return {**flat(cfg), "tracking_uri": uri if uri == redact_password(uri) else None}


def check_resume_compatible(cfg: TrainConfig, store: PairStore, about: dict[str, Any]) -> None:
    """ConfigError, with key, old and new value, where a run would go on as another. Says what is lost otherwise."""
    old, new = TrainConfig.model_validate({**about["config"], "out": str(cfg.out)}), flat(cfg)
    changed = {key: (value, new[key]) for key, value in flat(old).items() if value != new[key]}
    frozen = {key: values for key, values in changed.items() if key not in RESUME_OVERRIDABLE}
    if frozen:
        told = "; ".join(f"{key} was {was!r}, is {now!r} now" for key, (was, now) in frozen.items())
        raise ConfigError(f"--resume goes on with the settings of {cfg.out}, but {told}; leave that out.")
    if store.fingerprint != about["store_fingerprint"]:
        raise StoreError(
            f"{cfg.out} was trained on pairs of fingerprint {about['store_fingerprint']}, {cfg.store} holds "
            f"{store.fingerprint} now; it can go on only with the former."
        )
    if told := ", ".join(key for key in changed if key in NUMERICS_CHANGING):
        print(
            f"{told} changed: the run goes on, but its weights will not be byte-identical to those of a run without "
            "the change: sums are taken in another order",
            file=sys.stderr,
        )


def make_plan(cfg: TrainConfig, run: RunDir, store: PairStore, split: Split, info: ClusterInfo) -> ResourcePlan:
    """ConfigError where settings and pairs do not go together, ResourceError where the cluster or the disk is too
    small: nothing has been started or written then."""
    num = parameters(cfg, store)
    augmentation(cfg, store)
    if init_requirement(cfg) == "subspaces":
        check_rank(cfg.rank, len(split.train))
    pair_bytes = store.feature("event").num_bytes + store.feature("target").num_bytes
    shard_bytes = -(-len(split.train) // cfg.min_workers) * pair_bytes
    held = shard_bytes <= cfg.shard_memory_gib * 2**30
    if not held:
        refuse_streaming(cfg, shard_bytes)
    data_cpus = 0.0 if held else 1.0
    share = 1.0 if cfg.use_gpu else info.max_cpus_per_worker(cfg.max_workers, data_cpus)
    share = max(share, 1.0) if cfg.elastic else share  # Ray's elastic policy counts whole CPUs
    plan = ResourcePlan(num, shard_bytes, held, cfg.cpus_per_worker or share)
    require_resources(
        info,
        num_workers=cfg.min_workers,
        cpus_per_worker=plan.cpus_per_worker,
        use_gpu=cfg.use_gpu,
        data_cpus=data_cpus,
        memory_bytes=cfg.min_workers * (num * WEIGHTS_AND_MOMENTS_BYTES + held * shard_bytes),
    )
    # Weights: the newest places, the best at each, the next while it is written. State: two moments at each place.
    needed = num * 4 * ((2 * NUM_CHECKPOINTS_KEPT + 1) + 2 * (NUM_CHECKPOINTS_KEPT + 1))
    existing = next(folder for folder in (run.path, *run.path.parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ResourceError(
            f"checkpoints of {num:,} parameters need {needed / 2**30:.1f} GiB in {existing}, "
            f"{free / 2**30:.1f} GiB are free; free some, or choose another --out (of a run at a URI: another TMPDIR)"
        )
    return plan


def refuse_streaming(cfg: TrainConfig, shard_bytes: int) -> None:
    """ConfigError where workers that stream could not see the global batches that are asked for."""
    larger = f"a --shard-memory-gib of {shard_bytes / 2**30:.3g} or more holds the pairs"
    if cfg.elastic:
        raise ConfigError(
            f"--num-workers {cfg.num_workers} keeps the global batches only where workers hold their pairs, "
            f"and {cfg.min_workers} would have to hold {shard_bytes / 2**30:.3g} GiB each: {larger}, "
            "or take a larger MIN"
        )
    if cfg.batch_size % cfg.min_workers:
        low = cfg.batch_size // cfg.min_workers * cfg.min_workers
        raise ConfigError(
            f"workers that stream need a --batch-size ({cfg.batch_size}) that is a multiple of --num-workers "
            f"({cfg.num_workers}); try {low} or {low + cfg.min_workers}, or {larger}"
        )


def run_name(cfg: TrainConfig, store: PairStore) -> str:
    """Strategy and a hash of config and data: Ray goes on with an old run of the same name without a word."""
    content = json.dumps([flat(cfg), store.fingerprint], sort_keys=True).encode()
    return f"{cfg.strategy}-{hashlib.sha256(content).hexdigest()[:10]}"


def train(cfg: TrainConfig, store: PairStore, split: Split, plan: ResourcePlan, run: RunDir) -> dict[str, Any]:
    """The run itself, on the connected cluster, in a claimed folder that nobody else drives."""
    began = time.perf_counter()
    origin = run.metadata()
    about = provenance(sys.argv, store.fingerprint, run=origin["name"], run_key=origin["key"])
    tags = {
        "dataset_fingerprint": store.fingerprint,
        "test_fingerprint": fingerprint_of(store.index, split.test),
        "split": split.label,
        "source": str(store.manifest.source.get("name")),
        "git": str(about.get("git")),
    }
    started = time.time()
    with run.event_log() as log:
        if (last := entries(run.path)[-1:]) and last[0].get("status") == "FINISHED":
            print(f"{run} is finished; nothing is left to train", file=sys.stderr)
        log.write(
            "run_started",
            name=origin["name"],
            key=origin["key"],
            parent_key=origin.get("parent_key"),
            experiment=cfg.experiment,
            params={**persisted_config(cfg), "parameters": plan.parameters},
            tags=tags,
            workers=cfg.max_workers,
            time=started,
        )
    told = {"started": started, "held": plan.held, "threads": plan.threads, "provenance": about, "placed": None}
    tracker = Tracker(cfg, run.path, str(run))
    status, best = "FAILED", None
    try:
        total = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed).steps * cfg.num_epochs
        with stop_when_terminated(run), TrainingProgress(run.path, total), run.synced():
            run_training(cfg, run, store, split, plan, f"{origin['name']}-{int(started * 1000)}", told)
        lines = entries(run.path)
        if lines[-1]["kind"] == "stopped":
            raise RunStopped(f"stopped on request after step {lines[-1]['global_step']}; go on with: {run.resume}")
        status, best = "FINISHED", run.best()
    except RunStopped:
        status = "KILLED"
        raise
    finally:
        with run.event_log() as log:
            require_latest_driver(run.path, started)
            artifacts = str(best.relative_to(run.path)) if best else None
            log.write("run_ended", status=status, artifacts=artifacts, time=time.time())
        tracked = {"tracked": tracker.close(), **tracker.summary()}
    return summary(cfg, run, split, plan, tracked, time.perf_counter() - began)


@contextmanager
def stop_when_terminated(run: RunDir) -> Iterator[None]:
    """SIGTERM asks the workers to save and end, instead of ending this process.

    RunInterrupted: Ctrl-C. Ray Train answers it by ending the workers and leaving this process without a word.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be handled
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: run.stop_file.touch())
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise RunInterrupted(f"interrupted; what was saved before is whole, go on with: {run.resume}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def with_resume_hint(run: RunDir) -> Iterator[None]:
    """TrainingError with the way on, where processes died too often or the controller itself did. StoreError with it,
    where a disk or an object store failed one of them.

    Where one dies, what the others were waiting for from it fails as well: one death is enough.
    """
    go_on = f"What was saved is whole; go on with: {run.resume}"
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{str(error).rstrip('.')}. {go_on}") from error
    except (RayActorError, WorkerGroupError) as error:
        causes = [unwrap_failure(failure) for failure in getattr(error, "worker_failures", {0: error}).values()]
        if deaths := [cause for cause in causes if isinstance(cause, RayActorError)]:
            raise TrainingError(
                f"The training's processes died ({str(deaths[0]).splitlines()[0]}). {go_on}"
            ) from error
        if refusals := [cause for cause in causes if isinstance(cause, StoreError)]:
            raise StoreError(f"{str(refusals[0]).rstrip('.')}. {go_on}") from error
        raise  # the doing of code, which its traceback tells


def unwrap_failure(failure: Exception) -> Exception:
    """Without what Ray Train wraps around it: what code raised, or that a worker does not answer."""
    found: Any = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", failure)
    return found


def run_training(
    cfg: TrainConfig, run: RunDir, store: PairStore, split: Split, plan: ResourcePlan, name: str, told: dict[str, Any]
) -> None:
    """Ray Data reads once, Ray Train trains. TrainingError when a loss is not finite."""
    read_cpus = 0.0 if cfg.elastic else 1.0
    train_pairs = pairs_dataset(store, split.train, read_cpus=read_cpus)
    # Read before the workers claim their CPUs: a data set in memory needs none, and cannot starve.
    datasets = {"train": train_pairs.materialize() if plan.held else train_pairs}
    if len(split.val):
        datasets["val"] = pairs_dataset(store, split.val, read_cpus=read_cpus).materialize()
    run.download(INIT)
    make_start(cfg.at(run.path), store, split, PairsThroughRay(store, split, datasets))
    run.upload(INIT)
    if not plan.held and (dropped := len(split.train) % cfg.min_workers):
        print(f"streaming to {cfg.num_workers} workers leaves out {dropped} pairs of each epoch", file=sys.stderr)
    data_config = DataConfig(datasets_to_split=[] if plan.held else ["train"])
    while True:
        begun_at = last_logged_step(run.path)
        try:
            run_worker_group(
                cfg, run, plan.cpus_per_worker, name, told, datasets=datasets, dataset_config=data_config
            )
            break
        except TrainingFailedError:
            run.refresh()
            if not (cfg.elastic and cfg.max_failures and last_logged_step(run.path) > begun_at):
                raise
            name = f"{name}-again"
    run.refresh()
    failures = [line["error"] for line in entries_since_start(run.path) if line["kind"] == "failed"]
    if failures:
        kept = run.best()
        raise TrainingError(
            f"{failures[-1]} "
            + (f"The last good checkpoint is {run.shown(kept)}." if kept else "There is no checkpoint yet.")
        )


def last_logged_step(run: Path) -> int:
    """Steps that a run has come to."""
    return max((line["global_step"] for line in entries(run) if line["kind"] == "step"), default=0)


def run_worker_group(
    cfg: TrainConfig, run: RunDir, cpus_per_worker: float, name: str, told: dict[str, Any], **data: Any
) -> None:
    """A group of workers, from its start to its end. `told` goes to `train_loop_per_worker`, beside the settings.

    Ray keeps its own notes in this process's folder of the run: its controller runs on this machine.
    """
    TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"run": str(run), "train": flat(cfg), **told},
        torch_config=NodeAddressTorchConfig(),
        scaling_config=ScalingConfig(
            # Typed as the classes of before Train V2, here and below.
            num_workers=(cfg.min_workers, cfg.max_workers) if cfg.elastic else cfg.max_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=cfg.elastic_check_interval_s,  # type: ignore[call-arg]
            use_gpu=cfg.use_gpu,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if cfg.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run.path / "ray"),
            callbacks=[ElasticResizeCallback(RunDir(run.path))] if cfg.elastic else [],  # type: ignore[list-item]
            failure_config=FailureConfig(
                max_failures=cfg.max_failures,
                controller_failure_limit=3,  # type: ignore[call-arg]
            ),
        ),
        **data,
    ).fit()


def summary(
    cfg: TrainConfig, run: RunDir, split: Split, plan: ResourcePlan, tracked: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The --json object, from what the run left on disk."""
    best = run.best()
    assert best is not None, "a run that ended well has a best checkpoint"
    verify_folder(best)
    lines = entries(run.path)
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    chosen = epochs[int(best.name.removeprefix("epoch_"))]
    last = epochs[max(epochs)]
    trained_s = sum(line["train"]["seconds"] for line in epochs.values())
    resumes = [line for line in lines if line["kind"] == "resumed"]
    (*_, last_group) = (line for line in lines if line["kind"] == "workers_started")
    return {
        "run": str(run),
        "checkpoint": run.shown(best),
        "model_sha256": sha256_file(best / "model.safetensors"),
        **tracked,
        "epochs": len(epochs),
        "best_epoch": chosen["epoch"],
        "stopped_early": len(epochs) < cfg.num_epochs,
        "steps": last["global_step"],
        "parameters": plan.parameters,
        "workers": last_group["workers"],
        "worker_counts": worker_counts(lines),
        "in_memory": plan.held,
        "resumed_from_step": resumes[-1]["global_step"] if resumes else None,
        "restarts": len(resumes),
        "val": chosen["val"],
        "train": chosen["train"],
        "split": {
            "by": split.by,
            "label": split.label,
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "test_windows_overlapping_train": split.test_windows_overlapping_train,
        },
        "seconds": round(seconds, 3),
        "pairs_per_second": sum(line["train"]["pairs"] for line in epochs.values()) / max(trained_s, 1e-9),
        "step_seconds": trained_s / last["global_step"],
        "data_wait_fraction": sum(line["train"]["data_wait_seconds"] for line in epochs.values())
        / max(trained_s, 1e-9),
        "save_seconds": sum(line["save_seconds"] for line in epochs.values()),
    }


def worker_counts(lines: list[dict[str, Any]]) -> list[dict[str, int]]:
    """How many workers took how many steps in a row."""
    steps = (line.get("workers", 1) for line in lines if line["kind"] == "step")
    return [{"workers": workers, "steps": len(list(taken))} for workers, taken in groupby(steps)]


def render_train(result: dict[str, Any], console: Console) -> None:
    """The result, and how to go on."""
    val = result["val"]
    early = ", stopped early" if result["stopped_early"] else ""
    table = Table(show_header=False, box=None)
    table.add_row("checkpoint", result["checkpoint"])
    best = f"best on validation: {result['best_epoch']}" if val else "the last one counts"
    table.add_row("epochs", f"{result['epochs']}{early}; {best}")
    if val:
        table.add_row(
            "validation",
            f"cos_sim {val['cos_sim_mean']:.4f}, accepted at 0.80 {val['cosine_accept_rate']['0.80']:.1%} "
            f"of {val['pairs']} pairs",
        )
    sizes = " then ".join(str(size["workers"]) for size in result["worker_counts"])
    table.add_row(
        "speed",
        f"{result['pairs_per_second']:.1f} pairs/s on {sizes} workers, {result['seconds']:.0f} s in all",
    )
    table.add_row("split", result["split"]["label"])
    console.print(table)
    at = f"at {result['tracking_uri']}; artifacts: {result['artifacts'] or 'not there yet'}"
    tracked = f"{result['mlflow_run_id']} {at}" if result["mlflow_run_id"] else "none: the tracking server was away"
    console.print(f"MLflow run: {tracked}", highlight=False, soft_wrap=True)
    told = "These are validation numbers, without baselines" if val else "Nothing validated"
    console.print(
        f"{told}. The answer is given by\n  ray-app evaluate --store STORE --checkpoint {result['run']} --out REPORT",
        highlight=False,
        soft_wrap=True,
    )
