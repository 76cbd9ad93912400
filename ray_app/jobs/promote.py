"""`ray-app promote`: a checkpoint becomes a registered version, and champion if it earns it.

The verdict is `ray_app.core.gate.promotion_verdict`; this file gathers what it judges by, and acts on it.
"""

import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from rich.console import Console

from ray_app.config import PromoteConfig
from ray_app.core.gate import promotion_verdict
from ray_app.core.metrics import THETA, rate_key
from ray_app.errors import CheckpointError, ConfigError, RegistryError
from ray_app.jobs.cluster import cluster
from ray_app.jobs.evaluate import about, judgement, trained_on, training_config
from ray_app.jobs.judge import Judge
from ray_app.jobs.registry import best_of_run, downloaded, registry_errors
from ray_app.jobs.report import results_table
from ray_app.jobs.tracking import experiment_id, tracking_uri
from ray_app.store.checkpoint import SUMS, Checkpoint, load_checkpoint, verify_folder
from ray_app.store.durable import sha256_file
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs

CHAMPION = "champion"
ARTIFACTS = "checkpoint"
RATE = f"cosine_accept_rate_{rate_key(THETA)}"


def run_promote(cfg: PromoteConfig) -> dict[str, Any]:
    """Judges, registers, and moves the alias or says why not.

    A checkpoint whose weights are registered already keeps its version. CheckpointError: it does not verify or
    fit. ConfigError: it was trained on pairs of this test part. RegistryError: the server refuses or is away.
    """
    checkpoint = load_checkpoint(best_of_run(Path(cfg.run)))
    store = PairStore.open(judged_store(cfg, checkpoint), cfg.durations)
    split = split_pairs(store.index, cfg.split_config)
    refuse_seen_pairs(cfg, checkpoint, store, split)
    with registry_errors(cfg):
        client = MlflowClient(tracking_uri(cfg))
        champion = champion_version(client, cfg.model_name)
    with cluster(cfg.address):
        challenger = judged(cfg, checkpoint, store, split)
        opponent = champion and champion_metrics(cfg, client, champion, challenger, store, split)
    with registry_errors(cfg):
        version = registered(cfg, client, checkpoint)
        ...
