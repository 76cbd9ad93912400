"""Promotion of a run: register a checkpoint as a version, and make it champion if it earns that.

The verdict is `promotion_verdict`. The registry is written after the evaluation, in this order:

    1. the version with its tags: metrics, verdict, reason, previous_champion
    2. the alias, right after a look that the champion is still the one compared with
    3. the tag promoted_at

Interrupted after 1, a version is left without the alias; after 2, a champion without promoted_at. `--list` reports
both, and promoting the same checkpoint again completes them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from mlflow.entities.model_registry import ModelVersion
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.context import EvaluationContext, training_config
from ray_app.commands.evaluate.report import results_table
from ray_app.commands.promote.champions import EARNED, registry_warnings
from ray_app.commands.promote.rollback import RATE_TAG, timestamp
from ray_app.config.evaluate import PromoteConfig
from ray_app.config.train import DRAFTING
from ray_app.config.tune import TOKENS
from ray_app.core.metrics import THETA, rate_key
from ray_app.core.promotion_policy import InvalidCheckpoint, Verdict, promotion_verdict
from ray_app.errors import CheckpointError, ConfigError
from ray_app.store.atomic import sha256_file, verify_folder
from ray_app.store.checkpoint import MODEL, Checkpoint, load_checkpoint, replay_golden
from ray_app.store.manifest import require_target_features
from ray_app.tracking.model_registry import CHAMPION, ModelRegistry


def promote(cfg: PromoteConfig, registry: ModelRegistry, checkpoint: Checkpoint) -> dict[str, Any]:
    """Evaluate, register, and move the alias if it is earned.

    A checkpoint whose weights are registered already keeps its version. If another promotion changed the champion
    meanwhile, the checkpoint is compared again with the new one.

    CheckpointError: it does not fit. ConfigError: it was trained on pairs of this test part.
    RegistryError: the server refuses or is away.
    """
    store = evaluation_store(cfg, checkpoint)
    context = EvaluationContext.open(cfg, store)
    checkpoint.require(context.store.manifest.features)
    require_unseen_pairs(cfg, context, checkpoint)
    champion = registry.champion()
    with cluster(cfg.address):
        mean_target_D = context.mean_target()
        metrics = context.test_result(checkpoint, mean_target_D)
        challenger = Challenger.of(registry, checkpoint, metrics, alignment_tags(metrics))
        while True:
            opponent = champion_metrics(registry, champion, context, mean_target_D, metrics["test_fingerprint"])
            compare = partial(promotion_verdict, metrics, opponent, min_gain=cfg.min_gain, force=cfg.force)
            result = register(registry, challenger, champion, opponent, compare)
            if result is not None:
                return result
            champion = registry.champion()


@dataclass(frozen=True, slots=True)
class Challenger:
    """A checkpoint that asks for promotion."""

    checkpoint: Checkpoint
    """Verified."""
    model_sha256: str
    """SHA-256 of the weights: equal weights are one version."""
    run_id: str
    """MLflow run whose artifacts are the checkpoint."""
    metrics: dict[str, Any]
    """Its result on the test part."""
    tags: dict[str, str]
    """The same as tags of a version."""

    @classmethod
    def of(
        cls, registry: ModelRegistry, checkpoint: Checkpoint, metrics: dict[str, Any], tags: dict[str, str]
    ) -> Self:
        """Upload the checkpoint, unless the registry has it."""
        weights = sha256_file(checkpoint.folder / MODEL)
        version = registry.version_of(weights)
        run_id = str(version.run_id) if version else registry.ensure_uploaded(checkpoint)
        return cls(checkpoint, weights, run_id, metrics, tags)


def verified(folder: Path, *, force: bool) -> Checkpoint:
    """Load a checkpoint. CheckpointError: it is damaged, or makes nothing that is promoted; also by `force`."""
    checkpoint = verify_checkpoint(folder)
    if isinstance(checkpoint, InvalidCheckpoint):
        verdict = promotion_verdict(checkpoint, None, force=force)
        raise CheckpointError(f"not promoted ({verdict.code}): {verdict.reason}")
    return checkpoint


def verify_checkpoint(folder: Path) -> Checkpoint | InvalidCheckpoint:
    """Load a checkpoint if its bytes and its golden answers still hold. CheckpointError: it is no checkpoint."""
    try:
        verify_folder(folder)
    except CheckpointError as error:
        return InvalidCheckpoint("checksum_failed", str(error))
    checkpoint = load_checkpoint(folder)
    if checkpoint.config.strategy not in DRAFTING:
        require_target_features(checkpoint.config.strategy, str(folder))
    try:
        replay_golden(checkpoint)
    except CheckpointError as error:
        return InvalidCheckpoint("golden_failed", str(error))
    return checkpoint


def evaluation_store(cfg: PromoteConfig, checkpoint: Checkpoint) -> str:
    """The store to evaluate on: --store, else the one that the checkpoint was trained on."""
    if cfg.store is not None:
        return cfg.store
    config = training_config(checkpoint)
    if config is None:
        raise ConfigError(f"{cfg.run} does not record the store it was trained on; name one with --store.")
    return config.store


def require_unseen_pairs(cfg: PromoteConfig, context: EvaluationContext, checkpoint: Checkpoint) -> None:
    """ConfigError if the checkpoint was fitted or chosen on pairs of the test part."""
    seen, config = context.trained_on(checkpoint), training_config(checkpoint)
    if seen and config:
        raise ConfigError(
            f"{cfg.run} was trained on {seen} of the {len(context.split.test)} test pairs of this split, so they "
            f"cannot test it; give the split it was trained with: --split {config.split} "
            f"--split-seed {config.split_seed} --test-share {config.test_share:g} --val-share {config.val_share:g}"
        )


def champion_metrics(
    registry: ModelRegistry,
    champion: str | None,
    context: EvaluationContext,
    mean_target_D: Tensor,
    test_fingerprint: str,
) -> dict[str, Any] | None:
    """The champion's acceptance on these test pairs: from its tags if they are of these pairs, else evaluated again.

    None without a champion. One that cannot be evaluated keeps the numbers of its tags, and has an `error`.
    """
    if champion is None:
        return None
    key = rate_key(THETA)
    tags = registry.tags(champion)
    tagged: dict[str, Any] = {
        "cosine_accept_rate": {key: float(tags.get(RATE_TAG, 0.0))},
        "test_fingerprint": tags.get("test_fingerprint", "") if RATE_TAG in tags else "",
        "lift": float(tags.get("lift", 0.0)),
    }
    if tagged["test_fingerprint"] == test_fingerprint:
        return tagged
    try:
        with registry.download(champion) as folder:
            metrics = context.test_result(load_checkpoint(folder), mean_target_D)
    except CheckpointError as error:
        return {**tagged, "error": f"and cannot be evaluated on these: {error}"}
    return {
        "cosine_accept_rate": {key: metrics["cosine_accept_rate"][key]},
        "test_fingerprint": metrics["test_fingerprint"],
        "lift": metrics["lift"],
    }


def register(
    registry: ModelRegistry,
    challenger: Challenger,
    champion: str | None,
    opponent: dict[str, Any] | None,
    compare: Callable[..., Verdict],
) -> dict[str, Any] | None:
    """Write the version, and move the alias if it is earned. None: the champion is another by now; compare again.

    `compare`: takes `is_champion` and returns the verdict on challenger and `opponent`, the champion's numbers.
    """
    metrics = challenger.metrics
    version = registry.version_of(challenger.model_sha256)
    is_champion = version is not None and str(version.version) == champion
    verdict = compare(is_champion=is_champion)
    reason = verdict.reason + (f" ({opponent['error']})" if opponent and "error" in opponent else "")
    moves = verdict.promoted and not is_champion
    tags = version_tags(challenger, version, verdict, reason)
    if moves and version is not None:  # what an earlier promotion left says nothing about this one
        registry.clear_tags(version, "promoted_at", "rolled_back_at", "rolled_back_to")
    number = registry.write_version(
        version, challenger.run_id, {**tags, "previous_champion": champion or ""} if moves else tags
    )
    if registry.champion() != champion:
        return None
    if moves:
        registry.move_alias(number)
    if moves or (is_champion and version is not None and "promoted_at" not in version.tags):
        registry.tag_version(number, "promoted_at", timestamp())
    champion_now = number if verdict.promoted else champion
    return {
        "action": "promote",
        "model": registry.model,
        "version": number,
        "new_version": version is None,
        "promoted": verdict.promoted,
        "forced": verdict.forced,
        "verdict_code": verdict.code,
        "reason": reason,
        "lift": metrics.get("lift"),
        "champion": champion_now,
        "champion_before": champion,
        "champion_before_metrics": opponent,
        "checkpoint": str(challenger.checkpoint.folder),
        "mlflow_run_id": challenger.run_id,
        "tracking_uri": registry.address,
        "metrics": metrics,
        "warnings": registry_warnings(champion_now, registry.versions()),
    }


def render_promotion(result: dict[str, Any], console: Console) -> None:
    """Print the results table and the outcome."""
    metrics = result["metrics"]
    if TOKENS in metrics:
        console.print(tokens_table(metrics))
    else:
        console.print(results_table(metrics, f"{metrics['pairs']:,} test pairs"))
    console.print(metrics["verdict"])
    render_outcome(result, console)


def tokens_table(metrics: Mapping[str, Any]) -> Table:
    """Table of a drafter's part next to its baselines."""
    table = Table("drafts with", "tokens per target pass", title=f"{metrics['pairs']:,} test pairs")
    low, high = metrics["interval95"][TOKENS]
    table.add_row(metrics["strategy"], f"{metrics[TOKENS]:.3f} (95 %: {low:.3f} to {high:.3f})")
    for name, rate in metrics["baselines"].items():
        table.add_row(f"baseline: {name}", f"{rate:.3f}")
    return table


def render_outcome(result: dict[str, Any], console: Console) -> None:
    """Print what was registered, whether the alias moved, and why."""
    name = f"{result['model']} version {result['version']}"
    console.print(f"registered: {name}{'' if result['new_version'] else ' (already there)'}")
    if result["promoted"]:
        console.print(f"{CHAMPION}: {name}; {result['reason']}", style="bold green")
    else:
        console.print(f"{CHAMPION} stays version {result['champion']}; {result['reason']}", style="yellow")
    for warning in result["warnings"]:
        console.print(f"- {warning}", style="yellow")
    if try_next := result["metrics"].get("try_next"):
        console.print(try_next, style="bold")


def version_tags(
    challenger: Challenger, version: ModelVersion | None, verdict: Verdict, reason: str
) -> dict[str, str]:
    """Tags of a version. A promoted one keeps the verdict and reason of its promotion until it is promoted again."""
    tags = challenger.tags
    if version is None:
        tags = tags | {"model_sha256": challenger.model_sha256, "checkpoint_sha256": challenger.checkpoint.sha256}
    elif verdict.code not in EARNED and (
        "promoted_at" in version.tags
        or (verdict.code == "already_champion" and version.tags.get("verdict_code") in EARNED)
    ):
        return tags
    return {**tags, "verdict_code": verdict.code, "reason": reason}


def alignment_tags(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Numbers of an evaluation as tags of a version."""
    return {
        RATE_TAG: repr(metrics["cosine_accept_rate"][rate_key(THETA)]),
        "cos_sim_mean": repr(metrics["cos_sim_mean"]),
        "lift": repr(metrics["lift"]),
        "beats_baseline": str(metrics["lift"] > 0).lower(),
        "lift_interval95": " ".join(map(repr, metrics["interval95"]["lift"])),
        "best_baseline": metrics["best_baseline"],
        "previous_window_better": str(metrics["previous_window_better"]).lower(),
        "centered_cos_sim_mean": repr(metrics["centered_cos_sim_mean"]),
        "evaluation": json.dumps(short_evaluation(metrics)),
        **origin_tags(metrics),
    }


def origin_tags(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Identity of the test pairs of an evaluation, and its verdict."""
    return {
        "pairs": str(metrics["pairs"]),
        "fingerprint": metrics["fingerprint"],
        "test_fingerprint": metrics["test_fingerprint"],
        "split": metrics["split"]["label"],
        "source": metrics["data"]["source"],
        "events": metrics["data"]["events"],
        "verdict": metrics["verdict"],
    }


def short_evaluation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation that the endpoint shows: acceptance by θ with every baseline, and the spread of the cosines."""
    shown = (
        "pairs",
        "cos_sim_mean",
        "cos_sim_std",
        "cosine_accept_rate",
        "percentiles",
        "lift",
        "best_baseline",
        "verdict",
    )
    baselines = {
        name: {key: baseline[key] for key in ("cos_sim_mean", "cosine_accept_rate")}
        for name, baseline in metrics["baselines"].items()
    }
    origin = {"split": metrics["split"]["label"], "source": metrics["data"]["source"]}
    return {**{key: metrics[key] for key in shown}, "baselines": baselines, **origin}
