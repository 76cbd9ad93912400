"""`ray-app promote`: a checkpoint becomes a registered version, and champion if it earns it.

The verdict is `promotion_verdict` of `ray_app.core.promotion_policy`; this file gathers what it judges by, and acts
on it. Judging takes as long as it takes; the registry is written in one short turn (`registry_lock.py`), and only if
the champion is still the one that was judged against.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from rich.console import Console

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.evaluator import require_device
from ray_app.commands.evaluate.report import results_table
from ray_app.commands.promote.champion_history import CHAMPION, move, reconcile
from ray_app.commands.promote.judging import (
    ChampionComparison,
    champion_version,
    evaluation_store,
    opponent_metrics,
    require_unseen_pairs,
)
from ray_app.commands.promote.registry_lock import RegistryLock, ensure_model, turn
from ray_app.commands.promote.rollback import RATE, list_champions, render_list, render_rollback, roll_back
from ray_app.config.evaluate import PromoteConfig
from ray_app.core.metrics import THETA, rate_key
from ray_app.core.promotion_policy import InvalidCheckpoint, Verdict, promotion_verdict
from ray_app.data.training_means import mean_target
from ray_app.errors import CheckpointError
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import MODEL, Checkpoint, load_checkpoint, replay_golden, verify_folder
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs
from ray_app.tracking.mlflow_logger import redact_password, tracking_uri
from ray_app.tracking.model_registry import best_of_run, ensure_uploaded, registry_errors, source_of, version_of


def run_promote(cfg: PromoteConfig) -> dict[str, Any]:
    """Promotes a run, goes back to the champion before, or lists: what the config asks for."""
    if cfg.list:
        return list_champions(cfg)
    if cfg.rollback:
        return roll_back(cfg)
    assert cfg.run is not None
    with local_folder(best_of_run(cfg.run)) as folder:
        return promote(cfg, folder)


def render_promote(result: dict[str, Any], console: Console) -> None:
    """The results table and the outcome; or the list; or who is champion again."""
    if result["action"] == "list":
        render_list(result, console)
    elif result["action"] == "rollback":
        render_rollback(result, console)
    else:
        metrics = result["metrics"]
        console.print(results_table(metrics, f"{metrics['pairs']:,} test pairs"))
        console.print(metrics["verdict"], highlight=False, markup=False)
        render_outcome(result, console)


def promote(cfg: PromoteConfig, folder: Path) -> dict[str, Any]:
    """Judges, registers, and moves the alias or says why not.

    A checkpoint whose weights are registered already keeps its version. CheckpointError: it is not what was saved,
    or does not fit. ConfigError: it was trained on pairs of this test part. RegistryError: the server refuses or
    is away.
    """
    checkpoint = verify_checkpoint(folder)
    if isinstance(checkpoint, InvalidCheckpoint):
        verdict = promotion_verdict(checkpoint, None, force=cfg.force)
        raise CheckpointError(f"not promoted ({verdict.code}): {verdict.reason}")
    store = PairStore.open(evaluation_store(cfg, checkpoint), cfg.durations)
    checkpoint.require(store.manifest.features)
    split = split_pairs(store.index, cfg.split_config)
    require_unseen_pairs(cfg, checkpoint, store, split)
    with registry_errors(cfg):
        client = MlflowClient(tracking_uri(cfg))
        champion = champion_version(client, cfg.model_name)
    with cluster(cfg.address):
        require_device(cfg.use_gpu)
        bench = ChampionComparison(cfg, store, split, mean_target(store, split.train))
        metrics = bench.judged(checkpoint)
        with registry_errors(cfg):
            weights = sha256_file(checkpoint.folder / MODEL)
            version = version_of(client, cfg.model_name, weights)
            run_id = str(version.run_id) if version else ensure_uploaded(cfg, client, checkpoint)
        while True:
            opponent = opponent_metrics(bench, client, champion, metrics["test_fingerprint"]) if champion else None
            judged = PromotionInput(checkpoint, weights, metrics, opponent, version_str(champion), run_id)
            with registry_errors(cfg), turn(client, cfg.model_name, run_id) as mine:
                result = register_and_promote(cfg, mine, judged)
            if result is not None:
                return result
            with registry_errors(cfg):  # another promotion came first: once more, against its champion
                champion = champion_version(client, cfg.model_name)


@dataclass(frozen=True, slots=True)
class PromotionInput:
    """All that a promotion acts on."""

    checkpoint: Checkpoint
    """The challenger."""
    model_sha256: str
    """Of its weights: what makes two versions the same."""
    metrics: dict[str, Any]
    """Its test metrics."""
    opponent: dict[str, Any] | None
    """The champion's on the same pairs, if there is a champion."""
    champion: str | None
    """The version that was champion then."""
    run_id: str
    """Run whose artifacts are the challenger."""


def register_and_promote(cfg: PromoteConfig, turn: RegistryLock, judged: PromotionInput) -> dict[str, Any] | None:
    """Registers, and moves the alias if it is earned; None, with nothing changed, if the champion is another now.

    The version is whole before the alias moves, so that a kill leaves a version more and nothing half done.
    """
    client, metrics, opponent = turn.client, judged.metrics, judged.opponent
    ensure_model(client, cfg.model_name)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    log = reconcile(turn, cfg.model_name, at)
    if log.champion != judged.champion:
        return None
    version = version_of(client, cfg.model_name, judged.model_sha256)
    verdict = promotion_verdict(
        metrics,
        opponent,
        min_gain=cfg.min_gain,
        force=cfg.force,
        is_champion=version is not None and str(version.version) == log.champion,
    )
    reason = verdict.reason + (f" ({opponent['error']})" if opponent and "error" in opponent else "")
    turn.require()
    number = write_version(client, cfg.model_name, version, judged, tags(metrics, verdict, reason))
    if verdict.promoted and number != log.champion:
        move(turn, cfg.model_name, log, number, code=verdict.code, reason=reason, at=at)
    return {
        "action": "promote",
        "model": cfg.model_name,
        "version": number,
        "new_version": version is None,
        "promoted": verdict.promoted,
        "forced": verdict.forced,
        "verdict_code": verdict.code,
        "reason": reason,
        "lift": metrics["lift"],
        "champion": number if verdict.promoted else log.champion,
        "champion_before": log.champion,
        "champion_before_metrics": opponent,
        "checkpoint": str(judged.checkpoint.folder),
        "mlflow_run_id": str(version.run_id) if version else judged.run_id,
        "tracking_uri": redact_password(tracking_uri(cfg)),
        "metrics": metrics,
    }


def write_version(
    client: MlflowClient, model: str, version: ModelVersion | None, judged: PromotionInput, told: Mapping[str, str]
) -> str:
    """The number of the version that tells this of itself: a new one with all its tags in one request, or `version`.

    An old one is without a test fingerprint while its tags change, so that half of them are never compared with.
    """
    if version is None:
        identity = {"model_sha256": judged.model_sha256, "checkpoint_sha256": judged.checkpoint.sha256}
        made = client.create_model_version(
            model, source_of(judged.run_id), judged.run_id, tags={**identity, **told}, await_creation_for=0
        )
        return str(made.version)
    number = str(version.version)
    for key, value in [
        ("test_fingerprint", ""),
        *sorted(told.items(), key=lambda item: item[0] == "test_fingerprint"),
    ]:
        client.set_model_version_tag(model, number, key, value)
    return number


def render_outcome(result: dict[str, Any], console: Console) -> None:
    """What was registered, whether the alias moved, and why."""
    name = f"{result['model']} version {result['version']}"
    console.print(f"registered: {name}{'' if result['new_version'] else ' (was there already)'}", markup=False)
    if result["promoted"]:
        console.print(f"{CHAMPION}: {name}; {result['reason']}", style="bold green", markup=False)
    else:
        console.print(
            f"{CHAMPION} stays version {result['champion']}; {result['reason']}", style="yellow", markup=False
        )


def verify_checkpoint(folder: Path) -> Checkpoint | InvalidCheckpoint:
    """The checkpoint, if its bytes and its answers are those that were saved. CheckpointError: it never was one."""
    try:
        verify_folder(folder)
    except CheckpointError as error:
        return InvalidCheckpoint("checksum_failed", str(error))
    checkpoint = load_checkpoint(folder)
    try:
        replay_golden(checkpoint)
    except CheckpointError as error:
        return InvalidCheckpoint("golden_failed", str(error))
    return checkpoint


def version_str(version: ModelVersion | None) -> str | None:
    """MLflow gives now a number, now a text."""
    return str(version.version) if version else None


def short_evaluation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the endpoint shows of the test part: acceptance by θ beside every baseline, and how cosines lie."""
    about = (
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
    return {**{key: metrics[key] for key in about}, "baselines": baselines, **origin}


def tags(metrics: Mapping[str, Any], verdict: Verdict, reason: str) -> dict[str, str]:
    """What a version tells of itself."""
    return {
        RATE: repr(metrics["cosine_accept_rate"][rate_key(THETA)]),
        "cos_sim_mean": repr(metrics["cos_sim_mean"]),
        "lift": repr(metrics["lift"]),
        "lift_interval95": " ".join(map(repr, metrics["interval95"]["lift"])),
        "best_baseline": metrics["best_baseline"],
        "previous_window_better": str(metrics["previous_window_better"]).lower(),
        "centered_cos_sim_mean": repr(metrics["centered_cos_sim_mean"]),
        "pairs": str(metrics["pairs"]),
        "fingerprint": metrics["fingerprint"],
        "test_fingerprint": metrics["test_fingerprint"],
        "split": metrics["split"]["label"],
        "source": metrics["data"]["source"],
        "events": metrics["data"]["events"],
        "evaluation": json.dumps(short_evaluation(metrics)),
        "verdict": metrics["verdict"],
        "verdict_code": verdict.code,
        "reason": reason,
    }
