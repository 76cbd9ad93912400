"""`ray-app decode`: live speculative decoding, drafter by drafter next to plain decoding, on the clock.

A replica is an actor, one for each GPU or as many as are asked for; each decodes whole sequences in order, because
drafters learn from the answers before. The same command continues an interrupted run.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ray_app import errors
from ray_app.cluster.connection import BUSY_HINT, cluster
from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.decode.drafters import named_absolutely, require_drafters
from ray_app.commands.decode.files import publish, settings_of, write_event_log
from ray_app.commands.decode.inputs import DecodeInput, open_input, other_row
from ray_app.commands.decode.page import decode_page
from ray_app.commands.decode.summary import Line, plain_summary, summarise
from ray_app.commands.decode.table import HEADS, cells, headline, notes
from ray_app.commands.decode.watch import Watch
from ray_app.commands.decode.worker import DecodeActor, DecodeShard, decode_lane, lanes_of, shards_of
from ray_app.config.base import TrackingFlags, flat
from ray_app.config.decode import DecodeConfig
from ray_app.core.speculative.prompts import AnsweredPrompt
from ray_app.errors import InputError, ResourceError, StoreError
from ray_app.language_models.kinds import loader
from ray_app.language_models.loading import Vocabulary, vocabulary
from ray_app.reports.folder import DECODE_SETTINGS
from ray_app.reports.html import require_suffix, write_output
from ray_app.store.capture_store import SHARDS, claim_capture, read_shard
from ray_app.store.traces import read_traces
from ray_app.terminal import make_console
from ray_app.tracking.mlflow_logger import sync_run
from ray_app.tracking.uri import tracking_uri

START_S = 300
"""Longest wait for the replicas' resources, in seconds."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A run's facts, resolved before anything is started."""

    cfg: DecodeConfig
    """Settings with absolute paths."""
    data: DecodeInput
    """Rows."""
    answered: tuple[AnsweredPrompt, ...]
    """Answers that drafters learn from first."""
    shards: tuple[DecodeShard, ...]
    """All rows in shards."""


def run_decode(cfg: DecodeConfig) -> dict[str, Any]:
    """Decode what is not decoded yet; return the --json object.

    ConfigError, InputError: a source, model or drafter that cannot be used. StoreError: --out holds something else.
    ResourceError: no transformers, too few GPUs, or their memory is exceeded.
    """
    require_suffix("--html", cfg.html, ".html")
    plan = plan_of(cfg)
    cfg = plan.cfg
    claim_capture(cfg.out, settings_of(cfg, plan.data), DECODE_SETTINGS)
    missing = [shard for shard in plan.shards if not _is_whole(cfg.out, shard)]
    if cfg.watch:
        watch = Watch(make_console())
        torch.set_num_threads(1)
        decode_lane(cfg, plan.data, plan.shards, plan.answered, _device(cfg), watch.on_pass, watch.on_row)
    elif missing:
        with cluster(cfg.address) as info:
            _decode(plan, _num_workers(cfg, info))
    shards = {shard.name: found for shard in plan.shards if (found := read_shard(cfg.out, shard.name))}
    if lost := [shard.name for shard in plan.shards if shard.name not in shards]:
        raise StoreError(f"{cfg.out / SHARDS / lost[0]}: what was just written does not verify; repeat the command.")
    lines = sorted((row for shard in shards.values() for row in shard.rows), key=lambda row: row["row"])
    rejected = [line for shard in shards.values() for line in shard.rejected]
    if not lines:
        raise InputError(
            f"no row could be decoded: {rejected[0]['reason'].rstrip('.')}. The reasons of all rows are in "
            f"{cfg.out / SHARDS}/*.rejected.jsonl."
        )
    kept = sum(len(shards[shard.name].rows) for shard in plan.shards if shard not in missing)
    result = _result(plan, lines, len(rejected), kept)
    publish(cfg, lines, rejected, result)
    result["tracked"] = _track(cfg, result)
    if cfg.html:
        write_output("--html", cfg.html, decode_page(plan.data, lines, result).encode())
    return result


def plan_of(cfg: DecodeConfig) -> DecodePlan:
    """Check everything that can be checked before a model is loaded. Errors as `run_decode`."""
    paths = ("source", "learn_from")
    absolute: dict[str, Any] = {name: tuple(path.absolute() for path in getattr(cfg, name)) for name in paths}
    single = {"target": cfg.target, "out": cfg.out, "adapter": cfg.adapter, "event_encoder": cfg.event_encoder}
    absolute |= {name: path and path.absolute() for name, path in single.items()}
    absolute["drafter"] = tuple(map(named_absolutely, cfg.drafter))
    cfg = cfg.model_copy(update=absolute)
    target = vocabulary(cfg.target)
    loader(cfg.target)
    require_drafters(cfg)
    data = open_input(cfg)
    if "other" in cfg.drafter_sees:
        other_row(data.rows, data.rows[0])
    return DecodePlan(cfg, data, tuple(_answers(cfg, target)), tuple(shards_of(data.rows)))


def render_decode(result: dict[str, Any], console: Console) -> None:
    """Print the table and what to read with it."""
    table = Table(title=headline(result), title_justify="left")
    table.add_column("drafter")
    for head in HEADS:
        table.add_column(head, justify="right")
    for name, numbers in result["results"].items():
        table.add_row(name, *cells(numbers))
    console.print(table)
    for note in notes(result):
        console.print(note)


def _result(plan: DecodePlan, lines: Sequence[Line], num_rejected: int, kept: int) -> dict[str, Any]:
    cfg = plan.cfg
    end = vocabulary(cfg.target).end_token
    return {
        "results": {name: summarise(lines, name, np.random.default_rng(0)) for name in lines[0]["drafters"]},
        "plain": plain_summary(lines),
        "rows": len(lines),
        "rows_kept": kept,
        "rejected": num_rejected,
        "sequences": len({line["sequence"] for line in lines}),
        "without_end": sum(line["target_tokens"][-1] != end for line in lines),
        "max_new_tokens": cfg.max_new_tokens,
        "num_speculative_tokens": cfg.num_speculative_tokens,
        "draft_length": cfg.draft_length,
        "temperature": cfg.temperature,
        "out": str(cfg.out),
    }


def _decode(plan: DecodePlan, num_workers: int) -> None:
    """Decode on the connected cluster. Errors of the replicas are raised as they were."""
    cfg, lanes = plan.cfg, lanes_of(plan.shards, num_workers)
    replica: Any = ray.remote(DecodeActor).options(num_cpus=1, num_gpus=1 if cfg.use_gpu else 0)
    data, answered = ray.put(plan.data), ray.put(plan.answered)
    actors = [replica.remote(cfg, data, answered, _device(cfg)) for _ in lanes]
    columns = (TextColumn("decode"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    try:
        _, waiting = ray.wait([actor.ready.remote() for actor in actors], num_returns=len(actors), timeout=START_S)
        if waiting:
            raise ResourceError(f"{len(waiting)} of {len(actors)} replicas did not start in {START_S} s. {BUSY_HINT}")
        # An actor takes its calls in order: each drafter learns from the rows before.
        pending = {
            actor.decode.remote(shard): len(shard.rows)
            for actor, lane in zip(actors, lanes, strict=True)
            for shard in lane
        }
        with Progress(*columns, console=make_console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=len(plan.data.rows))
            while pending:
                (finished,), _ = ray.wait(list(pending))
                done = ray.get(finished)
                if done["error"]:
                    raise getattr(errors, done["kind"])(
                        f"{done['error']} Finished shards stay; repeat the command to continue."
                    )
                bar.advance(task, pending.pop(finished))
    except RayActorError as error:
        raise ResourceError(
            "a replica died, which is mostly a lack of memory; take fewer --num-workers or a smaller model. Finished "
            "shards stay; repeat the command to continue."
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)


def _num_workers(cfg: DecodeConfig, info: ClusterInfo) -> int:
    most = int(info.gpus) if cfg.use_gpu else int(info.cpus)
    wanted = cfg.num_workers or (max(most, 1) if cfg.use_gpu else 1)
    if wanted > most:
        kind = "GPUs" if cfg.use_gpu else "CPUs"
        raise ResourceError(
            f"{wanted} replicas need {wanted} {kind}, the cluster has {most}; take fewer --num-workers."
        )
    return wanted


def _device(cfg: DecodeConfig) -> str:
    return "cuda" if cfg.use_gpu else "cpu"


def _is_whole(out: Path, shard: DecodeShard) -> bool:
    found = read_shard(out, shard.name)
    return found is not None and not found.rejected


def _answers(cfg: DecodeConfig, target: Vocabulary) -> Iterator[AnsweredPrompt]:
    for path in cfg.learn_from:
        for trace in read_traces(path, target.size, target.end_token).traces:
            yield AnsweredPrompt(trace.prompt, tuple(trace.target_tokens))


def _track(cfg: DecodeConfig, result: dict[str, Any]) -> dict[str, Any] | None:
    """Send each drafter's metrics to MLflow, where a server is named; return its runs."""
    if not (cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        return None
    uri = tracking_uri(TrackingFlags(tracking_uri=cfg.tracking_uri, experiment=cfg.experiment))
    runs = {}
    for name, numbers in result["results"].items():
        runs[name] = sync_run(write_event_log(cfg, name, numbers, flat(cfg)), uri)["mlflow_run_id"]
    return runs
