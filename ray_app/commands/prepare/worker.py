"""Work of a preparation on the cluster: one task of a source becomes one file, in a Ray task or in an actor.

Pixels are made by tasks. Encoders live in actors, one thread each on CPUs, so that bytes do not depend on their
number. On GPUs tasks read and draw the pictures that the actors encode. Errors that the user can fix come back as
rows: Ray Data would wrap them in an error of its own.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from ray_app.commands.prepare.encoding import EncodingPlan, FeatureEncoder
from ray_app.commands.prepare.store_builder import all_of, build_task, finished
from ray_app.errors import RayAppError
from ray_app.sources.base import RawPair, RejectedPair, Source, SourceTask
from ray_app.store.filesystem import StorageDir
from ray_app.store.manifest import Features

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DrawnPairs:
    """Pairs of a task on their way from the worker that drew them to one that encodes them."""

    items: list[RawPair | RejectedPair]
    """Every pair of the task; none where its file is there already."""


@dataclass(frozen=True)
class TaskBuilder:
    """Knowledge of every worker of a preparation."""

    source: Source
    """Source of the pairs."""
    tasks: list[SourceTask]
    """Its tasks; rows name them by number."""
    folder: StorageDir
    """Folder of the store."""
    features: Features
    """Features of the store."""
    plan: EncodingPlan | None
    """Encoders, if any."""

    def on(self, rows: "ray.data.Dataset", num_workers: int, num_cpus: float) -> "ray.data.Dataset":
        """Return the dataset of results."""
        cpus_per_worker = min(1.0, num_cpus / num_workers)
        if self.plan is None:
            return rows.map(self.build, compute=ray.data.TaskPoolStrategy(size=num_workers), num_cpus=cpus_per_worker)
        on_gpu = self.plan.device != "cpu"
        if on_gpu:
            rows = rows.map(self.draw, num_cpus=1.0)
        return rows.map(
            EncodingWorker,  # type: ignore[arg-type]  # a class is an actor
            fn_constructor_args=(self,),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=0 if on_gpu else cpus_per_worker,
            num_gpus=1 if on_gpu else 0,
        )

    def build(self, row: Row, encoder: FeatureEncoder | None = None) -> Row:
        """Build the file of a task, unless it is there; returns its record, or an error."""
        if row.get("error"):
            return row
        task = self.tasks[row["task"]]
        drawn: DrawnPairs | None = row.get("drawn")
        messages: list[str] = []
        here = self.folder.with_logger(messages.append)
        began, before_s = time.perf_counter(), encoder.forward_s if encoder else 0.0
        try:
            kept = finished(here, task)
            items = drawn.items if drawn else None
            done = kept or build_task(self.source, task, here, self.features, encoder, items)
        except RayAppError as error:
            return {"error": str(error), "kind": type(error).__name__}
        return {
            "error": "",
            "built": done.model_dump_json(),
            "kept": kept is not None,
            "messages": "\n".join(messages),
            "peak_bytes": peak_memory_bytes(),
            "forward_s": encoder.forward_s - before_s if encoder else 0.0,
            "busy_s": time.perf_counter() - began,
        }

    def draw(self, row: Row) -> Row:
        """Read and draw the pictures of a task for an encoder elsewhere, unless its file is there."""
        task = self.tasks[row["task"]]
        try:
            items = [] if finished(self.folder, task) else list(all_of(self.source, task))
        except RayAppError as error:
            return {"task": row["task"], "error": str(error), "kind": type(error).__name__, "drawn": None}
        return {"task": row["task"], "error": "", "kind": "", "drawn": DrawnPairs(items)}


class EncodingWorker:
    """Actor that holds the encoders."""

    def __init__(self, work: TaskBuilder) -> None:
        assert work.plan
        if work.plan.device == "cpu":
            torch.set_num_threads(1)
        self._work, self._encoder = work, FeatureEncoder(work.plan)

    def __call__(self, row: Row) -> Row:
        return self._work.build(row, self._encoder)


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held at a time, by the system's count."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
