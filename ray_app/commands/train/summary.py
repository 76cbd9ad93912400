"""The result of a training run, as the JSON object and as a table."""

import shlex
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.commands.train.context import RunContext
from ray_app.commands.train.plan import ResourcePlan
from ray_app.commands.train.progress import acceptance
from ray_app.runs.event_log import entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.atomic import sha256_file, verify_folder


def run_summary(
    context: RunContext, run: RunDir, plan: ResourcePlan, tracked: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Build the --json object from what the run left on disk. CheckpointError: the best checkpoint is damaged."""
    best = run.best()
    assert best is not None, "a run that ended well has a best checkpoint"
    verify_folder(best)
    best_epoch = int(best.name.removeprefix("epoch_"))
    run.keep_last(best_epoch)
    lines, split = entries(run.path), context.split
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    chosen, last = epochs[best_epoch], epochs[max(epochs)]
    totals = {
        key: sum(line["train"][key] for line in epochs.values()) for key in ("pairs", "seconds", "data_wait_seconds")
    }
    training_s = max(totals["seconds"], 1e-9)
    resumes = [line for line in lines if line["kind"] == "resumed"]
    (*_, last_group) = (line for line in lines if line["kind"] == "workers_started")
    return {
        "run": str(run),
        "checkpoint": run.shown(best),
        "model_sha256": sha256_file(best / "model.safetensors"),
        **tracked,
        "epochs": len(epochs),
        "best_epoch": chosen["epoch"],
        "stopped_early": len(epochs) < context.cfg.num_epochs,
        "steps": last["global_step"],
        "parameters": context.parameters,
        "workers": last_group["workers"],
        "parallelism": context.division.parallelism,
        "worker_counts": worker_counts(lines),
        "in_memory": plan.in_memory,
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
        "pairs_per_second": totals["pairs"] / training_s,
        "step_seconds": totals["seconds"] / last["global_step"],
        "data_wait_fraction": totals["data_wait_seconds"] / training_s,
        "save_seconds": sum(line["save_seconds"] for line in epochs.values()),
    }


def worker_counts(lines: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Count workers, and the steps that so many took in a row."""
    steps = (line.get("workers", 1) for line in lines if line["kind"] == "step")
    return [{"workers": workers, "steps": len(list(taken))} for workers, taken in groupby(steps)]


def render_train(result: dict[str, Any], console: Console) -> None:
    """Print the result and the next command."""
    val = result["val"]
    early = ", stopped early" if result["stopped_early"] else ""
    table = Table(show_header=False, box=None)
    table.add_row("checkpoint", result["checkpoint"])
    best = f"best on validation: {result['best_epoch']}" if val else "the last one counts"
    table.add_row("epochs", f"{result['epochs']}{early}; {best}")
    if val:
        table.add_row(
            "validation",
            f"cos_sim {val['cos_sim_mean']:.4f}, {acceptance(val)} of {val['pairs']} pairs",
        )
    counts = " then ".join(str(count["workers"]) for count in result["worker_counts"])
    table.add_row(
        "speed",
        f"{result['pairs_per_second']:.1f} pairs/s on {counts} workers, {result['seconds']:.0f} s in all",
    )
    table.add_row("split", result["split"]["label"])
    console.print(table)
    where = f"at {result['tracking_uri']}; artifacts: {result['artifacts'] or 'not uploaded yet'}"
    tracked = (
        f"{result['mlflow_run_id']} {where}" if result["mlflow_run_id"] else "none: the tracking server was away"
    )
    console.print(f"MLflow run: {tracked}", soft_wrap=True)
    caution = "These are validation numbers, of one part" if val else "Nothing was validated"
    command = f"ray-app evaluate --store STORE --checkpoint {shlex.quote(result['run'])} --out REPORT"
    console.print(f"{caution}. Evaluate it with\n  {command}", soft_wrap=True)
