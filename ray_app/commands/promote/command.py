"""`ray-app promote`: promote a run, list the versions, or roll back."""

from typing import Any

from rich.console import Console

from ray_app.commands.promote.rollback import list_champions, render_list, render_rollback, roll_back
from ray_app.config.evaluate import PromoteConfig
from ray_app.config.train import DRAFTING
from ray_app.runs.run_dir import best_of_run
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.tracking.model_registry import ModelRegistry
from ray_app.tracking.uri import tracking_uri


def run_promote(cfg: PromoteConfig) -> dict[str, Any]:
    """Promote a run, roll back, or list: whichever the config asks for."""
    registry = ModelRegistry(tracking_uri(cfg), cfg.model_name, cfg.experiment)
    if cfg.list:
        return list_champions(registry)
    if cfg.rollback:
        return roll_back(registry)
    # torch and Ray, seconds that a list does without
    from ray_app.commands.promote.drafter_promotion import promote_drafter
    from ray_app.commands.promote.promotion import promote, verified

    assert cfg.run is not None
    with local_folder(best_of_run(cfg.run)) as folder:
        checkpoint = verified(folder, force=cfg.force)
        if checkpoint.config.strategy in DRAFTING:
            return promote_drafter(cfg, registry, checkpoint)
        return promote(cfg, registry, checkpoint)


def render_promote(result: dict[str, Any], console: Console) -> None:
    """Print the results table and the outcome, the list, or the champion after a rollback."""
    if result["action"] == "list":
        render_list(result, console)
    elif result["action"] == "rollback":
        render_rollback(result, console)
    else:
        from ray_app.commands.promote.promotion import render_promotion

        render_promotion(result, console)
