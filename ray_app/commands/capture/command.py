"""`ray-app capture`: outputs of live models as traces, shard by shard; one replica of both models for each GPU.

Ray Data hands shards (a few windows of one video) to a pool of actors, each of which loads the models once. A shard
that is finished and holds is not captured again, so the same command continues an interrupted capture.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ray_app import errors
from ray_app.cluster.connection import allow_long_tasks, cluster
from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.capture.capture_worker import CaptureActor, CapturePlan
from ray_app.config.speculative import CaptureConfig
from ray_app.errors import InputError, ResourceError, StoreError
from ray_app.events.windows import parse_duration
from ray_app.language_models.eventgpt import EventGpt
from ray_app.language_models.kinds import loader
from ray_app.language_models.loading import Vocabulary, model_files, vocabulary
from ray_app.sources.base import named_sequences
from ray_app.sources.clips import ClipWindow, clip_windows
from ray_app.sources.video import identity
from ray_app.store.capture_store import REJECTED_ROWS, SHARDS, TRACES, claim_capture, publish_capture, read_shard
from ray_app.terminal import make_console

SHARD_ROWS = 16
"""Windows of a shard: what a kill costs each replica at most."""
FEW_ROWS = 80
"""With fewer, the usual gap of `replay` leaves too little to learn from."""


def run_capture(cfg: CaptureConfig) -> dict[str, Any]:
    """Capture what is not captured yet; returns the --json object.

    InputError: a model or video that cannot be read. StoreError: --out holds something else. ResourceError: no
    transformers, too few GPUs.
    """
    target = vocabulary(cfg.target)
    for folder in (cfg.target, cfg.drafter):
        if loader(folder) is EventGpt:
            raise InputError(f"{folder} is EventGPT, which reads event images; capture shows frames. Take `decode`.")
    plan = plan_of(cfg)
    folder = cfg.out.absolute()
    claim_capture(folder, settings_of(cfg))
    kept = {name for name, _ in plan if (shard := read_shard(folder, name)) and not shard.rejected}
    missing = [(name, windows) for name, windows in plan if name not in kept]
    verified, num_workers = np.zeros(2, dtype=np.int64), 0
    if missing:
        with cluster(cfg.address) as info:
            num_workers = _num_workers(cfg, info, len(missing))
            verified = _capture(cfg, info, missing, num_workers)
    shards = {name: shard for name, _ in plan if (shard := read_shard(folder, name))}
    if lost := sorted({name for name, _ in plan} - shards.keys()):
        raise StoreError(f"{folder / SHARDS / lost[0]}: what was just written does not verify; repeat the command.")
    rows = [row for shard in shards.values() for row in shard.rows]
    rejected = [line for shard in shards.values() for line in shard.rejected]
    publish_capture(folder, rows, rejected)
    if not rows:
        raise InputError(f"no window could be captured; the reasons are in {folder / REJECTED_ROWS}.")
    return {
        "traces": str(cfg.out / TRACES),
        "rows": len(rows),
        "rows_kept": sum(len(shards[name].rows) for name in kept),
        "rejected": len(rejected),
        "shards": len(plan),
        "workers": num_workers,
        "timing_ms": _mean_times(rows),
        "num_verified": int(verified[0]),
        "num_verified_otherwise": int(verified[1]),
        "replay": _replay_command(cfg, target, len(rows)),
    }


def render_capture(result: dict[str, Any], console: Console) -> None:
    """Print the result for people, and the command that comes next."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    kept = f", {result['rows_kept']:,} kept from an earlier start" if result["rows_kept"] else ""
    lost = f" (reasons in {REJECTED_ROWS})" if result["rejected"] else ""
    table.add_row("traces", result["traces"])
    table.add_row("rows", f"{result['rows']:,}{kept}")
    table.add_row("rejected", f"{result['rejected']:,}{lost}")
    for stage, ms in result["timing_ms"].items():
        table.add_row(stage.replace("_", " "), f"{ms:,.2f} ms, mean over rows")
    if result["num_verified"]:
        table.add_row(
            "chosen otherwise when verified together",
            f"{result['num_verified_otherwise']:,} of {result['num_verified']:,} tokens captured now",
        )
    table.add_row("next", result["replay"])
    console.print(table)


def _capture(cfg: CaptureConfig, info: ClusterInfo, missing: CapturePlan, num_workers: int) -> NDArray[np.int64]:
    """(tokens verified, tokens chosen otherwise). Errors of the actors are raised as they were."""
    verified = np.zeros(2, dtype=np.int64)
    total = sum(len(windows) for _, windows in missing)
    columns = (TextColumn("capture"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeRemainingColumn())
    paths = {
        "clips": tuple(path.absolute() for path in cfg.clips),
        **{name: getattr(cfg, name).absolute() for name in ("target", "drafter", "out")},
    }
    dataset = ray.data.from_items([{"shard": name} for name, _ in missing], override_num_blocks=len(missing)).map(
        CaptureActor,  # type: ignore[arg-type]  # a class is an actor
        fn_constructor_args=(
            cfg.model_copy(update=paths),
            missing,
            "cuda" if cfg.use_gpu else "cpu",
            max(int(info.cpus) // num_workers, 1),
        ),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=1 if cfg.use_gpu else 0,
    )
    with Progress(*columns, console=make_console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        for done in allow_long_tasks(dataset).iter_rows():
            if done["error"]:
                raise getattr(errors, done["kind"])(
                    f"{done['error']} Finished shards stay; repeat the command to continue."
                )
            verified += np.asarray(done["verified"])
            bar.advance(task, done["rows"])
    return verified


def _num_workers(cfg: CaptureConfig, info: ClusterInfo, num_shards: int) -> int:
    """One replica for each GPU; without GPUs one in all: it uses every CPU by itself."""
    most = int(info.gpus) if cfg.use_gpu else int(info.cpus)
    wanted = min(cfg.num_workers or (max(most, 1) if cfg.use_gpu else 1), num_shards)
    if wanted > most:
        kind = "GPUs" if cfg.use_gpu else "CPUs"
        raise ResourceError(
            f"{wanted} replicas need {wanted} {kind}, the cluster has {most}; take fewer --num-workers"
            + (", or leave --use-gpu out" if cfg.use_gpu else "")
        )
    return wanted


def plan_of(cfg: CaptureConfig) -> CapturePlan:
    """Shards with their windows; the cut depends on the input alone."""
    duration_us = parse_duration(cfg.duration)
    windows = clip_windows(
        [path.absolute() for path in cfg.clips],
        duration_us=duration_us,
        step_us=parse_duration(cfg.step) if cfg.step else max(duration_us // 2, 1),
        num_frames=cfg.num_frames,
        fps=cfg.fps,
    )
    by_sequence: dict[str, list[ClipWindow]] = {}
    for window in windows:
        by_sequence.setdefault(window.sequence, []).append(window)
    return [
        (f"{sequence}-{first // SHARD_ROWS:04d}", mine[first : first + SHARD_ROWS])
        for sequence, mine in by_sequence.items()
        for first in range(0, len(mine), SHARD_ROWS)
    ]


def settings_of(cfg: CaptureConfig) -> dict[str, Any]:
    """All that decides what is captured, as JSON values."""
    models = {"target": cfg.target, "drafter": cfg.drafter}
    return {
        "clips": [{"sequence": name, **identity(path)} for name, path in named_sequences(cfg.clips)],
        "fps": cfg.fps,
        "duration": cfg.duration,
        "step": cfg.step,
        "num_frames": cfg.num_frames,
        "question": cfg.question,
        "max_new_tokens": cfg.max_new_tokens,
        "verify": list(cfg.verify),
        "features": cfg.features,
        "dtype": cfg.dtype,
        **{side: {"shown": loader(folder).shows, "files": model_files(folder)} for side, folder in models.items()},
    }


def _mean_times(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each stage over the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        stages = dict(row.get("timing_ms", {}))
        for gamma, ms in stages.pop("verify", {}).items():
            stages[f"verify({gamma})"] = ms
        for stage, ms in stages.items():
            found.setdefault(stage, []).append(ms)
    return {stage: float(np.mean(each)) for stage, each in found.items()}


def _replay_command(cfg: CaptureConfig, target: Vocabulary, num_rows: int) -> str:
    """Return the command that takes the captured traces up, with a gap that leaves something to learn from."""
    words = ["ray-app", "replay", str(cfg.out / TRACES), "--vocabulary", str(target.size)]
    words += ["--end-token", str(target.end_token)]
    words += ["--start-token", str(target.start_token)] if target.start_token is not None else []
    words += ["--gap", str(num_rows // 10)] if num_rows < FEW_ROWS else []
    return shlex.join(words)
