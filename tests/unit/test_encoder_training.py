"""Training on features of encoders: sequences of one length, for every strategy and every loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_adapters import in_batches
from torch import Tensor

from ray_app.commands.train.context import RunContext
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.initialization import compute_stats, solve_ridge
from ray_app.core.adapters.registry import STRATEGIES, build_adapter
from ray_app.core.adapters.sequences import sequence_cosine, sequence_cosines
from ray_app.core.evaluation import AlignmentEvaluator
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import make_optimizer, training_step
from ray_app.errors import ConfigError
from ray_app.store.manifest import EncoderRecord, Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part

TOKENS, WIDTH = 4, 16
MADE = EncoderRecord(
    model="CLIPVisionModel",
    sha256="0" * 64,
    layer=-1,
    pool="2x2",
    projector=False,
    dtype="float32",
    num_images=1,
    preprocessing={},
)
VECTOR, SEQUENCE, RAGGED = (
    FeatureSpec(dtype="float32", shape=shape, scale=1.0, encoder=encoder)
    for shape, encoder in (((TOKENS * WIDTH,), MADE), ((TOKENS, WIDTH), MADE), ((TOKENS, WIDTH), None))
)


def store_of(folder: Path, spec: FeatureSpec, pairs: int = 48) -> PairStore:
    """Targets are the events turned by one fixed matrix."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    events = torch.randn(pairs, TOKENS, WIDTH, generator=generator) + 1
    features = Features(event=spec, target=spec)
    rows = [
        Pair(f"drive_{n % 8}", n * 10**6, (n + 1) * 10**6, event.numpy().tobytes(), (event @ turn).numpy().tobytes())
        for n, event in enumerate(events)
    ]
    part = write_part(folder, "part.parquet", rows, features)
    publish(folder, [part], features=features, durations={"1s": 10**6}, source={"name": "test"}, rejected=b"")
    return PairStore.open(folder)


def settings(store: PairStore, strategy: str, **changed: object) -> TrainConfig:
    base = {"store": str(store.folder), "out": "run", "strategy": strategy, "hidden_dim": 16, "rank": 4}
    return TrainConfig(**{**base, "dropout": 0.0, **changed})  # type: ignore[arg-type]


def trained(store: PairStore, cfg: TrainConfig, weights: LossWeights) -> tuple[float, float]:
    """Mean loss of the training pairs before and after some steps."""
    context = RunContext.of(cfg, store)
    event, target = (torch.tensor(side) for side in store.read_rows(context.split.train))
    event_val, target_val = (torch.tensor(side) for side in store.read_rows(context.split.val))
    adapter = build_adapter(context.adapter, 0)
    if context.requires != "nothing":
        needs = context.requires
        stats = compute_stats(in_batches(event, target), needs, cfg.rank, len(event), 0)
        if needs == "pairs":
            stats, _ = solve_ridge(stats, (event, event_val), (target, target_val), (1.0, 1.0))
        adapter.initialize_from(stats, pca=cfg.init == "pca")
    objective = AlignmentObjective(adapter, weights, mean_target_D=target.mean(dim=0))
    optimizer = make_optimizer(objective, 3e-3, 0.0)
    losses = []
    for _ in range(40):
        result = training_step(objective, optimizer, event, target, None, global_pairs=len(event))
        losses.append(result.loss_sum / len(event))
    evaluator = AlignmentEvaluator(
        adapter.eval(), target.mean(dim=0), 1.0, 1.0, token_width=store.feature("target").token_width
    )
    evaluator.add(event_val, target_val)
    result = evaluator.result(["drive"] * len(event_val), np.full(len(event_val), -1)).metrics()
    assert result["pairs"] == len(event_val)
    assert np.isfinite([result["cos_sim_mean"], *result["retrieval"].values()]).all()
    return losses[0], losses[-1]


FITTING = {
    "vector": [name for name in STRATEGIES if not name.startswith("token_") and name != "conv"],
    "sequence": [name for name in STRATEGIES if name != "conv"],
}


@pytest.mark.parametrize("strategy", FITTING["vector"])
def test_every_vector_strategy_learns_from_vectors_of_an_encoder(strategy: str, tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", VECTOR)
    weights = LossWeights(contrastive=0.1, centred=0.1)
    before, after = trained(store, settings(store, strategy, contrastive_weight=0.1, centred_weight=0.1), weights)
    assert after < before or strategy == "ridge"


@pytest.mark.parametrize("strategy", FITTING["sequence"])
def test_every_strategy_learns_from_tokens_of_an_encoder(strategy: str, tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", SEQUENCE)
    weights = LossWeights(contrastive=0.1, centred=0.1)
    before, after = trained(store, settings(store, strategy, contrastive_weight=0.1, centred_weight=0.1), weights)
    assert after < before or strategy == "ridge"


def test_sequences_of_different_lengths_take_the_contrastive_loss_but_no_vector_strategy(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", RAGGED)
    weights = LossWeights(contrastive=0.5)
    before, after = trained(store, settings(store, "token_bottleneck", contrastive_weight=0.5), weights)
    assert after < before
    with pytest.raises(ConfigError, match="bottleneck takes whole features, and these are sequences of different"):
        RunContext.of(settings(store, "bottleneck"), store)
    with pytest.raises(ConfigError, match="sequences differ in length"):
        RunContext.of(settings(store, "token_bottleneck", centred_weight=0.1), store)


def by_hand(aligned_BD: Tensor, target_BD: Tensor) -> np.ndarray:
    """Mean cosine over the target's tokens of each aligned with each target, in float64."""
    aligned, target = (x.double().numpy().reshape(len(x), TOKENS, WIDTH) for x in (aligned_BD, target_BD))
    found = np.zeros((len(aligned), len(target)))
    for i, mine in enumerate(aligned):
        for j, other in enumerate(target):
            cosines = [
                a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() else 0.0
                for a, b in zip(mine, other, strict=True)
                if b.any()
            ]
            found[i, j] = np.mean(cosines)
    return found


def test_the_cosine_of_each_sequence_with_each_is_the_mean_over_the_targets_tokens() -> None:
    aligned, target = torch.randn(2, 5, TOKENS * WIDTH, generator=torch.Generator().manual_seed(0))
    for n in range(5):  # of different lengths
        aligned[n, (n % TOKENS + 1) * WIDTH :] = 0
        target[n, (n % TOKENS + 1) * WIDTH :] = 0
    found = sequence_cosines(aligned, target, WIDTH)
    np.testing.assert_allclose(found.numpy(), by_hand(aligned, target), atol=1e-6)
    torch.testing.assert_close(found.diagonal(), sequence_cosine(aligned, target, WIDTH))


def test_features_of_encoders_have_one_length_and_name_their_encoder() -> None:
    pixels = FeatureSpec(dtype="uint8", shape=(3, 224, 224), scale=1 / 255)
    assert Features(event=pixels, target=SEQUENCE).encoders() == {
        "target": "CLIPVisionModel, layer -1, pool 2x2, SHA-256 000000000000…"
    }
    assert (SEQUENCE.is_ragged, RAGGED.is_ragged, VECTOR.is_ragged, pixels.is_ragged) == (False, True, False, False)
