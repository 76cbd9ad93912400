"""The bench of a promotion: challenger and champion on the same test pairs, which neither has seen."""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from torch import Tensor

from ray_app.commands.evaluate.command import about, judgement, trained_on, training_config
from ray_app.commands.evaluate.evaluator import EvaluatorHandle
from ray_app.commands.promote.champion_history import read_log
from ray_app.commands.promote.rollback import RATE
from ray_app.config.evaluate import PromoteConfig
from ray_app.core.metrics import THETA, rate_key
from ray_app.errors import CheckpointError, ConfigError
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split
from ray_app.tracking.model_registry import downloaded


def evaluation_store(cfg: PromoteConfig, checkpoint: Checkpoint) -> str:
    """The store to judge on: the one given, else the one that the checkpoint was trained on."""
    if cfg.store is not None:
        return cfg.store
    config = training_config(checkpoint)
    if config is None:
        raise ConfigError(f"{cfg.run} does not tell which store it was trained on; name one with --store.")
    return config.store


def require_unseen_pairs(cfg: PromoteConfig, checkpoint: Checkpoint, store: PairStore, split: Split) -> None:
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
class ChampionComparison:
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
        with closing(EvaluatorHandle(checkpoint, self.store, self.mean_target_D, use_gpu=self.cfg.use_gpu)) as judge:
            return judgement(judge.evaluate(self.split.test, self.cfg.batch_size, "test pairs"), described)


def champion_version(client: MlflowClient, model: str) -> ModelVersion | None:
    """The version that bears the alias, or None."""
    log = read_log(client, model)
    return client.get_model_version(model, log.champion) if log and log.champion else None


def opponent_metrics(
    bench: ChampionComparison, client: MlflowClient, champion: ModelVersion, test_fingerprint: str
) -> dict[str, Any]:
    """What the champion scores on these test pairs: from its tags if they are of these pairs, else judged anew.

    A champion that cannot be judged on them keeps the numbers of its tags, of other pairs, and an `error`.
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
        return {**of_tags, "error": f"and cannot be judged on these: {error}"}
    return {
        "cosine_accept_rate": {key: metrics["cosine_accept_rate"][key]},
        "test_fingerprint": metrics["test_fingerprint"],
    }
