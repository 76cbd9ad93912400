"""Files of a run: all rows, traces that `replay` reads, the reference's result file, and event logs for MLflow.

decode.json  rows.jsonl  rejected.jsonl  results.json  benchmark_results_<S>.json
traces/DRAFTER.jsonl  tracking/DRAFTER/events.jsonl  shards/…
"""

import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_app.commands.decode.drafters import drafter_folder
from ray_app.commands.decode.inputs import DecodeInput
from ray_app.commands.decode.summary import Line
from ray_app.config.base import flat
from ray_app.config.decode import DecodeConfig
from ray_app.events.windows import duration_suffix
from ray_app.language_models.loading import model_files
from ray_app.runs.event_log import EVENT_LOG, EventLog
from ray_app.store.atomic import make_folder, sha256_bytes, sha256_file, write_file
from ray_app.store.capture_store import REJECTED_ROWS, as_lines

ROWS, RESULTS, TRACES, TRACKING = "rows.jsonl", "results.json", "traces", "tracking"
NOT_RECORDED = ("address", "html", "watch", "out", "use_gpu", "tracking_uri", "experiment")
"""Settings that change no row."""


def settings_of(cfg: DecodeConfig, data: DecodeInput) -> dict[str, Any]:
    """Return all that decides what is decoded, as JSON values."""
    values = {name: value for name, value in flat(cfg).items() if name not in (*NOT_RECORDED, "source")}
    folders = [cfg.target, *(folder for name in cfg.drafter if (folder := drafter_folder(name)).is_dir())]
    folders += [folder for folder in (cfg.adapter, cfg.event_encoder) if folder]
    return {
        **values,
        "source": data.describe(),
        "learn_from": [sha256_file(path) for path in cfg.learn_from],
        "models": {str(folder): model_files(folder) for folder in folders},
    }


def file_name(drafter: str) -> str:
    """Return a drafter's name as that of a file."""
    return re.sub(r"[^\w.-]", "_", drafter)


def publish(cfg: DecodeConfig, lines: Sequence[Line], rejected: Sequence[Line], result: Mapping[str, Any]) -> None:
    """Write every file but the shards."""
    make_folder(cfg.out / TRACES)
    write_file(cfg.out / ROWS, as_lines(lines))
    write_file(cfg.out / REJECTED_ROWS, as_lines(rejected))
    write_file(cfg.out / RESULTS, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    for name in result["results"]:
        write_file(
            cfg.out / TRACES / f"{file_name(name)}.jsonl", as_lines([trace(cfg, line, name) for line in lines])
        )
    theirs = [reference_row(cfg, line) for line in lines]
    write_file(
        cfg.out / f"benchmark_results_{duration_suffix(cfg.duration)}.json", json.dumps(theirs, indent=2).encode()
    )


def trace(cfg: DecodeConfig, line: Line, name: str) -> dict[str, Any]:
    """Return a row as a line of traces.

    Times are those that `replay` adds up: a step is the time after the prompt's pass over the answer's tokens, a pass
    bears its share of the loop, and each drafter has its own time.
    """
    way, plain, tokens = line["drafters"][name], line["plain"], line["target_tokens"]
    timing: dict[str, Any] = {
        "target_prefill": plain["encode_ms"] + plain["prefill_ms"],
        "target_per_token": (plain["total_ms"] - plain["encode_ms"] - plain["prefill_ms"]) / len(tokens),
        **way["own_ms"],
    }
    share_ms = way["bookkeeping_ms"] / len(way["passes"])
    by_gamma: dict[int, list[float]] = {}
    for gamma, drafted, _, _, _, verify_ms in way["passes"]:
        # At a fixed length only the last pass before the limit asks for fewer or none: `replay` has no limit.
        if cfg.draft_length == "fixed" and (drafted or not gamma):
            length = cfg.num_speculative_tokens
        else:
            length = gamma if drafted else 0
        by_gamma.setdefault(length, []).append(verify_ms + share_ms)
    timing["drafting"] = {name: each["draft_ms"] + each["learn_ms"] for name, each in line["drafters"].items()}
    timing["verify"] = {str(gamma): statistics.fmean(times) for gamma, times in by_gamma.items()}
    values = {
        "row": line["row"],
        "sequence": line["sequence"],
        "duration": cfg.duration,
        "question": line["question"],
        "draft_tokens": line["given_draft_tokens"],
        "target_tokens": way.get("tokens", tokens),
        "target_text": line["target_text"],
        "do_sample": line["temperature"] > 0.0,
        "temperature": line["temperature"],
        "timing_ms": timing,
    }
    windows = {key: line[key] for key in ("t_start_us", "t_end_us") if line[key] is not None}
    return values | windows


def reference_row(cfg: DecodeConfig, line: Line) -> dict[str, Any]:
    """Return a row of the reference's result file, key for key, in seconds and MB, followed by keys of our own.

    Its stages: preparing the pictures, encoding them, and the language model. Its side `egpt` is the first drafter,
    by itself; its side `llava` the target without a drafter.
    """
    name, way = next(iter(line["drafters"].items()))
    plain, own = line["plain"], way["own_ms"]
    weights = line["weight_bytes"]
    tokens = max(len(way["own_tokens"]) - 1, 0)
    draft_s = (own.get("draft_prefill", 0.0) + tokens * own.get("draft_per_token", 0.0)) / 1e3
    peak = weights.get("gpu_peak")
    return {
        "id": line["id"],
        "split": cfg.source[0].name,
        "query": line["question"],
        "event_data": line["id"],
        "egpt": way["own_text"],
        "egpt_time": draft_s,
        "egpt_stage1_time": 0.0,
        "egpt_stage2_time": 0.0,
        "egpt_stage3_time": draft_s,
        "egpt_token_ids": way["own_tokens"],
        "video_data": line["id"],
        "llava-1.5-7b-hf": line["target_text"],
        "llava_time": (plain["prepare_ms"] + plain["total_ms"]) / 1e3,
        "llava_stage1_time": plain["prepare_ms"] / 1e3,
        "llava_stage2_time": plain["encode_ms"] / 1e3,
        "llava_stage3_time": (plain["total_ms"] - plain["encode_ms"]) / 1e3,
        "llava_token_ids": line["target_tokens"],
        "egpt_memory_model_mb": weights[name] / 2**20,
        "egpt_memory_inference_mb": (peak or weights[name]) / 2**20,
        "llava_memory_model_mb": weights["target"] / 2**20,
        "llava_memory_inference_mb": (peak or weights["target"] + plain["cache_bytes"]) / 2**20,
        "drafter": name,
        "target": cfg.target.name,
        "speculative_time": (plain["prepare_ms"] + way["total_ms"]) / 1e3,
        "num_drafts": way["num_passes"],
        "num_draft_tokens": sum(each[1] for each in way["passes"]),
        "num_accepted_tokens": sum(each[2] for each in way["passes"]),
    }


def write_event_log(cfg: DecodeConfig, name: str, result: Mapping[str, Any], params: Mapping[str, Any]) -> Path:
    """Write the event log of one drafter's run, from which MLflow gets its metrics; return its folder."""
    folder = cfg.out / TRACKING / file_name(name)
    make_folder(folder)
    (folder / EVENT_LOG).unlink(missing_ok=True)
    started = time.time()
    numbers = {key: value for key, value in result.items() if key not in ("differences", "rows", "passes_by_gamma")}
    low_high = {
        f"{key}_{bound}": pair[n]
        for key, pair in numbers.pop("interval95").items()
        if pair
        for n, bound in enumerate(("low", "high"))
    }
    per_pos = {f"accepted_at_{n}": count for n, count in enumerate(numbers.pop("num_accepted_tokens_per_pos"), 1)}
    with EventLog(folder) as log:
        log.write(
            "run_started",
            name=f"{cfg.out.name}-{name}",
            key=sha256_bytes(f"{cfg.out.absolute()} {name}".encode())[:32],
            parent_key=None,
            experiment=cfg.experiment,
            params={**params, "drafter": name},
            tags={"command": "decode"},
            workers=params["num_workers"],
            time=started,
        )
        log.validation(result["rows"], **numbers, **low_high, **per_pos)
        log.write("run_ended", status="FINISHED", artifacts=None, time=time.time())
    return folder
