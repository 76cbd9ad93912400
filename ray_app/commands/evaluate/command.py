"""`ray-app evaluate`: what a checkpoint does on the test part, beside every baseline; JSON and report.html.

Rates are fractions in [0, 1], but percent under the reference's own keys of alignment_metrics_<S>.json.
"""

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.evaluator import EvaluatorHandle, require_device
from ray_app.commands.evaluate.reference_files import alignment_metrics
from ray_app.commands.evaluate.report import PairPicture, notes, render_html, results_table, verdict_sentence
from ray_app.config.base import SplitConfig, flat
from ray_app.config.evaluate import EvaluateConfig, JudgeFlags
from ray_app.config.train import TrainConfig
from ray_app.core.evaluation import AlignmentEvaluation
from ray_app.core.metrics import AlignmentCounts
from ray_app.data.training_means import mean_target
from ray_app.errors import InputError, StoreError
from ray_app.events.windows import duration_suffix
from ray_app.runs.run_dir import RUN
from ray_app.store.atomic import write_file
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.filesystem import open_storage
from ray_app.store.manifest import MANIFEST, FeatureSpec
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance
from ray_app.store.split import Rows, Split, split_pairs, test_fingerprint
from ray_app.tracking.mlflow_logger import redact_password
from ray_app.tracking.model_registry import checkpoint_folder

NUM_PICTURES = 3
REPORT_FILES = ("alignment_metrics_*.json", "benchmark_adapter_full_*.json", "report.html", ".*")


def run_evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Judges the checkpoint on the test part alone; the training part gives its mean target.

    StoreError: a damaged store, or an --out that holds other things. InputError: no page at --token-report.
    CheckpointError: a checkpoint that does not verify or fit. RegistryError: no such model.
    """
    claim_report_folder(cfg.out)
    token_report = token_report_link(cfg)
    store = PairStore.open(cfg.store, cfg.durations)
    split = split_pairs(store.index, cfg.split_config)
    begun = provenance(sys.argv, store.fingerprint, config=settings(cfg))
    with cluster(cfg.address), checkpoint_folder(cfg.checkpoint, cfg) as folder:
        require_device(cfg.use_gpu)
        checkpoint = load_checkpoint(folder)
        checkpoint.require(store.manifest.features)
        means = mean_target(store, split.train)
        with closing(EvaluatorHandle(checkpoint, store, means, use_gpu=cfg.use_gpu)) as judge:
            evaluation = judge.evaluate(split.test, cfg.batch_size, "test pairs")
            best, worst = best_and_worst(judge, store, split.test, evaluation)
    result = {
        **judgement(evaluation, about(checkpoint, store, split, cfg.split_config)),
        "checkpoint": cfg.checkpoint,
        "provenance": {**begun, "checkpoint": checkpoint.provenance},
    }
    before = AlignmentCounts.of(evaluation.baselines["before"]).means()
    metrics = alignment_metrics(result, before, checkpoint.adapter)
    files = {
        cfg.out / f"alignment_metrics_{suffix(store)}.json": as_json(metrics),
        cfg.out / "report.html": render_html(result, curves(evaluation), best, worst, token_report).encode(),
    }
    cfg.out.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        write_file(path, data)
    return {**result, "files": [str(path) for path in files]}


def render_evaluate(result: dict[str, Any], console: Console) -> None:
    """The results table, the plain sentence, what to know beside it, and the files."""
    console.print(results_table(result, f"{result['pairs']:,} test pairs; split: {result['split']['label']}"))
    console.print(result["verdict"], style="bold", highlight=False, markup=False)
    for note in notes(result):
        console.print(f"- {note['text']}", style="yellow" if note["warning"] else "dim", markup=False)
    for path in result["files"]:
        console.print(path, soft_wrap=True, markup=False)


def token_report_link(cfg: EvaluateConfig) -> str | None:
    """Relative link from the report to the --token-report page. InputError: there is no such file."""
    if cfg.token_report is None:
        return None
    if not cfg.token_report.is_file():
        raise InputError(
            f"--token-report {cfg.token_report} is not a file; name the HTML page that `ray-app correlate` wrote."
        )
    return quote(os.path.relpath(cfg.token_report.absolute(), cfg.out.absolute()))


def claim_report_folder(folder: Path, files: tuple[str, ...] = REPORT_FILES) -> None:
    """StoreError unless `folder` is new or holds nothing but `files`: what evaluate and benchmark write."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; --out names the folder for the report.")
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not any(path.match(pattern) for pattern in files):
                raise StoreError(
                    f"{folder} already holds something else ({path.name}); nothing is deleted or mixed in. "
                    f"Name another folder, for instance --out {folder.with_name(folder.name + '-report')}."
                )


def judgement(evaluation: AlignmentEvaluation, described: dict[str, Any]) -> dict[str, Any]:
    """The metrics of some pairs with all that a reader needs beside them, as JSON values."""
    metrics = evaluation.metrics()
    if "previous_window" in metrics["baselines"]:
        same = ~np.isnan(evaluation.previous_window)
        metrics["baselines"]["previous_window"]["adapter_cosine_accept_rate"] = {
            theta: float((evaluation.after[same] > float(theta)).mean()) for theta in metrics["cosine_accept_rate"]
        }
    result = {**metrics, **described}
    result["verdict"] = verdict_sentence(result)
    result["warnings"] = [note["text"] for note in notes(result)]
    return result


def about(checkpoint: Checkpoint, store: PairStore, split: Split, split_config: SplitConfig) -> dict[str, Any]:
    """Which pairs are judged and what they are to the checkpoint, as JSON values."""
    return {
        "dataset": "+".join(durations(store)),
        "fingerprint": store.fingerprint,
        "test_fingerprint": test_fingerprint(store.index, split.test),
        "checkpoint_sha256": checkpoint.sha256,
        "split": {
            "by": split.by,
            "label": split.label,
            "seed": split_config.seed,
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "test_windows_overlapping_train": split.test_windows_overlapping_train,
            "test_pairs_trained_on": trained_on(checkpoint, store, split.test),
        },
        "data": {
            "source": store.manifest.source.get("name", "unknown"),
            "events": store.manifest.source.get("events", "unknown"),
        },
    }


def as_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def trained_on(checkpoint: Checkpoint, store: PairStore, rows: Rows) -> int | None:
    """How many of `rows` the checkpoint was fitted or chosen on; None where its record does not tell."""
    config = training_config(checkpoint)
    if config is None:
        return None
    fingerprint = checkpoint.provenance.get("dataset_fingerprint")
    folder = store.folder if store.fingerprint == fingerprint else open_storage(config.store)
    if not folder.exists() or MANIFEST not in folder.listdir():
        return None
    theirs = PairStore.open(folder, config.durations)
    if theirs.fingerprint != fingerprint:
        return None
    split = split_pairs(theirs.index, config.split_config)
    seen = theirs.index.sample_id[np.concatenate([split.train, split.val])]
    return int(np.isin(store.index.sample_id[rows], seen).sum())


def training_config(checkpoint: Checkpoint) -> TrainConfig | None:
    """The settings that the checkpoint was trained with, from its provenance or its run's folder."""
    config = checkpoint.provenance.get("config")
    run = checkpoint.folder.parent.parent / RUN
    if config is None and run.is_file():
        config = json.loads(run.read_text())["config"]
    return TrainConfig.model_validate(config) if config else None


def settings(cfg: JudgeFlags) -> dict[str, Any]:
    """A command's settings as JSON values, without the tracking server's password."""
    return {**flat(cfg), "tracking_uri": cfg.tracking_uri and redact_password(cfg.tracking_uri)}


def durations(store: PairStore) -> list[str]:
    """Window lengths in use, such as `1s`."""
    return sorted(set(store.index.duration.tolist()))


def suffix(store: PairStore) -> str:
    """The mark of the window lengths in file names, such as `S1`."""
    return "_".join(duration_suffix(name) for name in durations(store))


def curves(evaluation: AlignmentEvaluation) -> dict[str, NDArray[np.float64]]:
    """Cosines of the pairs by name, as reports and figures use them."""
    return {
        "adapter": evaluation.after,
        **evaluation.baselines,
        "previous_window": evaluation.previous_window,
    }


def best_and_worst(
    judge: EvaluatorHandle, store: PairStore, rows: Rows, evaluation: AlignmentEvaluation
) -> tuple[list[PairPicture], list[PairPicture]]:
    """Pictures of the pairs with the highest and the lowest cosine; none where features are no images."""
    specs = [store.feature("event"), store.feature("target")]
    if not all(len(spec.shape) == 3 and spec.shape[0] == 3 for spec in specs):
        return [], []
    order = np.argsort(evaluation.after, kind="stable")
    worst, best = (varied(each, store.index.sequence[rows]) for each in (order, order[::-1]))
    places = np.concatenate([best, worst])
    event_ND, target_ND = store.read_rows(rows[places])
    aligned_ND = judge.align(event_ND)
    made = [
        PairPicture(
            sequence=str(store.index.sequence[rows[place]]),
            t_start_us=int(store.index.t_start_us[rows[place]]),
            t_end_us=int(store.index.t_end_us[rows[place]]),
            before=float(evaluation.baselines["before"][place]),
            after=float(evaluation.after[place]),
            event=as_image(event * specs[0].scale, specs[0]),
            aligned=as_image(aligned, specs[1]),
            target=as_image(target * specs[1].scale, specs[1]),
        )
        for place, event, target, aligned in zip(places, event_ND, target_ND, aligned_ND, strict=True)
    ]
    return made[: len(best)], made[len(best) :]


def varied(order: NDArray[np.int64], sequences: NDArray[np.str_]) -> NDArray[np.int64]:
    """The first few places of `order`, of different sequences where there are enough: one drive looks alike."""
    first = np.sort(np.unique(sequences[order], return_index=True)[1])
    others = np.setdiff1d(np.arange(len(order)), first)
    count = min(NUM_PICTURES, len(order) // 2)
    return order[np.concatenate([first, others])[:count]]


def as_image(feature_D: NDArray[Any], spec: FeatureSpec) -> NDArray[np.uint8]:
    """A feature of values in [0, 1] as an image (H, W, 3); what lies outside is limited to it."""
    pixels_CHW = (np.clip(feature_D, 0.0, 1.0) * 255).round().astype(np.uint8).reshape(spec.shape)
    return np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))
