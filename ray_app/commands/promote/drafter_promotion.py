"""Promotion of a drafter's part by tokens per target pass, under a registered name of its own.

The endpoint serves aligned features, which such a part does not make. So versions of it are of another model than the
endpoint's: the strategy's name, unless one is given. Only parts of one strategy are compared.
"""

from functools import partial
from typing import Any

from ray_app.commands.evaluate.context import EvaluationContext
from ray_app.commands.evaluate.drafting import draft_context, draft_result, draft_settings, evaluate_drafter
from ray_app.commands.promote.promotion import Challenger, origin_tags, register
from ray_app.config.base import TrackingFlags
from ray_app.config.evaluate import PromoteConfig
from ray_app.config.tune import TOKENS
from ray_app.core.promotion_policy import draft_verdict
from ray_app.core.speculative.draft_evaluation import DraftEvaluation
from ray_app.errors import CheckpointError, ConfigError, InputError
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.tracking.model_registry import ModelRegistry


def promote_drafter(cfg: PromoteConfig, registry: ModelRegistry, checkpoint: Checkpoint) -> dict[str, Any]:
    """Evaluate a drafter's part, register it, and move the alias if it is earned.

    CheckpointError: it does not fit. ConfigError: it or its drafter was trained on these pairs, or the name is
    that of other models. RegistryError: the server refuses or is away.
    """
    strategy = checkpoint.config.strategy
    if cfg.model_name == TrackingFlags.model_fields["model_name"].default:
        registry = ModelRegistry(registry.uri, strategy.replace("_", "-"), registry.experiment)
    others = {version.tags.get("strategy") for version in registry.versions()} - {strategy}
    if others:
        raise ConfigError(
            f"versions of '{registry.model}' are no {strategy}, which the endpoint cannot serve and which has a name "
            f"of its own; leave --model-name out, or take another than {registry.model}"
        )
    context = draft_context(cfg, cfg.store, checkpoint)
    own = evaluate_drafter(context, checkpoint)
    metrics = draft_result(context, checkpoint, own)
    challenger = Challenger.of(registry, checkpoint, metrics, draft_tags(metrics, checkpoint))
    champion = registry.champion()
    while True:
        opponent, gain = champion_draft(registry, champion, context, own)
        compare = partial(draft_verdict, metrics, opponent, gain, min_gain=cfg.min_gain, force=cfg.force)
        result = register(registry, challenger, champion, opponent, compare)
        if result is not None:
            return result
        champion = registry.champion()


def champion_draft(
    registry: ModelRegistry, champion: str | None, context: EvaluationContext, own: DraftEvaluation
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the champion's numbers on these pairs, and the gain of `own` over it; None without a champion.

    One that cannot be evaluated has an `error`, and there is no gain over it.
    """
    if champion is None:
        return None, None
    try:
        with registry.download(champion) as folder:
            evaluation = evaluate_drafter(context, load_checkpoint(folder))
    except (CheckpointError, ConfigError, InputError) as error:
        return {"error": str(error)}, None
    return evaluation.metrics(), own.gain_over(evaluation.passes_N)


def draft_tags(metrics: dict[str, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """Numbers of an evaluation as tags of a version."""
    return {
        "strategy": checkpoint.config.strategy,
        "drafter": str(draft_settings(checkpoint).drafter or ""),
        TOKENS: repr(metrics[TOKENS]),
        f"{TOKENS}_interval95": " ".join(map(repr, metrics["interval95"][TOKENS])),
        "best_baseline": metrics["best_baseline"],
        "gain": repr(metrics["gain"]),
        "gain_interval95": " ".join(map(repr, metrics["interval95"]["gain"])),
        "beats_baseline": str(metrics["gain"] > 0).lower(),
        "cos_sim_mean": repr(metrics["cos_sim_mean"]),
        **origin_tags(metrics),
    }
