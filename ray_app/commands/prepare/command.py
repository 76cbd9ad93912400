"""`ray-app prepare`: Ray Data builds a pair store from a source, one Parquet file for each of its tasks.

The cut into tasks depends on the input alone, and each file on its task alone: any number of workers writes
the same bytes. A task whose worker or node dies is done again elsewhere; a slow one holds up no other.
"""

import shlex
import sys
import time
from typing import Any

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from rich.console import Console
from rich.table import Table

from ray_app import errors
from ray_app.cluster import connection
from ray_app.cluster.autoscaler import wait_for_autoscaler
from ray_app.cluster.connection import allow_long_tasks, cluster
from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.prepare.encoding import EncodingPlan, encoding_plan, views_of
from ray_app.commands.prepare.progress import PrepareProgress
from ray_app.commands.prepare.sole_builder import sole_builder
from ray_app.commands.prepare.store_builder import BuiltTask, claim_store, finish
from ray_app.commands.prepare.worker import TaskBuilder
from ray_app.config.prepare import (
    PrepareDavis,
    PrepareDsec,
    PrepareEventGpt,
    PrepareFlags,
    PrepareScenes,
    PrepareVideo,
    RecordedFlags,
)
from ray_app.errors import ResourceError, RunInterrupted
from ray_app.events.windows import parse_duration
from ray_app.sources.base import ONE_EACH, Source, Views
from ray_app.sources.recorded import WindowingConfig
from ray_app.store.filesystem import open_storage
from ray_app.store.manifest import PIXELS, REJECTED, EncoderRecord, Features, FeatureSpec


def run_prepare(cfg: PrepareFlags) -> dict[str, Any]:
    """Build the store that a `prepare` command asks for."""
    views = views_of(cfg)
    return prepare(source_from_config(cfg, views), cfg, views=views)


def source_from_config(cfg: PrepareFlags, views: Views = ONE_EACH) -> Source:
    """Return the source that a `prepare` command names, with its defaults filled in.

    Only its own module is imported: each brings libraries that the others do without.
    """
    match cfg:
        case PrepareScenes():
            from ray_app.sources.scenes import ScenesSource

            duration_us = parse_duration(cfg.duration)
            return ScenesSource(
                num_pairs=cfg.num_pairs,
                num_sequences=cfg.num_sequences,
                seed=cfg.seed,
                width=cfg.width,
                height=cfg.height,
                duration_us=duration_us,
                step_us=parse_duration(cfg.step) if cfg.step else duration_us // 2,
                event_span_us=parse_duration(cfg.event_span),
                views=views,
            )
        case PrepareVideo():
            from ray_app.sources.video import VideoSource

            return VideoSource(
                files=tuple(file.absolute() for file in cfg.files),
                fps=cfg.fps,
                seed=cfg.seed,
                width=cfg.width,
                height=cfg.height,
                duration_us=parse_duration(cfg.duration),
                frame_stride=cfg.frame_stride,
                views=views,
            )
        case PrepareEventGpt():
            from ray_app.sources.eventgpt.source import EventGptSource

            return EventGptSource.of_folder(
                cfg.root.absolute(),
                duration_us=parse_duration(cfg.duration) if cfg.duration else None,
                step_us=parse_duration(cfg.step) if cfg.step else None,
                instructions=cfg.instructions.absolute() if cfg.instructions else None,
                event_bins=cfg.event_bins,
                views=views,
            )
        case PrepareDsec():
            from ray_app.sources.dsec.source import DsecSource

            return DsecSource(
                cfg.root.absolute(), cut_of(cfg, views), window_rounding=cfg.window_rounding, align=cfg.align
            )
        case PrepareDavis():
            from ray_app.sources.davis.source import DavisSource

            return DavisSource(tuple(file.absolute() for file in cfg.files), cut_of(cfg, views))
    raise AssertionError(f"no source for {type(cfg).__name__}")


def cut_of(cfg: RecordedFlags, views: Views = ONE_EACH) -> WindowingConfig:
    """Return how a command wants recordings divided into windows."""
    return WindowingConfig(
        durations_us=tuple(parse_duration(name) for name in cfg.durations),
        step_us=parse_duration(cfg.step) if cfg.step else None,
        pairs_per_window=cfg.pairs_per_window,
        event_bins=views.num_event_images if views.num_event_images > 1 else cfg.event_bins,
        max_gap_us=parse_duration(cfg.max_gap),
        event_window_us=parse_duration(cfg.event_window) if cfg.event_window else None,
        views=views,
    )


def prepare(
    source: Source, cfg: PrepareFlags, feature: FeatureSpec = PIXELS, views: Views = ONE_EACH
) -> dict[str, Any]:
    """Build a store of `source` in `cfg.out` on the cluster of `cfg.address`; returns the --json object.

    `feature` is the shape (3, height, width) and scale, uint8, of each side without an encoder; `views` the number
    of pictures that the source gives of each side. StoreError: the folder is in the way or cannot be written, or too
    many pairs are rejected. InputError: an encoder that cannot be used. ResourceError: the cluster loses workers,
    hangs, or does not see the input. RunInterrupted: Ctrl-C. What was built stays.
    """
    assert feature.dtype == "uint8", "pictures are stored as uint8"
    plan = encoding_plan(cfg, feature, views)
    features = plan.features if plan else Features(event=feature, target=feature)
    folder = open_storage(cfg.out, cfg.storage_timeout_s)
    tasks = source.tasks()
    claim_store(folder, source, tasks, features)
    with sole_builder(folder):
        claim_store(folder, source, tasks, features)  # another one may have finished it in between
        try:
            return _build_store(TaskBuilder(source, tasks, folder, features, plan), cfg)
        except KeyboardInterrupt:
            raise RunInterrupted(f"interrupted. {how_to_continue()}") from None


def how_to_continue() -> str:
    """Return a sentence with the command that continues: this process's own."""
    return f"Finished files stay; continue with: {shlex.join(('ray-app', *sys.argv[1:]))}"


def _build_store(work: TaskBuilder, cfg: PrepareFlags) -> dict[str, Any]:
    """Build the tasks that are not finished on the cluster, and publish the store."""
    source, tasks, folder, features, plan = work.source, work.tasks, work.folder, work.features, work.plan

    built, new, peak_bytes, forward_s, busy_s = {}, [], 0, 0.0, 0.0
    with (
        cluster(cfg.address) as info,
        PrepareProgress(sum(task.num_pairs for task in tasks), plan.num_images if plan else 0) as progress,
    ):
        there = wait_for_autoscaler(info, cfg.num_workers or 1, 1.0, use_gpu=cfg.use_gpu)
        num_cpus = there.cpus or 1.0
        began = time.perf_counter()
        num_workers = _num_workers(cfg, there, len(tasks))
        progress.show(f"building {len(tasks):,} files with {num_workers} workers")
        rows = ray.data.from_items([{"task": i} for i in range(len(tasks))], override_num_blocks=len(tasks))
        dataset = allow_long_tasks(work.on(rows, num_workers, num_cpus))
        try:
            for row in dataset.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["kind"])(f"{row['error']} {how_to_continue()}")
                done = BuiltTask.model_validate_json(row["built"])
                built[done.task] = done
                progress.add(done, row["kept"], row["messages"])
                peak_bytes = max(peak_bytes, row["peak_bytes"])
                forward_s, busy_s = forward_s + row["forward_s"], busy_s + row["busy_s"]
                if not row["kept"]:
                    new.append(done)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            raise ResourceError(
                f"a task lost its worker time and again ({str(error).splitlines()[0]}). Take fewer --num-workers if "
                f"memory is short. {how_to_continue()}"
            ) from error
        except ExecutionTimeoutError as error:
            raise ResourceError(
                f"no task ended for {connection.LONGEST_TASK_S:.0f} s, and {len(built)} of {len(tasks)} are "
                "done. See by `ray status` whether the cluster has CPUs for them, look for a node whose disk or "
                f"network hangs, or take fewer --num-workers if all are slow. {how_to_continue()}"
            ) from error
        seconds = time.perf_counter() - began
    manifest = finish(folder, source, [built[task.name] for task in tasks], features, cfg.max_rejected_fraction)
    num_new = sum(done.num_pairs for done in new)
    events_drawn = sum(done.events_drawn for done in new)
    per_second = num_new / seconds
    return {
        "store": str(cfg.out),
        "source": manifest.source,
        "pairs": manifest.pairs,
        "sequences": manifest.sequences,
        "rejected": manifest.rejected,
        "fingerprint": manifest.fingerprint,
        "durations": list(manifest.durations),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "pairs_reused": sum(done.num_pairs for done in built.values()) - num_new,
        "windows": sum(done.windows for done in new),
        "events_covered": sum(done.events_covered for done in new),
        "events_drawn": events_drawn,
        "workers": num_workers,
        "seconds": round(seconds, 3),
        "worker_peak_bytes": peak_bytes,
        "pairs_per_second": round(per_second, 3),
        "pairs_per_second_per_core": round(per_second / min(num_workers, num_cpus), 3),
        **(_encoding(plan, num_new, seconds, forward_s, busy_s) if plan else {}),
    }


def _num_workers(cfg: PrepareFlags, info: ClusterInfo, num_tasks: int) -> int:
    """Return the number of workers: as asked, or one for each CPU or GPU. ResourceError: fewer GPUs than that."""
    most = int(info.gpus) if cfg.use_gpu else max(int(info.cpus), 1)
    wanted = min(cfg.num_workers or max(most, 1), num_tasks)
    if cfg.use_gpu and wanted > most:
        raise ResourceError(
            f"--use-gpu with {wanted} workers needs {wanted} GPUs, the cluster has {most}; take fewer --num-workers, "
            "or leave --use-gpu out"
        )
    return wanted


def _encoding(plan: EncodingPlan, num_pairs: int, seconds: float, forward_s: float, busy_s: float) -> dict[str, Any]:
    """Return what encoders add to the --json object."""
    num_images = num_pairs * plan.num_images
    specs = {side: getattr(plan.features, side) for side in plan.folders}
    return {
        "encoders": {side: spec.encoder.model_dump() for side, spec in specs.items()},
        "feature_shapes": {side: list(spec.shape) for side, spec in specs.items()},
        "images": num_images,
        "images_per_second": round(num_images / seconds, 3),
        "forward_seconds": round(forward_s, 3),
        "forward_fraction": round(forward_s / busy_s, 4) if busy_s else 0.0,
    }


def render_prepare(result: dict[str, Any], console: Console) -> None:
    """Print the result for people."""
    speed = f"{result['pairs_per_second']:,.2f} pairs/s, {result['pairs_per_second_per_core']:,.2f} for each core"
    kept = f", {result['pairs_reused']:,} kept from an earlier start" if result["pairs_reused"] else ""
    lost = f" (reasons in {REJECTED})" if result["rejected"] else ""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("store", result["store"])
    table.add_row("pairs", f"{result['pairs']:,}{kept}")
    table.add_row("sequences", f"{result['sequences']:,}")
    table.add_row("rejected", f"{result['rejected']:,}{lost}")
    table.add_row("size", f"{result['bytes'] / 1e6:,.1f} MB in {result['files']:,} files")
    table.add_row("time", f"{result['seconds']:,.1f} s, {speed}")
    for side, shape in result.get("feature_shapes", {}).items():
        encoder = EncoderRecord.model_validate(result["encoders"][side])
        table.add_row(side, f"{' x '.join(map(str, shape))} numbers by {encoder}")
    if result.get("images"):
        table.add_row(
            "encoding",
            f"{result['images']:,} pictures, {result['images_per_second']:,.1f} pictures/s, forward passes "
            f"{result['forward_fraction']:.0%} of the workers' time",
        )
    if result["events_drawn"]:
        covered, drawn = (result[name] / 1e6 for name in ("events_covered", "events_drawn"))
        speed = f"{drawn / result['seconds']:,.1f} million drawn/s"
        table.add_row(
            "events", f"{covered:,.1f} million in {result['windows']:,} windows, {drawn:,.1f} drawn; {speed}"
        )
    table.add_row("fingerprint", result["fingerprint"])
    console.print(table)
