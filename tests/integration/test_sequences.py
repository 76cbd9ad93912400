"""Features that are sequences: masks, the token adapters, ragged bf16 in a store, and a whole run on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.train.command import run_train
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.initialization import PairsInMemory, compute_init
from ray_app.commands.train.state import resume_or_init
from ray_app.config.evaluate import EvaluateConfig
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES, build_adapter, meta_adapter, num_parameters
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.sequences import mask_of, next_position_cosine, sequence_mse
from ray_app.core.evaluation import TrainingMeans, pair_cosine
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import ConfigError, InputError, StoreError
from ray_app.store.checkpoint import load_checkpoint, replay_golden, save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part
from ray_app.store.split import split_pairs

LIMIT, WIDTH = 5, 16


def padded(sequences: list[torch.Tensor], limit: int) -> torch.Tensor:
    """Sequences of (length, W) as one (B, limit · W), zeros behind each end."""
    pad = torch.nn.functional.pad
    return torch.stack([pad(tokens, (0, 0, 0, limit - len(tokens))).flatten() for tokens in sequences])


TOKENS = [name for name in STRATEGIES if name.startswith("token_")]
SPEC = FeatureSpec(dtype="bfloat16", shape=(LIMIT, WIDTH), scale=1.0)


def token_adapter(strategy: str, seed: int = 0, limit: int = LIMIT) -> Adapter:
    """No weight at zero, as after training."""
    shape = (limit, WIDTH)
    config = AdapterConfig(
        strategy, limit * WIDTH, limit * WIDTH, 8, dropout=0.0, event_shape=shape, target_shape=shape
    )
    adapter = build_adapter(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter.eval()


def sequences(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        ("token_bottleneck", 2_109_697),
        ("token_multilayer", 3 * 2_109_697),
        ("token_wide", 8_401_921),
        ("token_attention", 83_924_994),
        ("token_causal", 83_924_994),
    ],
)
def test_at_4096_wide_they_have_the_sizes_of_the_reference_s_project(strategy: str, parameters: int) -> None:
    shape, kind = (50, 4096), STRATEGIES[strategy]
    with torch.device("meta"):
        adapter = kind(
            AdapterConfig(strategy, 204_800, 204_800, kind.HIDDEN_DIM, event_shape=shape, target_shape=shape)
        )
    assert num_parameters(adapter) == parameters


@pytest.mark.parametrize("strategy", TOKENS)
def test_an_untrained_one_is_the_identity_and_so_sees_nothing_of_its_target(strategy: str) -> None:
    shape = (LIMIT, WIDTH)
    config = AdapterConfig(strategy, LIMIT * WIDTH, LIMIT * WIDTH, 8, event_shape=shape, target_shape=shape)
    event = padded(sequences((5, 3, 1)), LIMIT)
    torch.testing.assert_close(build_adapter(config, 0).eval()(event), event)


@pytest.mark.parametrize("strategy", TOKENS)
def test_what_is_behind_a_sequence_s_end_changes_nothing_and_stays_zero(strategy: str) -> None:
    short, long = token_adapter(strategy), token_adapter(strategy, limit=LIMIT + 3)
    long.load_state_dict(short.state_dict())
    given = sequences((5, 3, 1))
    a = short(padded(given, LIMIT)).unflatten(1, (-1, WIDTH))
    b = long(padded(given, LIMIT + 3)).unflatten(1, (-1, WIDTH))
    torch.testing.assert_close(a, b[:, :LIMIT])
    assert not b[:, LIMIT:].any()
    assert not a[1, 3:].any()


@pytest.mark.parametrize(("strategy", "reads_ahead"), [("token_attention", True), ("token_causal", False)])
def test_a_causal_adapter_does_not_read_ahead(strategy: str, reads_ahead: bool) -> None:
    adapter, event = token_adapter(strategy), padded(sequences((5,)), LIMIT)
    other = event.clone()
    other[:, 4 * WIDTH :] *= -1.0
    before = (adapter(event) - adapter(other))[:, : 4 * WIDTH].detach().abs().max()
    assert bool(before > 1e-5) == reads_ahead


def test_masked_losses_and_metrics_agree_with_numpy_token_by_token() -> None:
    lengths = (5, 3, 1)
    a, b = sequences(lengths), sequences(lengths, seed=1)
    cosines = [
        np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(s.numpy(), t.numpy(), strict=True)])
        for s, t in zip(a, b, strict=True)
    ]
    aligned, target = padded(a, LIMIT), padded(b, LIMIT)
    aligned += 7.0 * (~mask_of(aligned, WIDTH)).repeat_interleave(WIDTH, dim=1)  # noise behind the ends
    np.testing.assert_allclose(pair_cosine(aligned, target, WIDTH), cosines, rtol=1e-5)
    squares = [float(((s - t) ** 2).mean()) for s, t in zip(a, b, strict=True)]
    np.testing.assert_allclose(sequence_mse(aligned, target, WIDTH), squares, rtol=1e-5)
    ahead = [
        np.mean([float(torch.cosine_similarity(s[n], t[n + 1], dim=0)) for n in range(len(s) - 1)] or [0.0])
        for s, t in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(next_position_cosine(aligned, target, WIDTH), ahead, rtol=1e-4, atol=1e-6)
    adapter = token_adapter("token_causal")
    plain, more = (
        AlignmentObjective(adapter, LossWeights(next_position=weight)).losses(aligned, target)["loss"]
        for weight in (0.0, 0.5)
    )
    np.testing.assert_allclose(more - plain, 0.5 * (1 - np.array(ahead)), rtol=1e-4, atol=1e-5)


def test_a_mean_target_of_sequences_is_taken_over_those_that_reach_a_position() -> None:
    target = padded(sequences((5, 3, 1)), LIMIT)
    mean = TrainingMeans.of(target.numpy(), WIDTH).mean_target(1.0).view(LIMIT, WIDTH)
    tokens = target.view(3, LIMIT, WIDTH)
    torch.testing.assert_close(mean[0], tokens[:, 0].mean(dim=0))
    torch.testing.assert_close(mean[2], tokens[:2, 2].mean(dim=0))
    torch.testing.assert_close(mean[4], tokens[0, 4])
    with pytest.raises(InputError, match="mean training target is zero everywhere"):
        TrainingMeans.of(np.stack([target[0].numpy(), -target[0].numpy()]), WIDTH).mean_target(1.0)


def test_dropout_of_tokens_is_the_same_however_a_batch_is_divided() -> None:
    shape = (LIMIT, WIDTH)
    config = AdapterConfig(
        "token_attention", LIMIT * WIDTH, LIMIT * WIDTH, 8, dropout=0.5, event_shape=shape, target_shape=shape
    )
    adapter, x = build_adapter(config, 1).train(), padded(sequences((5, 3, 1, 4)), LIMIT)
    torch.nn.init.normal_(adapter.block.up.weight)  # type: ignore[union-attr, arg-type]
    whole = adapter(x, BatchNoise(1, 2, 0, 4, 4))
    parts = [adapter(x[:1], BatchNoise(1, 2, 0, 1, 4)), adapter(x[1:], BatchNoise(1, 2, 1, 3, 4))]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_sequences_that_do_not_fit_are_refused() -> None:
    adapter = token_adapter("token_bottleneck")
    with pytest.raises(ConfigError, match="sequences of 7 tokens of 16 were given, the adapter's limit is 5"):
        adapter(torch.randn(2, 7 * WIDTH))
    with pytest.raises(ConfigError, match=r"token_wide works on sequences .* shape \[3, 4, 4\]"):
        meta_adapter(AdapterConfig("token_wide", 48, 48, event_shape=(3, 4, 4), target_shape=(3, 4, 4)))
    with pytest.raises(ConfigError, match="multiple of the 8 heads"):
        meta_adapter(AdapterConfig("token_attention", 24, 24, event_shape=(2, 12), target_shape=(2, 12)))


def as_bf16(tokens_LW: torch.Tensor) -> bytes:
    return tokens_LW.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()


def build_store(folder: Path, drives: int = 5, windows: int = 8) -> Path:
    """Targets are the events turned by one fixed matrix, with noise; lengths differ from pair to pair."""
    folder.mkdir()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    features = Features(event=SPEC, target=SPEC)
    parts = []
    for drive in range(drives):
        lengths = tuple(np.random.default_rng(drive).integers(1, LIMIT + 1, windows).tolist())
        events, noise = sequences(lengths, seed=drive), sequences(lengths, seed=100 + drive)
        pairs = [
            Pair(f"drive_{drive}", n * 10**6, (n + 1) * 10**6, as_bf16(x), as_bf16(x @ turn + 0.1 * e))
            for n, (x, e) in enumerate(zip(events, noise, strict=True))
        ]
        parts.append(write_part(folder, f"part-{drive}.parquet", pairs, features))
    publish(folder, parts, features=features, durations={"1s": 10**6}, source={"name": "test"}, rejected=b"")
    return folder


def test_a_store_keeps_only_the_tokens_that_are_there_and_reads_them_exactly(tmp_path: Path) -> None:
    store = PairStore.open(build_store(tmp_path / "store"))
    event, _ = store.read_rows(np.arange(8))
    assert (event.dtype, event.shape) == (np.float32, (8, LIMIT * WIDTH))
    lengths = tuple(np.random.default_rng(0).integers(1, LIMIT + 1, 8).tolist())
    expected = padded([tokens.bfloat16().float() for tokens in sequences(lengths)], LIMIT)
    np.testing.assert_array_equal(event, expected.numpy())
    stored = sum(len(value.as_py()) for value in store.table(0)["event"])
    assert stored == sum(lengths) * WIDTH * 2


def test_features_of_a_sequence_that_no_store_can_hold_are_refused(tmp_path: Path) -> None:
    features = Features(event=SPEC, target=SPEC)
    good = as_bf16(sequences((2,))[0])
    for bad, words in (
        (as_bf16(sequences((6,))[0]), "the event of drive at 0 us has 6 tokens, the store's limit is 5"),
        (good[:-2], "has 62 bytes, no whole number of tokens of 16 × bfloat16"),
        (b"", "has 0 tokens"),
    ):
        with pytest.raises(StoreError, match=words):
            write_part(tmp_path, "part.parquet", [Pair("drive", 0, 1, bad, good)], features)


@pytest.mark.parametrize("strategy", TOKENS)
def test_with_a_mean_start_every_position_begins_at_its_mean_training_target(strategy: str, tmp_path: Path) -> None:
    store = PairStore.open(build_store(tmp_path / "store"))
    cfg = TrainConfig(store=tmp_path / "store", out=tmp_path, strategy=strategy, hidden_dim=8, init="pca")
    split = split_pairs(store.index, cfg.split_config)
    train, val = (
        PairTensors(rows, *(torch.tensor(side) for side in store.read_rows(rows)))
        for rows in (split.train, split.val)
    )
    compute_init(RunContext.of(cfg, store), PairsInMemory(store, train, val))
    adapter = resume_or_init(RunContext.of(cfg, store), None, torch.device("cpu")).objective.adapter.eval()
    mask_BT = mask_of(val.event_BE, WIDTH)
    tokens = train.target_BD.view(-1, LIMIT, WIDTH)
    mean_TW = torch.stack([tokens[:, t][tokens[:, t].any(dim=1)].mean(dim=0) for t in range(LIMIT)])
    expected = mean_TW * mask_BT[..., None]
    torch.testing.assert_close(adapter(val.event_BE).view(-1, LIMIT, WIDTH), expected)
    features = Features(event=SPEC, target=SPEC)
    save_checkpoint(tmp_path / "saved", adapter, metrics={}, provenance={}, features=features)
    loaded = load_checkpoint(tmp_path / "saved")
    replay_golden(loaded)
    torch.testing.assert_close(loaded.adapter(val.event_BE).view(-1, LIMIT, WIDTH), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_sequences_learns_and_is_judged_by_its_tokens(tmp_path: Path) -> None:
    store, uri = build_store(tmp_path / "store"), f"sqlite:///{tmp_path}/mlflow.db"
    cfg = TrainConfig(
        store=store,
        out=tmp_path / "run",
        strategy="token_causal",
        hidden_dim=32,
        num_epochs=8,
        batch_size=4,
        learning_rate=1e-2,
        next_position_weight=0.05,
        tracking_uri=uri,
    )
    trained = run_train(cfg)
    result = run_evaluate(
        EvaluateConfig(store=store, checkpoint=str(cfg.out), out=tmp_path / "report", tracking_uri=uri)
    )
    assert trained["val"]["cos_sim_mean"] > 0.4
    assert result["cos_sim_mean"] > result["baselines"]["before"]["cos_sim_mean"] + 0.3
    for changes, words in (
        ({"centred_weight": 0.1}, "sequences differ in length"),
        ({"strategy": "lowrank", "rank": 4}, "lowrank takes whole features.* token_bottleneck, "),
        ({"strategy": "bottleneck", "init": "pca"}, "bottleneck takes whole features"),
        ({"flip": 0.5}, "augmentation moves images"),
        ({"strategy": "lightweight"}, "lightweight takes whole features.* sequences of different lengths"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_train(cfg.model_copy(update={"out": tmp_path / "other", **changes}))
    assert not (tmp_path / "other").exists()
