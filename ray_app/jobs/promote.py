"""`ray-app promote`: a checkpoint becomes a registered version, and champion if it earns it.

The verdict is `ray_app.core.gate.promotion_verdict`; this file gathers what it judges by, and acts on it.
"""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from rich.console import Console
from torch import Tensor

from ray_app.config import PromoteConfig
from ray_app.core.gate import Verdict, promotion_verdict
from ray_app.core.metrics import THETA, rate_key
from ray_app.errors import CheckpointError, ConfigError, RegistryError
from ray_app.jobs.cluster import cluster
from ray_app.jobs.evaluate import about, judgement, trained_on, training_config
from ray_app.jobs.judge import Judge, mean_target, require_device
from ray_app.jobs.registry import best_of_run, downloaded, registry_errors
from ray_app.jobs.report import results_table
from ray_app.jobs.tracking import experiment_id, shown, tracking_uri
from ray_app.store.checkpoint import SUMS, Checkpoint, load_checkpoint, verify_folder
from ray_app.store.durable import sha256_file
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs

CHAMPION = "champion"
"""The alias that the endpoint serves."""
ARTIFACTS = "checkpoint"
"""Artifact folder of a run that holds its checkpoint."""
RATE = f"cosine_accept_rate_{rate_key(THETA)}"


def run_promote(cfg: PromoteConfig) -> dict[str, Any]:
    """Judges, registers, and moves the alias or says why not.

    A checkpoint whose weights are registered already keeps its version. CheckpointError: it does not verify or
    fit. ConfigError: it was trained on pairs of this test part. RegistryError: the server refuses or is away.
    """
    checkpoint = load_checkpoint(best_of_run(Path(cfg.run)))
    store = PairStore.open(judged_store(cfg, checkpoint), cfg.durations)
    checkpoint.require(store.manifest.features)
    split = split_pairs(store.index, cfg.split_config)
    refuse_seen_pairs(cfg, checkpoint, store, split)
    with registry_errors(cfg):
        client = MlflowClient(tracking_uri(cfg))
        champion = champion_version(client, cfg.model_name)
    before = str(champion.version) if champion else None  # MLflow gives now a number, now a text
    with cluster(cfg.address):
        require_device(cfg.use_gpu)
        bench = Bench(cfg, store, split, mean_target(store, split.train))
        metrics = bench.judged(checkpoint)
        fingerprint = metrics["test_fingerprint"]
        opponent = opponent_metrics(bench, client, champion, fingerprint) if champion else None
    verdict = promotion_verdict(metrics, opponent, min_gain=cfg.min_gain, force=cfg.force)
    with registry_errors(cfg):
        version, new = registered(cfg, client, checkpoint)
        number = str(version.version)
        if number == before:
            verdict = Verdict(True, False, f"version {number} is the champion already")
        reason = verdict.reason + (f" ({opponent['flaw']})" if opponent and "flaw" in opponent else "")
        for key, value in tags(metrics, verdict, reason).items():
            client.set_model_version_tag(cfg.model_name, number, key, value)
        if verdict.promoted:
            client.set_registered_model_alias(cfg.model_name, CHAMPION, number)
    return {
        "model": cfg.model_name,
        "version": number,
        "new_version": new,
        "promoted": verdict.promoted,
        "forced": verdict.forced,
        "reason": reason,
        "lift": metrics["lift"],
        "champion": number if verdict.promoted else before,
        "champion_before": before,
        "champion_before_metrics": opponent,
        "checkpoint": str(checkpoint.folder),
        "mlflow_run_id": version.run_id,
        "tracking_uri": shown(tracking_uri(cfg)),
        "metrics": metrics,
    }


def render_promote(result: dict[str, Any], console: Console) -> None:
    """What was registered, whether the alias moved, and why."""
    metrics = result["metrics"]
    console.print(results_table(metrics, f"{metrics['pairs']:,} test pairs"))
    console.print(metrics["verdict"], highlight=False, markup=False)
    name = f"{result['model']} version {result['version']}"
    console.print(f"registered: {name}{'' if result['new_version'] else ' (was there already)'}", markup=False)
    if result["promoted"]:
        console.print(f"{CHAMPION}: {name}; {result['reason']}", style="bold green", markup=False)
    else:
        console.print(
            f"{CHAMPION} stays version {result['champion']}; {result['reason']}", style="yellow", markup=False
        )


def judged_store(cfg: PromoteConfig, checkpoint: Checkpoint) -> Path:
    """The store to judge on: the one given, else the one that the checkpoint was trained on."""
    if cfg.store is not None:
        return cfg.store
    config = training_config(checkpoint)
    if config is None:
        raise ConfigError(f"{cfg.run} does not tell which store it was trained on; name one with --store.")
    return config.store


def refuse_seen_pairs(cfg: PromoteConfig, checkpoint: Checkpoint, store: PairStore, split: Split) -> None:
    """ConfigError if the checkpoint was fitted or chosen on pairs that it would be judged by."""
    seen = trained_on(checkpoint, store, split.test)
    config = training_config(checkpoint)
    if seen and config:
        raise ConfigError(
            f"{cfg.run} was trained on {seen} of the {len(split.test)} test pairs of this split and cannot be judged "
            f"by them; give the split it was trained with: --split {config.split} --split-seed {config.split_seed} "
            f"--test-share {config.test_share:g} --val-share {config.val_share:g}"
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """The same test pairs for everyone."""

    cfg: PromoteConfig
    """Batch size and device."""
    store: PairStore
    """Where the pairs are."""
    split: Split
    """Which of them are the test part."""
    mean_target_D: Tensor
    """Mean training target."""

    def judged(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The test metrics of a checkpoint. CheckpointError if it does not fit the store."""
        described = about(checkpoint, self.store, self.split, self.cfg.split_config)
        with closing(Judge(checkpoint, self.store, self.mean_target_D, use_gpu=self.cfg.use_gpu)) as judge:
            return judgement(judge.evaluate(self.split.test, self.cfg.batch_size, "test pairs"), described)


def champion_version(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that bears the alias, or None."""
    try:
        version = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return client.get_model_version(name, version) if version else None


def opponent_metrics(
    bench: Bench, client: MlflowClient, champion: ModelVersion, test_fingerprint: str
) -> dict[str, Any]:
    """What the champion scores on these test pairs: from its tags if they are of these pairs, else judged anew.

    A champion that cannot be judged on them keeps the numbers of its tags, of other pairs, and a `flaw`.
    """
    key = rate_key(THETA)
    of_tags: dict[str, Any] = {
        "cosine_accept_rate": {key: float(champion.tags.get(RATE, 0.0))},
        "test_fingerprint": champion.tags.get("test_fingerprint", "") if RATE in champion.tags else "",
    }
    if of_tags["test_fingerprint"] == test_fingerprint:
        return of_tags
    try:
        with downloaded(client, str(champion.source), bench.cfg) as folder:
            metrics = bench.judged(load_checkpoint(folder))
    except CheckpointError as error:
        return {**of_tags, "flaw": f"and cannot be judged on these: {error}"}
    return {
        "cosine_accept_rate": {key: metrics["cosine_accept_rate"][key]},
        "test_fingerprint": metrics["test_fingerprint"],
    }


def registered(cfg: PromoteConfig, client: MlflowClient, checkpoint: Checkpoint) -> tuple[ModelVersion, bool]:
    """The version with these weights, and whether it is new. RegistryError if the copy there does not verify."""
    sha256 = sha256_file(checkpoint.folder / "model.safetensors")
    for version in client.search_model_versions(f"name='{cfg.model_name}'"):
        if version.tags.get("model_sha256") == sha256:
            return version, False
    run_id = run_that_holds(client, checkpoint)
    if run_id is None:
        run_id = client.create_run(experiment_id(client, cfg), run_name=f"promote-{sha256[:10]}").info.run_id
        client.log_artifacts(run_id, str(checkpoint.folder), ARTIFACTS)
        client.set_terminated(run_id)
    source = f"runs:/{run_id}/{ARTIFACTS}"
    with downloaded(client, source, cfg) as folder:
        if verify_folder(folder) != checkpoint.sha256:
            raise RegistryError(f"{source} is another checkpoint than {checkpoint.folder}; promote it again.")
    try:
        client.create_registered_model(cfg.model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    identity = {"model_sha256": sha256, "checkpoint_sha256": checkpoint.sha256}
    return client.create_model_version(cfg.model_name, source, run_id, tags=identity), True


def run_that_holds(client: MlflowClient, checkpoint: Checkpoint) -> str | None:
    """The checkpoint's own run, if this server knows it and its artifacts are this very checkpoint."""
    run_id = checkpoint.provenance.get("mlflow_run_id")
    if not run_id:
        return None
    with tempfile.TemporaryDirectory(prefix="ray-app-") as scratch:
        try:
            sums = client.download_artifacts(run_id, f"{ARTIFACTS}/{SUMS}", scratch)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run_id if sha256_file(Path(sums)) == checkpoint.sha256 else None


def tags(metrics: Mapping[str, Any], verdict: Verdict, reason: str) -> dict[str, str]:
    """What a version tells of itself."""
    return {
        RATE: repr(metrics["cosine_accept_rate"][rate_key(THETA)]),
        "cos_sim_mean": repr(metrics["cos_sim_mean"]),
        "lift": repr(metrics["lift"]),
        "lift_interval95": " ".join(map(repr, metrics["interval95"]["lift"])),
        "best_control": metrics["best_control"],
        "previous_window_ahead": str(metrics["previous_window_ahead"]).lower(),
        "centered_cos_sim_mean": repr(metrics["centered_cos_sim_mean"]),
        "pairs": str(metrics["pairs"]),
        "fingerprint": metrics["fingerprint"],
        "test_fingerprint": metrics["test_fingerprint"],
        "split": metrics["split"]["label"],
        "source": metrics["data"]["source"],
        "events": metrics["data"]["events"],
        "verdict": metrics["verdict"],
        "promoted": str(verdict.promoted).lower(),
        "forced": str(verdict.forced).lower(),
        "reason": reason,
    }
