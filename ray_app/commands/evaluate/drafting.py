"""Evaluation of a drafter's part: tokens per target pass on pairs that neither it nor its drafter was trained on.

Shapes: B = pairs of a batch, N = pairs, E = width of an event feature, T = width of a row, X = numbers of a picture's
image tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_app.commands.evaluate.context import EvaluationContext, pairs_trained_on, training_config
from ray_app.config.base import SplitFlags
from ray_app.config.evaluate import EvaluationFlags
from ray_app.config.train import DraftTrainConfig
from ray_app.core.adapters.drafting import EagleHead, EventTokens
from ray_app.core.evaluation import derangement
from ray_app.core.losses import AlignmentObjective
from ray_app.core.optimizer_step import decode
from ray_app.core.speculative.draft_evaluation import Counts, DraftEvaluation
from ray_app.errors import CheckpointError, ConfigError
from ray_app.language_models.draft_objective import draft_objective, frozen_drafter
from ray_app.language_models.draft_rows import layout_of
from ray_app.language_models.eagle.objective import eagle_objective
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Rows, split_pairs


def pairs_to_test_on(cfg: SplitFlags, test_store: str | None, store: PairStore) -> tuple[PairStore, Rows]:
    """Return the store to test on with its rows: all of another store than that of the training, or the test part."""
    tested = PairStore.open(test_store, cfg.durations) if test_store else store
    if tested.fingerprint == store.fingerprint:
        return tested, split_pairs(tested.index, cfg.split_config).test
    return tested, np.arange(len(tested.index))


def require_unseen_by_drafter(
    cfg: DraftTrainConfig, store: PairStore, rows: Rows, name: str, parts: Sequence[str] = ("train", "val")
) -> None:
    """ConfigError: the frozen drafter does not fit the store, or was trained on these pairs, the part `name`.

    CheckpointError: it is damaged. `parts`: of the drafter's training.
    """
    if cfg.drafter is None:
        return
    frozen_drafter(cfg.drafter, layout_of(store.manifest.source, store.folder))
    drafter = load_checkpoint(cfg.drafter)
    config, seen = training_config(drafter), pairs_trained_on(drafter, store, rows, parts)
    if seen and config:
        raise ConfigError(
            f"the drafter {cfg.drafter} was trained on {seen} of the {len(rows)} {name} pairs, so they say nothing "
            f"about new drives; name a store of other drives to test on, or divide as its training did: split "
            f"{config.split}, split_seed {config.split_seed}, test_share {config.test_share:g}, val_share "
            f"{config.val_share:g}"
        )


def draft_context(cfg: EvaluationFlags, store: str | None, checkpoint: Checkpoint) -> EvaluationContext:
    """Open the pairs to test a checkpoint on; `store`: default: that of its training.

    ConfigError: it does not record its settings, or it or its drafter was trained on some of these pairs.
    """
    config = draft_settings(checkpoint)
    context = EvaluationContext.open(cfg, store or config.store)
    if context.store.fingerprint != checkpoint.provenance.get("dataset_fingerprint"):
        rows = np.arange(len(context.store.index))
        context = replace(context, split=replace(context.split, test=rows, label="all pairs of another store"))
    rows = context.split.test
    if seen := context.trained_on(checkpoint):
        raise ConfigError(
            f"{checkpoint.folder} was trained on {seen} of the {len(rows)} test pairs of this split, so they cannot "
            f"test it; name a --store of other drives, or give the split it was trained with: --split {config.split} "
            f"--split-seed {config.split_seed} --test-share {config.test_share:g} --val-share {config.val_share:g}"
        )
    require_unseen_by_drafter(config, context.store, rows, "test")
    return context


def draft_settings(checkpoint: Checkpoint) -> DraftTrainConfig:
    """Return the settings of a drafter's part. ConfigError: it does not record them."""
    config = training_config(checkpoint)
    if not isinstance(config, DraftTrainConfig):
        raise ConfigError(f"{checkpoint.folder} does not record its training, or is no part of a drafter.")
    return config


@torch.no_grad()
def evaluate_drafter(context: EvaluationContext, checkpoint: Checkpoint) -> DraftEvaluation:
    """Count the target passes of every test pair, with the checkpoint and with what it must beat.

    Baselines: `no_drafter`, a pass for each token; of image tokens also `mean_tokens`, those of the mean training
    picture, and `other_events`, those of another drive. CheckpointError, ConfigError: it does not fit the store.
    """
    store, rows, cfg = context.store, context.split.test, draft_settings(checkpoint)
    layout, adapter = layout_of(store.manifest.source, store.folder), checkpoint.adapter
    if checkpoint.features.event != store.manifest.features.event:
        raise CheckpointError(f"{checkpoint.folder} was trained on other event features than {store.folder} holds.")
    if adapter.config.vocabulary and adapter.config.vocabulary != layout.vocabulary:
        raise ConfigError(f"{checkpoint.folder} drafts other tokens than the answers of {store.folder} have.")
    device = torch.device("cuda" if context.use_gpu else "cpu")
    objective: AlignmentObjective
    if isinstance(adapter, EagleHead):
        objective = eagle_objective(cfg, adapter, layout, device).eval()
    else:
        objective = draft_objective(cfg, adapter, layout, device).eval()
    event_NE, rows_NT = (
        decode(torch.from_numpy(side), store.feature(name).scale, device)
        for side, name in zip(store.read_rows(rows), ("event", "target"), strict=True)
    )
    sequences = store.index.sequence[rows].tolist()

    def along(shown: Callable[[Tensor], Tensor]) -> tuple[Counts, Counts, Counts]:
        return _along(objective, shown, rows_NT, context.batch_size)

    tokens_N, passes_N, cos_N = along(lambda places_B: adapter(event_NE[places_B]))
    baselines = {"no_drafter": tokens_N}
    if isinstance(adapter, EventTokens):
        others_N = torch.from_numpy(derangement(sequences, seed=0))
        mean_X = adapter.map.target_mean
        baselines["mean_tokens"] = along(lambda places_B: mean_X.expand(len(places_B), -1))[1]
        baselines["other_events"] = along(lambda places_B: adapter(event_NE[others_N[places_B]]))[1]
    return DraftEvaluation(tuple(sequences), tokens_N, passes_N, cos_N, baselines)


def draft_result(
    context: EvaluationContext, checkpoint: Checkpoint, evaluation: DraftEvaluation | None = None
) -> dict[str, Any]:
    """Return an evaluation, made here unless it is given, with its verdict and the identity of the pairs, as JSON."""
    metrics = (evaluation or evaluate_drafter(context, checkpoint)).metrics()
    low, high = metrics["interval95"]["gain"]
    beats = "beats" if low > 0 else "does not beat" if high < 0 else "may equal"
    verdict = (
        f"{metrics['tokens_per_target_pass']:.2f} tokens per target pass: {beats} the best baseline "
        f"({metrics['best_baseline']}), {metrics['gain']:+.2f} (95 %: {low:+.2f} to {high:+.2f})."
    )
    return {**metrics, **context.describe(checkpoint), "verdict": verdict}


def _along(
    objective: AlignmentObjective, shown: Callable[[Tensor], Tensor], rows_NT: Tensor, batch_size: int
) -> tuple[Counts, Counts, Counts]:
    """Return tokens, target passes and cosine of each pair while `shown` gives the image tokens of some places."""
    found: list[dict[str, Any]] = [
        objective.losses(shown(places_B), rows_NT[places_B])
        for places_B in torch.arange(len(rows_NT)).split(batch_size)
    ]
    tokens_N, passes_N, cos_N = (
        torch.cat([losses[key].cpu() for losses in found]).double().numpy() for key in ("tokens", "passes", "cos_sim")
    )
    return tokens_N, passes_N, cos_N
