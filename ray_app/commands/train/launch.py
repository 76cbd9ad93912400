"""The driver's use of Ray Train: read the pairs, compute initial statistics, run workers until the run ends."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray
from ray.data import Dataset
from ray.exceptions import RayActorError
from ray.train import (
    BackendConfig,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)

from ray_app.cluster.node_address import NodeAddressTorchConfig
from ray_app.cluster.ray_internals import LeanTrainer, unwrap_worker_failure
from ray_app.commands.train.context import INIT, RunContext
from ray_app.commands.train.elastic import ElasticResizeCallback
from ray_app.commands.train.initialization import PairsThroughRay, compute_init, load_init
from ray_app.commands.train.worker import WorkerSpec, train_loop_per_worker
from ray_app.config.train import LanguageModelTrainConfig
from ray_app.data.pairs_dataset import ordered_pairs, pairs_dataset
from ray_app.data.training_means import mean_target
from ray_app.errors import RunInterrupted, StoreError, TrainingError
from ray_app.runs.event_log import entries, entries_since_start
from ray_app.runs.run_dir import RunDir


def run_training(
    spec: WorkerSpec,
    run: RunDir,
    cpus_per_worker: float,
    name: str,
    show: Callable[[str], None],
    *,
    own_cluster: bool,
) -> None:
    """Train a run to its end or until it is asked to stop; `show` takes what is done before the first step.

    TrainingError: a loss is not finite.
    """
    context = spec.context.at(run.path)
    cfg, store, split = context.cfg, context.store, context.split
    pairs = f"{len(split.train):,} training and {len(split.val):,} validation pairs"
    run.download(INIT)
    # A single worker shares its pairs with no other, and Ray Data takes seconds to start.
    alone = spec.in_memory and cfg.max_workers == 1 and not context.starts_from
    spec = replace(spec, reads_store=alone or context.division.by_features)
    datasets: dict[str, Dataset] = {}
    if not alone:
        show(f"reading {pairs}")
        datasets = _datasets(context, spec.in_memory)
    if context.starts_from:
        show(f"computing {context.starts_from} of the training part")
    compute_init(context, PairsThroughRay(store, split, datasets))
    run.upload(INIT)
    if len(split.val) and not isinstance(cfg, LanguageModelTrainConfig):  # there is no baseline of image tokens
        if context.requires != "nothing":
            spec = replace(spec, mean_target_D=load_init(context)["target_mean"])
        elif not alone:
            spec = replace(spec, mean_target_D=mean_target(store, split.train))
    if not spec.in_memory and (dropped := len(split.train) % cfg.min_workers):
        print(f"streaming to {cfg.num_workers} workers leaves out {dropped} pairs of each epoch", file=sys.stderr)
    while True:
        last_step = last_logged_step(run.path)
        noun = "worker" if cfg.max_workers == 1 else "workers"
        show(f"starting {cfg.num_workers} {noun}" + (f", which reads {pairs}" if alone else ""))
        try:
            of_workers = {} if spec.reads_store else datasets
            run_worker_group(spec, run, cpus_per_worker, name, of_workers, own_cluster=own_cluster)
            break
        except TrainingFailedError:
            run.refresh()
            if not (cfg.elastic and cfg.max_failures and last_logged_step(run.path) > last_step):
                raise
            name = f"{name}-again"
    run.refresh()
    failures = [line["error"] for line in entries_since_start(run.path) if line["kind"] == "failed"]
    if failures:
        best = run.best()
        raise TrainingError(
            f"{failures[-1]} "
            + (f"The last good checkpoint is {run.shown(best)}." if best else "There is no checkpoint yet.")
        )


def _datasets(context: RunContext, in_memory: bool) -> dict[str, Dataset]:
    """Training and validation pairs; what workers hold in memory is read here, before they claim their CPUs.

    Workers that divide features read the store themselves: Ray's memory need not have room for all of it.
    """
    store, split = context.store, context.split
    read_cpus = 0.0 if context.cfg.elastic else 1.0
    if context.division.by_features:
        return {"train": ordered_pairs(store, split.train, read_cpus=read_cpus)}
    if in_memory:
        datasets = {"train": ordered_pairs(store, split.train, read_cpus=read_cpus).materialize()}
    else:
        datasets = {"train": pairs_dataset(store, split.train, read_cpus=read_cpus)}
    if len(split.val):
        datasets["val"] = ordered_pairs(store, split.val, read_cpus=read_cpus).materialize()
    return datasets


def run_worker_group(
    spec: WorkerSpec,
    run: RunDir,
    cpus_per_worker: float,
    name: str,
    datasets: dict[str, Dataset] | None = None,
    *,
    own_cluster: bool = False,
) -> None:
    """Run a group of workers from its start to its end. `own_cluster`: the cluster ends with this process.

    Ray's own records go to this process's copy of the run: its controller runs on this machine.
    """
    cfg = spec.context.cfg
    LeanTrainer(
        train_loop_per_worker,
        train_loop_config={"spec": ray.put(spec)},
        # One worker has no process group; and without torch the controller starts seconds earlier.
        backend_config=NodeAddressTorchConfig() if cfg.max_workers > 1 else BackendConfig(),
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
            callbacks=[ElasticResizeCallback(run.path)] if cfg.elastic else [],  # type: ignore[list-item]
            failure_config=FailureConfig(
                max_failures=cfg.max_failures,
                controller_failure_limit=3,  # type: ignore[call-arg]
            ),
        ),
        datasets={**(datasets or {})},
        dataset_config=DataConfig(datasets_to_split=[] if spec.in_memory else ["train"]),
        own_cluster=own_cluster,
    ).fit()


def last_logged_step(run: Path) -> int:
    """Newest optimizer step in the event log; 0 without one."""
    return max((line["global_step"] for line in entries(run) if line["kind"] == "step"), default=0)


@contextmanager
def with_resume_hint(run: RunDir) -> Iterator[None]:
    """Re-raise Ctrl-C, dead workers and failed disks as errors of ours with a resume command.

    One dead worker also fails its peers, so any death among the causes counts.
    """
    resume = f"What was saved is whole; resume with: {run.resume}"
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted. {resume}") from None
    except StoreError as error:
        raise StoreError(f"{str(error).rstrip('.')}. {resume}") from error
    except (RayActorError, WorkerGroupError) as error:
        causes = [
            unwrap_worker_failure(failure) for failure in getattr(error, "worker_failures", {0: error}).values()
        ]
        if deaths := [cause for cause in causes if isinstance(cause, RayActorError)]:
            raise TrainingError(
                f"The training's processes died ({str(deaths[0]).splitlines()[0]}); a machine whose memory is full "
                f"kills them, and the log of its kernel says so. {resume}"
            ) from error
        if refusals := [cause for cause in causes if isinstance(cause, StoreError)]:
            raise StoreError(f"{str(refusals[0]).rstrip('.')}. {resume}") from error
        raise  # a bug: keep the traceback
