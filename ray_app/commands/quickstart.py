"""`ray-app quickstart`: scenes, training, evaluation and promotion on this machine, small."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.command import render_evaluate, run_evaluate
from ray_app.commands.inspect.command import run_inspect
from ray_app.commands.prepare.command import run_prepare
from ray_app.commands.promote.command import run_promote
from ray_app.commands.promote.promotion import render_outcome
from ray_app.commands.train.command import run_train
from ray_app.config.evaluate import EvaluateConfig, PromoteConfig
from ray_app.config.prepare import InspectConfig, PrepareScenes
from ray_app.config.train import TrainConfig
from ray_app.config.tune import QuickstartConfig
from ray_app.store.manifest import MANIFEST
from ray_app.terminal import make_console

RECIPE: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.05, "schedule": "cosine", "flip": 0.5}
"""Settings for `conv`, chosen on validation parts of rendered scenes."""


def run_quickstart(cfg: QuickstartConfig) -> dict[str, Any]:
    """Prepare a store, train a new run on it, evaluate and promote it; return their --json objects.

    The store is named after its settings and reused by the next quickstart. Every quickstart trains a run of its own,
    and none is deleted.
    """
    store = cfg.out / f"scenes-{cfg.num_pairs}x{cfg.num_sequences}-seed{cfg.seed}"
    run = next_run(cfg.out)
    tracking = cfg.model_dump(include={"tracking_uri", "experiment", "model_name"})
    log = make_console(stderr=True)
    with cluster(None):
        log.rule("1/4 prepare: rendered driving scenes, simulated events")
        if (store / MANIFEST).is_file():
            prepared = run_inspect(InspectConfig(store=store))
        else:
            scenes = {"num_pairs": cfg.num_pairs, "num_sequences": cfg.num_sequences, "seed": cfg.seed}
            prepared = run_prepare(PrepareScenes(out=store, **scenes))
        log.rule("2/4 train")
        trained = run_train(
            TrainConfig(
                store=store,
                out=run,
                strategy=cfg.strategy,
                num_epochs=cfg.num_epochs,
                hidden_dim=cfg.hidden_dim,
                early_stop_patience=cfg.num_epochs,
                **(RECIPE if cfg.strategy == "conv" else {}),
                seed=cfg.seed,
                **tracking,
            )
        )
        log.rule("3/4 evaluate: the test part, with every baseline")
        evaluated = run_evaluate(
            EvaluateConfig(
                store=store,
                checkpoint=trained["checkpoint"],
                out=run.with_name(f"{run.name}-report"),
                **tracking,
            )
        )
        log.rule("4/4 promote")
        promoted = run_promote(PromoteConfig(run=str(run), store=store, **tracking))
    return {"prepare": prepared, "train": trained, "evaluate": evaluated, "promote": promoted}


def next_run(folder: Path) -> Path:
    """First of run-1, run-2, … that does not exist yet."""
    number = 1
    while (folder / f"run-{number}").exists():
        number += 1
    return folder / f"run-{number}"


def render_quickstart(result: dict[str, Any], console: Console) -> None:
    """Print the table of the test part, the report's path, the champion and the next commands."""
    render_evaluate(result["evaluate"], console)
    render_outcome(result["promote"], console)
    console.print("Live speculative decoding with a small model that sees: ray-app demo decode")
