"""`ray-app train`: the driver's side of a run. Data is read and divided, workers train, the journal tells of it."""

import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from rich.console import Console
from rich.table import Table

from ray_app.config import TrainConfig, flat
from ray_app.core.adapter import STRATEGIES, num_parameters
from ray_app.errors import ResourceError, StoreError, TrainingError
from ray_app.jobs.cluster import ClusterInfo, cluster, require
from ray_app.jobs.journal import Journal, entries
from ray_app.jobs.lanes import Lanes
from ray_app.jobs.progress import TrainingProgress
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.shards import pairs_dataset
from ray_app.jobs.tracking import Tracker, tracking_uri
from ray_app.jobs.train_loop import adapter_config, train_loop_per_worker
from ray_app.store.checkpoint import verify_folder
from ray_app.store.durable import sha256_file
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance
from ray_app.store.split import Split, split_pairs
from ray_app.store.split import test_fingerprint as fingerprint_of

WEIGHTS_AND_MOMENTS_BYTES = 16
"""For each parameter: weight, gradient and AdamW's two moments in float32."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs of the cluster."""

    parameters: int
    """Trained numbers."""
    shard_bytes: int
    """Training pairs of one worker, as stored."""
    held: bool
    """A worker holds its shard; otherwise it streams."""
    cpus_per_worker: float
    """CPUs that a worker claims."""

    @property
    def threads(self) -> int:
        """Threads that a worker computes with."""
        return max(1, int(self.cpus_per_worker))


def run_train(cfg: TrainConfig) -> dict[str, Any]:
    """Trains an adapter; returns the --json object."""
    cfg = cfg.model_copy(update={"store": cfg.store.absolute(), "out": cfg.out.absolute()})
    tracking_uri(cfg)  # a mistake in it is told before anything is read or written
    store = PairStore.open(cfg.store, cfg.durations)
    split = split_pairs(store.index, cfg.split_config)
    for part in ("train", "val"):
        if not len(getattr(split, part)):
            raise StoreError(
                f"{cfg.store} has too few pairs: its {part} part is empty; prepare more, or change the shares"
            )
    with cluster(cfg.address) as info:
        plan = make_plan(cfg, store, split, info)
        name = run_name(cfg, store)
        RunFolder(cfg.out).claim({"name": name, "config": flat(cfg), "store_fingerprint": store.fingerprint})
        return train(cfg, store, split, plan, name)


def make_plan(cfg: TrainConfig, store: PairStore, split: Split, info: ClusterInfo) -> Plan:
    """ResourceError where the cluster or the disk is too small: nothing has been started or written then."""
    with torch.device("meta"):
        config = adapter_config(cfg, store)
        parameters = num_parameters(STRATEGIES[config.strategy](config))
    pair_bytes = store.feature("event").num_bytes + store.feature("target").num_bytes
    shard_bytes = -(-len(split.train) // cfg.num_workers) * pair_bytes
    held = shard_bytes <= cfg.shard_memory_gib * 2**30
    data_cpus = 0.0 if held else 1.0
    share = 1.0 if cfg.use_gpu else info.share(cfg.num_workers, data_cpus)
    plan = Plan(parameters, shard_bytes, held, cfg.cpus_per_worker or share)
    require(
        info,
        num_workers=cfg.num_workers,
        cpus_per_worker=plan.cpus_per_worker,
        use_gpu=cfg.use_gpu,
        data_cpus=data_cpus,
        memory_bytes=cfg.num_workers * (parameters * WEIGHTS_AND_MOMENTS_BYTES + held * shard_bytes),
    )
    # Best and newest weights, the newest state, and the next of each while they are written.
    needed = parameters * 4 * (3 + 2 * 2)
    existing = next(folder for folder in (cfg.out, *cfg.out.parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ResourceError(
            f"checkpoints of {parameters:,} parameters need {needed / 2**30:.1f} GiB in {existing}, "
            f"{free / 2**30:.1f} GiB are free; free some, or choose another --out"
        )
    return plan


def run_name(cfg: TrainConfig, store: PairStore) -> str:
    """Strategy and a hash of config and data: Ray goes on with an old run of the same name without a word."""
    content = json.dumps([flat(cfg), store.fingerprint], sort_keys=True).encode()
    return f"{cfg.strategy}-{hashlib.sha256(content).hexdigest()[:10]}"


def train(cfg: TrainConfig, store: PairStore, split: Split, plan: Plan, name: str) -> dict[str, Any]:
    """The run itself, on the connected cluster, in a claimed folder."""
    began = time.perf_counter()
    run = RunFolder(cfg.out)
    about = provenance(sys.argv, store.fingerprint)
    with Journal(run.path) as journal:
        journal.write("start", name=name, time=time.time(), parameters=plan.parameters)
    tags = {
        "dataset_fingerprint": store.fingerprint,
        "test_fingerprint": fingerprint_of(store.index, split.test),
        "split": split.label,
        "source": str(store.manifest.source.get("name")),
        "git": str(about.get("git")),
    }
    tracker = Tracker(cfg, run.path, name, {**flat(cfg), "parameters": plan.parameters}, tags)
    status = "FAILED"
    try:
        total = Lanes(len(split.train), cfg.batch_size, cfg.seed).steps * cfg.num_epochs
        with TrainingProgress(run.path, total):
            fit(cfg, store, split, plan, name, {**about, "mlflow_run_id": tracker.run_id, "run": name})
        status = "FINISHED"
    finally:
        best = run.best()
        tracked = tracker.close(status, best if status == "FINISHED" else None)
    return summary(cfg, run, split, plan, tracker.run_id, tracked, time.perf_counter() - began)


def fit(cfg: TrainConfig, store: PairStore, split: Split, plan: Plan, name: str, about: dict[str, Any]) -> None:
    """Ray Data reads once, Ray Train trains. TrainingError when a loss is not finite."""
    train_pairs, val_pairs = (pairs_dataset(store, rows) for rows in (split.train, split.val))
    # Read before the workers claim their CPUs: a data set in memory needs none, and cannot starve.
    datasets = {"train": train_pairs.materialize() if plan.held else train_pairs, "val": val_pairs.materialize()}
    if not plan.held and (dropped := len(split.train) % cfg.num_workers):
        print(f"streaming to {cfg.num_workers} workers leaves out {dropped} pairs of each epoch", file=sys.stderr)
    TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "train": flat(cfg),
            "held": plan.held,
            "threads": plan.threads,
            "provenance": about,
        },
        scaling_config=ScalingConfig(
            num_workers=cfg.num_workers,
            use_gpu=cfg.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker, **({"GPU": 1} if cfg.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(cfg.out / "ray"),
            failure_config=FailureConfig(
                max_failures=cfg.max_failures,
                controller_failure_limit=3,  # type: ignore[call-arg]  # typed as the class of before Train V2
            ),
        ),
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split=[] if plan.held else ["train"]),
    ).fit()
    failures = [line["error"] for line in entries(cfg.out) if line["kind"] == "failure"]
    if failures:
        kept = RunFolder(cfg.out).best()
        raise TrainingError(
            f"{failures[-1]} " + (f"The last good checkpoint is {kept}." if kept else "There is no checkpoint yet.")
        )


def summary(
    cfg: TrainConfig, run: RunFolder, split: Split, plan: Plan, run_id: str | None, tracked: bool, seconds: float
) -> dict[str, Any]:
    """The --json object, from what the run left on disk."""
    best = run.best()
    assert best is not None, "a run that ended well has a best checkpoint"
    verify_folder(best)
    epochs = {line["epoch"]: line for line in entries(run.path) if line["kind"] == "epoch"}
    chosen = epochs[int(best.name.removeprefix("epoch_"))]
    last = epochs[max(epochs)]
    trained_s = sum(line["train"]["seconds"] for line in epochs.values())
    return {
        "run": str(run.path),
        "checkpoint": str(best),
        "model_sha256": sha256_file(best / "model.safetensors"),
        "mlflow_run_id": run_id,
        "tracked": tracked,
        "epochs": len(epochs),
        "best_epoch": chosen["epoch"],
        "stopped_early": len(epochs) < cfg.num_epochs,
        "steps": last["global_step"],
        "parameters": plan.parameters,
        "workers": cfg.num_workers,
        "held_in_memory": plan.held,
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
        "data_wait_share": sum(line["train"]["data_wait_seconds"] for line in epochs.values()) / max(trained_s, 1e-9),
        "save_seconds": sum(line["save_seconds"] for line in epochs.values()),
    }


def render_train(result: dict[str, Any], console: Console) -> None:
    """The result, and how to go on."""
    val = result["val"]
    early = ", stopped early" if result["stopped_early"] else ""
    table = Table(show_header=False, box=None)
    table.add_row("checkpoint", result["checkpoint"])
    table.add_row("epochs", f"{result['epochs']}{early}; best on validation: {result['best_epoch']}")
    table.add_row(
        "validation",
        f"cos_sim {val['cos_sim_mean']:.4f}, accepted at 0.80 {val['cosine_accept_rate']['0.80']:.1%} "
        f"of {val['pairs']} pairs",
    )
    table.add_row(
        "speed",
        f"{result['pairs_per_second']:.1f} pairs/s on {result['workers']} workers, {result['seconds']:.0f} s in all",
    )
    table.add_row("split", result["split"]["label"])
    table.add_row("MLflow run", result["mlflow_run_id"] or "none: the tracking server was away")
    console.print(table)
    console.print(
        "These are validation numbers, without controls. The answer is given by\n"
        f"  ray-app evaluate --store STORE --checkpoint {result['run']} --out REPORT",
        highlight=False,
        soft_wrap=True,
    )
