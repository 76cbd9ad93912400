"""Facts that every evaluation shares, resolved once: the store, its split, the device, and what the checkpoint saw.

Shapes: D = target width.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from ray_app.commands.evaluate.evaluator import EvaluatorHandle
from ray_app.commands.evaluate.report import report_warnings, verdict_sentence
from ray_app.config.base import SplitConfig
from ray_app.config.evaluate import EvaluationFlags
from ray_app.config.train import TrainConfig, settings_of
from ray_app.core.advice import what_to_try
from ray_app.core.evaluation import AlignmentEvaluation
from ray_app.data.training_means import mean_target
from ray_app.errors import CheckpointError, ResourceError
from ray_app.events.windows import duration_suffix
from ray_app.runs.run_dir import RUN, run_metadata
from ray_app.store.checkpoint import Checkpoint
from ray_app.store.filesystem import open_storage
from ray_app.store.manifest import MANIFEST
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Rows, Split, split_pairs, test_fingerprint


@dataclass(frozen=True, slots=True)
class EvaluationContext:
    """Pairs, split and device of one command."""

    store: PairStore
    """The opened pair store."""
    split_config: SplitConfig
    """Settings of the split."""
    split: Split
    """Rows of each part."""
    batch_size: int
    """Pairs per forward pass."""
    use_gpu: bool
    """Evaluate on a GPU."""

    @staticmethod
    def open(cfg: EvaluationFlags, store: str) -> "EvaluationContext":
        """Open and divide a store. StoreError: there is none, or it is damaged."""
        pairs = PairStore.open(store, cfg.durations)
        split = split_pairs(pairs.index, cfg.split_config)
        return EvaluationContext(pairs, cfg.split_config, split, cfg.batch_size, cfg.use_gpu)

    @property
    def durations(self) -> list[str]:
        """Window lengths in use, such as `1s`."""
        return sorted(set(self.store.index.duration.tolist()))

    @property
    def suffix(self) -> str:
        """Mark of the window lengths in file names, such as `S1`."""
        return "_".join(duration_suffix(name) for name in self.durations)

    def mean_target(self) -> torch.Tensor:
        """Mean training target, shape (D,), read on the connected cluster.

        StoreError: there is no training pair. ResourceError: a GPU is asked for, and the cluster has none.
        """
        if self.use_gpu and not ray.cluster_resources().get("GPU"):  # the evaluator would wait for ever
            raise ResourceError("--use-gpu needs a GPU and this cluster has none; leave the flag out.")
        return mean_target(self.store, self.split.train)

    def evaluator(self, checkpoint: Checkpoint, mean_target_D: torch.Tensor) -> EvaluatorHandle:
        """Start an evaluator of a checkpoint; `close` it. CheckpointError: it does not fit the store."""
        return EvaluatorHandle(checkpoint, self.store, mean_target_D, use_gpu=self.use_gpu)

    def test_result(self, checkpoint: Checkpoint, mean_target_D: torch.Tensor) -> dict[str, Any]:
        """Metrics of a checkpoint on the test part, with verdict and warnings, as JSON values."""
        with closing(self.evaluator(checkpoint, mean_target_D)) as evaluator:
            evaluation = evaluator.evaluate(self.split.test, self.batch_size, "test pairs")
        return self.result(evaluation, checkpoint)

    def result(self, evaluation: AlignmentEvaluation, checkpoint: Checkpoint) -> dict[str, Any]:
        """An evaluation of the test part with everything a reader needs to judge it, as JSON values."""
        metrics = evaluation.metrics()
        if "previous_window" in metrics["baselines"]:
            same = ~np.isnan(evaluation.previous_window)
            metrics["baselines"]["previous_window"]["adapter_cosine_accept_rate"] = {
                theta: float((evaluation.after[same] > float(theta)).mean())
                for theta in metrics["cosine_accept_rate"]
            }
        result = {**metrics, **self.describe(checkpoint)}
        result["verdict"] = verdict_sentence(result)
        result["warnings"] = [line["text"] for line in report_warnings(result)]
        result["try_next"] = what_to_try(result)
        return result

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Identity of the pairs, the split and the checkpoint, as JSON values."""
        source = self.store.manifest.source
        return {
            "dataset": "+".join(self.durations),
            "fingerprint": self.store.fingerprint,
            "test_fingerprint": test_fingerprint(self.store.index, self.split.test),
            "checkpoint_sha256": checkpoint.sha256,
            "strategy": checkpoint.config.strategy,
            "split": {
                "by": self.split.by,
                "label": self.split.label,
                "seed": self.split_config.seed,
                "train": len(self.split.train),
                "val": len(self.split.val),
                "test": len(self.split.test),
                "test_windows_overlapping_train": self.split.test_windows_overlapping_train,
                "test_pairs_trained_on": self.trained_on(checkpoint),
            },
            "data": {
                "source": source.get("name", "unknown"),
                "events": source.get("events", "unknown"),
                "features": {side: self.store.feature(side).kind for side in ("event", "target")},
                "encoders": self.store.manifest.features.encoders(),
            },
        }

    def trained_on(self, checkpoint: Checkpoint) -> int | None:
        """Number of test pairs that the checkpoint was fitted or chosen on; None: its record does not say."""
        return pairs_trained_on(checkpoint, self.store, self.split.test)


def pairs_trained_on(
    checkpoint: Checkpoint, store: PairStore, rows: Rows, parts: Sequence[str] = ("train", "val")
) -> int | None:
    """Number of these pairs that are in these parts of a checkpoint's training; None: its record does not say."""
    config = training_config(checkpoint)
    if config is None:
        return None
    fingerprint = checkpoint.provenance.get("dataset_fingerprint")
    folder = store.folder if store.fingerprint == fingerprint else open_storage(config.store)
    if not folder.exists() or MANIFEST not in folder.listdir():
        return None
    trained = PairStore.open(folder, config.durations)
    if trained.fingerprint != fingerprint:
        return None
    split = split_pairs(trained.index, config.split_config)
    if config.train_on_val:
        split = split.without_validation()
    seen = trained.index.sample_id[np.concatenate([getattr(split, part) for part in parts])]
    return int(np.isin(store.index.sample_id[rows], seen).sum())


def training_config(checkpoint: Checkpoint) -> TrainConfig | None:
    """Settings that the checkpoint was trained with, from its provenance or its run's folder."""
    config = checkpoint.provenance.get("config")
    run = checkpoint.folder.parent.parent / RUN
    if config is None and run.is_file():
        config = run_metadata(open_storage(run.parent)).get("config")
    try:
        return settings_of(config.get("strategy")).model_validate(config) if config else None
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: the settings of its training cannot be read: {error}") from error
