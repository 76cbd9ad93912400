"""`ray-app benchmark`: run every pair of a store through a checkpoint, timed; says which parts were training data.

Pairs are evaluated in runs of at most 1,024 in canonical order, so that memory is bounded whatever the store's size;
`shuffled` and `previous_window` look only within their run.
"""

import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.command import as_json, settings
from ray_app.commands.evaluate.context import EvaluationContext
from ray_app.commands.evaluate.evaluator import WARM_UP, selected
from ray_app.commands.evaluate.reference_files import benchmark_adapter_full
from ray_app.commands.evaluate.report import data_warnings, print_warnings, results_table
from ray_app.config.evaluate import BenchmarkConfig
from ray_app.core.evaluation import AlignmentEvaluation
from ray_app.core.metrics import THETA, THETAS, AlignmentCounts, rate_key
from ray_app.reports.folder import claim_report_folder
from ray_app.store.atomic import write_file
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.provenance import provenance
from ray_app.store.split import Rows, Split
from ray_app.tracking.model_registry import checkpoint_folder

RUN_PAIRS = 1024
"""Pairs evaluated at a time: 0.5 GB at 150,528 wide."""
NUM_SAMPLES = 100
"""Pairs that are listed one by one, as in the reference."""


def run_benchmark(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Evaluate and time the checkpoint on all pairs. Errors as for `evaluate`."""
    claim_report_folder(cfg.out)
    context = EvaluationContext.open(cfg, cfg.store)
    record = provenance(sys.argv, context.store.fingerprint, config=settings(cfg))
    rows = np.arange(len(context.store.index))
    runs = np.array_split(rows, -(-len(rows) // RUN_PAIRS))
    with cluster(cfg.address), checkpoint_folder(cfg.checkpoint, cfg) as folder:
        checkpoint = load_checkpoint(folder)
        checkpoint.require(context.store.manifest.features)
        with closing(context.evaluator(checkpoint, context.mean_target())) as evaluator:
            evaluator.warm_up(cfg.batch_size)
            evaluated = [
                evaluator.evaluate(run, cfg.batch_size, f"pairs, run {number} of {len(runs)}")
                for number, run in enumerate(runs, 1)
            ]
            passes = evaluator.timing()
        described = context.describe(checkpoint)
    everything = joined(evaluated)
    parts = {name: of_part for name, of_part in parts_of(context.split, rows).items() if len(of_part)}
    result: dict[str, Any] = {
        **measure_store(everything),
        **described,
        "checkpoint": cfg.checkpoint,
        "parts": {
            name: {"training_data": name in ("train", "val"), **measure_store(selected(everything, of_part))}
            for name, of_part in parts.items()
        },
        "timing": timing(passes, len(rows), cfg.batch_size),
        "provenance": {**record, "checkpoint": checkpoint.provenance},
    }
    result["warnings"] = [line["text"] for line in data_warnings(result)]
    before = everything.baselines.get("before")
    samples = [
        (str(name), None if before is None else float(before[n]), float(everything.after[n]))
        for n, name in enumerate(context.store.index.sample_id[:NUM_SAMPLES])
    ]
    document = benchmark_adapter_full(result, samples)
    path = cfg.out / f"benchmark_adapter_full_{context.suffix}.json"
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_file(path, as_json(document))
    return {**result, "files": [str(path)]}


def render_benchmark(result: dict[str, Any], console: Console) -> None:
    """Print the results table of all pairs, a line for each part, throughput and the file."""
    console.print(results_table(result, f"all {result['pairs']:,} pairs, training data included"))
    table = Table(title="by part", title_justify="left")
    for column in (
        "part",
        "training data",
        "pairs",
        "mean cos_sim",
        f"θ {THETA:.2f}",
        "best baseline",
        "lift (points)",
    ):
        table.add_column(column, justify="left" if column in ("part", "training data", "best baseline") else "right")
    for name, part in result["parts"].items():
        table.add_row(
            name,
            "yes" if part["training_data"] else "no",
            f"{part['pairs']:,}",
            f"{part['cos_sim_mean']:.4f}",
            f"{part['cosine_accept_rate'][rate_key(THETA)]:.1%}",
            part["best_baseline"],
            f"{100 * part['lift']:+.1f}",
        )
    console.print(table)
    time = result["timing"]
    console.print(
        f"adapter: {time['samples_per_second']:,.0f} pairs/s, {time['avg_adapter_time_per_batch']:.4f} s for each "
        f"batch of {time['batch_size']} on {time['device']} (forward pass only)",
    )
    print_warnings(data_warnings(result), console)
    for path in result["files"]:
        console.print(path, soft_wrap=True)


def parts_of(split: Split, rows: Rows) -> dict[str, Rows]:
    """Rows of each part; `left_out` are those in the gap next to a block."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    return {**parts, "left_out": np.setdiff1d(rows, np.concatenate(list(parts.values())))}


def joined(evaluations: list[AlignmentEvaluation]) -> AlignmentEvaluation:
    """Pairs of all runs, concatenated. Retrieval and centred means hold within a run and are left out."""
    return replace(
        evaluations[0],
        sequences=tuple(name for run in evaluations for name in run.sequences),
        after=np.concatenate([run.after for run in evaluations]),
        baselines={
            name: np.concatenate([run.baselines[name] for run in evaluations]) for name in evaluations[0].baselines
        },
        previous_window=np.concatenate([run.previous_window for run in evaluations]),
        light=tuple(name for run in evaluations for name in run.light),
        centered={},
        retrieval={},
    )


def measure_store(evaluation: AlignmentEvaluation) -> dict[str, Any]:
    """Means of some pairs for the adapter and every baseline, and the lift."""
    previous = evaluation.previous_window[~np.isnan(evaluation.previous_window)]
    baselines = {**evaluation.baselines, **({"previous_window": previous} if previous.size else {})}
    return {
        **AlignmentCounts.of(evaluation.after).means(),
        "baselines": {name: AlignmentCounts.of(cos).means() for name, cos in baselines.items()},
        "best_baseline": evaluation.best_baseline(),
        "lift": evaluation.lift(),
        "lift_by_theta": {rate_key(theta): evaluation.lift(theta) for theta in THETAS},
    }


def timing(passes: dict[str, Any], pairs: int, batch_size: int) -> dict[str, Any]:
    """Timing under the reference's keys, with the device it was measured on."""
    seconds = passes["seconds"]
    return {
        "avg_adapter_time_per_batch": sum(seconds) / len(seconds),
        "total_adapter_time": sum(seconds),
        "samples_per_second": pairs / sum(seconds),
        "median_adapter_time_per_batch": float(np.median(seconds)),
        "batches": len(seconds),
        "batch_size": batch_size,
        "warm_up_batches": WARM_UP,
        "device": passes["device"],
        "threads": passes["threads"],
        "measured": "only the forward pass of the adapter, while Ray Data reads the next pairs",
    }
