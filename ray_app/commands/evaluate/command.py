"""`ray-app evaluate`: what a checkpoint does on the test part, next to every baseline; JSON and report.html.

Rates are fractions in [0, 1], but percent under the reference's own keys of alignment_metrics_<S>.json.
"""

import json
import os
import sys
from contextlib import closing
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.context import EvaluationContext
from ray_app.commands.evaluate.evaluator import EvaluatorHandle
from ray_app.commands.evaluate.reference_files import alignment_metrics
from ray_app.commands.evaluate.report import PairPicture, print_warnings, report_page, report_warnings, results_table
from ray_app.config.base import flat
from ray_app.config.evaluate import EvaluateConfig, EvaluationFlags
from ray_app.core.evaluation import AlignmentEvaluation
from ray_app.core.metrics import AlignmentCounts
from ray_app.errors import InputError
from ray_app.parsing.redact import redact
from ray_app.reports.folder import claim_report_folder
from ray_app.store.atomic import write_file
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.manifest import FeatureSpec
from ray_app.store.provenance import provenance
from ray_app.tracking.evaluation_log import log_evaluation
from ray_app.tracking.model_registry import checkpoint_folder

NUM_PICTURES = 3


def run_evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Evaluate the checkpoint on the test part; the training part gives only its mean target.

    StoreError: a damaged store, or an --out that holds other files. InputError: no page at --token-report.
    CheckpointError: a checkpoint that does not verify or fit. RegistryError: no such model.
    """
    claim_report_folder(cfg.out)
    token_report = token_report_link(cfg)
    context = EvaluationContext.open(cfg, cfg.store)
    record = provenance(sys.argv, context.store.fingerprint, config=settings(cfg))
    with cluster(cfg.address), checkpoint_folder(cfg.checkpoint, cfg) as folder:
        checkpoint = load_checkpoint(folder)
        checkpoint.require(context.store.manifest.features)
        with closing(context.evaluator(checkpoint, context.mean_target())) as evaluator:
            evaluation = evaluator.evaluate(context.split.test, cfg.batch_size, "test pairs")
            best, worst = best_and_worst(evaluator, context, evaluation)
    result = {
        **context.result(evaluation, checkpoint),
        "checkpoint": cfg.checkpoint,
        "provenance": {**record, "checkpoint": checkpoint.provenance},
    }
    raw = evaluation.baselines.get("before")
    before = None if raw is None else AlignmentCounts.of(raw).means()
    metrics = alignment_metrics(result, before, checkpoint.adapter)
    files = {
        cfg.out / f"alignment_metrics_{context.suffix}.json": as_json(metrics),
        cfg.out / "report.html": report_page(result, curves(evaluation), best, worst, token_report).encode(),
    }
    cfg.out.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        write_file(path, data)
    run_id = log_evaluation(cfg, checkpoint.provenance.get("run_key"), result, list(files))
    return {**result, "files": [str(path) for path in files], "mlflow_run_id": run_id}


def render_evaluate(result: dict[str, Any], console: Console) -> None:
    """Print the results table, the verdict, the warnings and the files."""
    console.print(results_table(result, f"{result['pairs']:,} test pairs; split: {result['split']['label']}"))
    console.print(result["verdict"], style="bold")
    print_warnings(report_warnings(result), console)
    if result["try_next"]:
        console.print(result["try_next"], style="bold")
    for path in result["files"]:
        console.print(path, soft_wrap=True)


def token_report_link(cfg: EvaluateConfig) -> str | None:
    """Relative link from the report to the --token-report page. InputError: there is no such file."""
    if cfg.token_report is None:
        return None
    if not cfg.token_report.is_file():
        raise InputError(
            f"--token-report {cfg.token_report} is not a file; name the HTML page that `ray-app correlate` wrote."
        )
    return quote(os.path.relpath(cfg.token_report.absolute(), cfg.out.absolute()))


def as_json(document: dict[str, Any]) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def settings(cfg: EvaluationFlags) -> dict[str, Any]:
    """A command's settings as JSON values, without the tracking server's password."""
    return {**flat(cfg), "tracking_uri": cfg.tracking_uri and redact(cfg.tracking_uri)}


def curves(evaluation: AlignmentEvaluation) -> dict[str, NDArray[np.float64]]:
    """Cosines of the pairs by name, as the report's figures take them."""
    return {
        "adapter": evaluation.after,
        **evaluation.baselines,
        "previous_window": evaluation.previous_window,
    }


def best_and_worst(
    evaluator: EvaluatorHandle, context: EvaluationContext, evaluation: AlignmentEvaluation
) -> tuple[list[PairPicture], list[PairPicture]]:
    """Pictures of the test pairs with the highest and the lowest cosine; none if features are not images."""
    index, rows = context.store.index, context.split.test
    specs = [context.store.feature("event"), context.store.feature("target")]
    if not all(spec.kind == "images" and spec.shape[0] == 3 for spec in specs):
        return [], []
    order = np.argsort(evaluation.after, kind="stable")
    worst, best = (varied(places, index.sequence[rows]) for places in (order, order[::-1]))
    places = np.concatenate([best, worst])
    event_ND, target_ND = context.store.read_rows(rows[places])
    aligned_ND = evaluator.align(event_ND)
    before = evaluation.baselines.get("before")
    pictures = [
        PairPicture(
            sequence=str(index.sequence[rows[place]]),
            t_start_us=int(index.t_start_us[rows[place]]),
            t_end_us=int(index.t_end_us[rows[place]]),
            before=float(before[place]) if before is not None else None,
            after=float(evaluation.after[place]),
            event=as_image(event * specs[0].scale, specs[0]),
            aligned=as_image(aligned, specs[1]),
            target=as_image(target * specs[1].scale, specs[1]),
        )
        for place, event, target, aligned in zip(places, event_ND, target_ND, aligned_ND, strict=True)
    ]
    return pictures[: len(best)], pictures[len(best) :]


def varied(order: NDArray[np.int64], sequences: NDArray[np.str_]) -> NDArray[np.int64]:
    """The first few of `order`, from different sequences where there are enough: one drive's windows look alike."""
    first = np.sort(np.unique(sequences[order], return_index=True)[1])
    others = np.setdiff1d(np.arange(len(order)), first)
    count = min(NUM_PICTURES, len(order) // 2)
    return order[np.concatenate([first, others])[:count]]


def as_image(feature_D: NDArray[Any], spec: FeatureSpec) -> NDArray[np.uint8]:
    """A feature of values in [0, 1] as an image (H, W, 3); values outside are clipped."""
    pixels_CHW = (np.clip(feature_D, 0.0, 1.0) * 255).round().astype(np.uint8).reshape(spec.shape)
    return np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))
