"""`ray-app prepare`: Ray Data builds a pair store from a source, one Parquet file for each of its tasks.

The cut into tasks depends on the input alone, and each file on its task alone: any number of workers writes
the same bytes. A task whose worker or node dies is done again elsewhere; a slow one holds up no other.
"""

import time
from pathlib import Path
from typing import Any

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from rich.console import Console
from rich.table import Table

from ray_app.cluster.autoscaler import wait_for_autoscaler
from ray_app.cluster.connection import cluster
from ray_app.commands.prepare.progress import PrepareProgress
from ray_app.commands.prepare.store_builder import BuiltTask, build_task, claim_store, finish, finished, sole_builder
from ray_app.config.prepare import (
    PrepareDavis,
    PrepareDsec,
    PrepareEventGpt,
    PrepareFlags,
    PrepareScenes,
    PrepareVideo,
    RecordedFlags,
)
from ray_app.errors import ResourceError, StoreError
from ray_app.events.windows import parse_duration
from ray_app.sources.base import Source, SourceTask
from ray_app.sources.recorded import WindowingConfig
from ray_app.store.filesystem import StorageDir, open_storage
from ray_app.store.manifest import PIXELS, REJECTED, Features, FeatureSpec

LONGEST_SILENCE_S = 600.0
"""Longest time in which no task of the cluster ends: on a slow core one may take minutes."""

REPEAT = "Finished files stay; repeat the command to continue."


def run_prepare(cfg: PrepareFlags) -> dict[str, Any]:
    """Build the store that a `prepare` command asks for."""
    return prepare(source_from_config(cfg), cfg)


def source_from_config(cfg: PrepareFlags) -> Source:
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
            )
        case PrepareEventGpt():
            from ray_app.sources.eventgpt.source import EventGptSource

            return EventGptSource.of_folder(
                cfg.root.absolute(),
                duration_us=parse_duration(cfg.duration) if cfg.duration else None,
                step_us=parse_duration(cfg.step) if cfg.step else None,
                instructions=cfg.instructions.absolute() if cfg.instructions else None,
                event_bins=cfg.event_bins,
            )
        case PrepareDsec():
            from ray_app.sources.dsec.source import DsecSource

            return DsecSource(cfg.root.absolute(), cut_of(cfg), window_rounding=cfg.window_rounding, align=cfg.align)
        case PrepareDavis():
            from ray_app.sources.davis.source import DavisSource

            return DavisSource(tuple(file.absolute() for file in cfg.files), cut_of(cfg))
    raise AssertionError(f"no source for {type(cfg).__name__}")


def cut_of(cfg: RecordedFlags) -> WindowingConfig:
    """Return how a command wants recordings divided into windows."""
    return WindowingConfig(
        durations_us=tuple(parse_duration(name) for name in cfg.durations),
        step_us=parse_duration(cfg.step) if cfg.step else None,
        pairs_per_window=cfg.pairs_per_window,
        event_bins=cfg.event_bins,
        max_gap_us=parse_duration(cfg.max_gap),
        event_window_us=parse_duration(cfg.event_window) if cfg.event_window else None,
    )


def prepare(source: Source, cfg: PrepareFlags, feature: FeatureSpec = PIXELS) -> dict[str, Any]:
    """Build a store of `source` in `cfg.out` on the cluster of `cfg.address`; returns the --json object.

    `feature` is the shape (3, height, width) and scale of both sides, uint8. StoreError: the folder is in the
    way or cannot be written, or too many pairs are rejected. ResourceError: the cluster loses workers, hangs, or
    does not see the input. What was built stays.
    """
    assert feature.dtype == "uint8", "pictures are stored as uint8"
    features = Features(event=feature, target=feature)
    folder = open_storage(cfg.out, cfg.storage_timeout_s)
    tasks = source.tasks()
    claim_store(folder, source, tasks, features)
    with sole_builder(folder):
        claim_store(folder, source, tasks, features)  # another one may have finished it in between
        return _build_store(source, cfg, folder, tasks, features)


def _build_store(
    source: Source, cfg: PrepareFlags, folder: StorageDir, tasks: list[SourceTask], features: Features
) -> dict[str, Any]:
    """Build the tasks that are not finished on the cluster, and publish the store."""

    def build(row: dict[str, Any]) -> dict[str, Any]:
        task = tasks[row["task"]]
        messages: list[str] = []
        here = folder.with_logger(messages.append)
        try:
            kept = finished(here, task)
            done = kept or build_task(source, task, here, features)
        except (StoreError, ResourceError) as error:  # Ray Data would wrap it in an error of its own
            return {"error": f"{error} {REPEAT}", "kind": type(error).__name__}
        built = {"built": done.model_dump_json(), "kept": kept is not None}
        return {"error": "", **built, "messages": "\n".join(messages), "peak_bytes": peak_memory_bytes()}

    built, new, peak_bytes = {}, [], 0
    with cluster(cfg.address) as info, PrepareProgress(sum(task.num_pairs for task in tasks)) as progress:
        num_cpus = wait_for_autoscaler(info, cfg.num_workers or 1, 1.0, use_gpu=False).cpus or 1.0
        began = time.perf_counter()
        num_workers = min(cfg.num_workers or max(int(num_cpus), 1), len(tasks))
        dataset = ray.data.from_items([{"task": i} for i in range(len(tasks))], override_num_blocks=len(tasks)).map(
            build,
            compute=ray.data.TaskPoolStrategy(size=num_workers),
            num_cpus=min(1.0, num_cpus / num_workers),
        )
        dataset.context.execution_no_progress_timeout_s = LONGEST_SILENCE_S
        try:
            for row in dataset.iter_rows():
                if row["error"]:
                    raise (StoreError if row["kind"] == "StoreError" else ResourceError)(row["error"])
                done = BuiltTask.model_validate_json(row["built"])
                built[done.task] = done
                progress.add(done, row["kept"], row["messages"])
                peak_bytes = max(peak_bytes, row["peak_bytes"])
                if not row["kept"]:
                    new.append(done)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            raise ResourceError(
                f"a task lost its worker time and again ({str(error).splitlines()[0]}). Take fewer --num-workers if "
                f"memory is short. {REPEAT}"
            ) from error
        except ExecutionTimeoutError as error:
            raise ResourceError(
                f"no task ended for {LONGEST_SILENCE_S:.0f} s, and {len(built)} of {len(tasks)} are done. See by "
                "`ray status` whether the cluster has CPUs for them, look for a node whose disk or network hangs, or "
                f"take fewer --num-workers if all are slow. {REPEAT}"
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
    if result["events_drawn"]:
        covered, drawn = (result[name] / 1e6 for name in ("events_covered", "events_drawn"))
        speed = f"{drawn / result['seconds']:,.1f} million drawn/s"
        table.add_row(
            "events", f"{covered:,.1f} million in {result['windows']:,} windows, {drawn:,.1f} drawn; {speed}"
        )
    table.add_row("fingerprint", result["fingerprint"])
    console.print(table)


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held at a time, by the system's count."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
