"""Starts computed through Ray Data, and runs that are trained from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_app.commands.train import initialization as starts
from ray_app.commands.train.command import run_train
from ray_app.commands.train.context import RunContext
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.initialization import GRID
from ray_app.core.evaluation import AlignmentEvaluator
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import CheckpointError, ConfigError
from ray_app.store.checkpoint import load_checkpoint, load_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config(store: Path, out: Path, strategy: str, **settings: Any) -> TrainConfig:
    small: dict[str, Any] = {"num_epochs": 2, "hidden_dim": 16, "batch_size": 8, "rank": 6, "patch": 4}
    uri = f"sqlite:///{out.parent / 'mlflow.db'}"
    return TrainConfig(store=store, out=out, strategy=strategy, tracking_uri=uri, **(small | settings))


def judged(store: PairStore, checkpoint: Path, rows: np.ndarray) -> torch.Tensor:
    """Cosines at full width, by the one evaluator."""
    adapter = load_checkpoint(checkpoint).adapter
    evaluator = AlignmentEvaluator(adapter, torch.ones(store.feature("target").width), 1 / 255, 1 / 255)
    event, target = store.read_rows(rows)
    return evaluator.add(torch.tensor(event), torch.tensor(target))["after"]


@pytest.fixture(scope="module")
def lowrank(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, dict[str, Any]]:
    out = tmp_path_factory.mktemp("start") / "lowrank"
    cfg = config(small_store, out, "lowrank", num_workers=2, centred_weight=0.2)
    return cfg, run_train(cfg)


@pytest.mark.slow
def test_a_lowrank_run_validates_as_the_evaluator_does(
    lowrank: tuple[TrainConfig, dict[str, Any]],
) -> None:
    cfg, result = lowrank
    store = PairStore.open(cfg.store)
    cos = judged(store, Path(result["checkpoint"]), split_pairs(store.index, cfg.split_config).val)
    assert result["val"]["cos_sim_mean"] == pytest.approx(float(cos.mean()), abs=1e-5)
    assert result["val"]["cos_sim_min"] == pytest.approx(float(cos.min()), abs=1e-5)


@pytest.mark.slow
def test_a_start_through_ray_data_is_that_of_a_singular_value_decomposition(
    lowrank: tuple[TrainConfig, dict[str, Any]],
) -> None:
    cfg, _ = lowrank
    store = PairStore.open(cfg.store)
    split = split_pairs(store.index, cfg.split_config)
    start, about = load_training_state(cfg.folder / "init")
    assert about["store"] == store.fingerprint
    event, target = store.read_rows(split.train)
    for side, stored in (("event", event), ("target", target)):
        x = stored / 255
        _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
        np.testing.assert_allclose(start[f"{side}_mean"], x.mean(0), atol=1e-6)
        np.testing.assert_allclose(start[f"{side}_scale"], s[:6] / len(x) ** 0.5, rtol=1e-3)
        overlap = np.abs(np.sum(start[f"{side}_basis"].numpy() * vt[:6].T, axis=0))
        np.testing.assert_allclose(overlap[:3], 1.0, atol=1e-3)


@pytest.mark.slow
def test_another_run_takes_a_start_over_and_one_of_other_pairs_is_refused(
    lowrank: tuple[TrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    cfg, _ = lowrank
    store = PairStore.open(cfg.store)
    given = {"init_from": cfg.folder / "init"}

    def context(strategy: str, **settings: Any) -> RunContext:
        return RunContext.of(config(Path(cfg.store), tmp_path / "run", strategy, **settings), store)

    whole, lower = (starts.load_init(context("lowrank", rank=n, **given)) for n in (6, 4))
    for side in ("event", "target"):
        assert lower[f"{side}_basis"].equal(whole[f"{side}_basis"][:, :4])
        assert lower[f"{side}_scale"].equal(whole[f"{side}_scale"][:4])
    for changes, words in (
        ({"rank": 7}, r"rank 6, --rank is 7"),
        ({"split_seed": 1}, "other training pairs"),
    ):
        with pytest.raises(ConfigError, match=words):
            starts.load_init(context("lowrank", **given, **changes))
    nothing = context("lowrank", init_from=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        starts.load_init(nothing)


@pytest.mark.slow
def test_ridge_is_solved_once_and_is_no_worse_on_validation_than_the_mean_target(
    small_store: Path, tmp_path: Path
) -> None:
    cfg = config(small_store, tmp_path / "ridge", "ridge", num_epochs=5)
    result = run_train(cfg)
    assert (result["epochs"], result["parameters"]) == (1, 0)
    store = PairStore.open(small_store)
    split = split_pairs(store.index, cfg.split_config)
    chosen = load_training_state(cfg.folder / "init")[1]["mean_cosine_on_validation"]
    assert result["val"]["cos_sim_mean"] == pytest.approx(max(chosen.values()), abs=1e-5)
    _, target = (torch.tensor(side) / 255 for side in store.read_rows(split.val))
    mean = torch.tensor(store.read_rows(split.train)[1] / 255).mean(0).float()
    baseline = torch.nn.functional.cosine_similarity(mean[None], target).mean()
    assert result["val"]["cos_sim_mean"] > float(baseline) - 1e-3


def test_a_last_ridge_holds_all_pairs_at_the_regularisation_that_validation_chose(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(small_store, tmp_path / "first", "ridge")
    last = config(small_store, tmp_path / "last", "ridge", train_on_val=True)
    store = PairStore.open(small_store)

    def begin(cfg: TrainConfig) -> np.ndarray:
        context = RunContext.of(cfg, store)
        split = context.split
        train, val = (
            PairTensors(rows, *(torch.tensor(side) for side in store.read_rows(rows)))
            for rows in (split.train, split.val)
        )
        starts.compute_init(context, starts.PairsInMemory(store, train, val))
        return split.train

    begin(first)
    everyone = begin(last)
    chosen, (start, about) = (load_training_state(cfg.folder / "init") for cfg in (first, last))
    cosines = {float(key): cos for key, cos in about["mean_cosine_on_validation"].items()}
    assert list(cosines) == list(GRID)
    assert about["mean_cosine_on_validation"] == pytest.approx(chosen[1]["mean_cosine_on_validation"], abs=1e-5)
    event = torch.tensor(store.read_rows(everyone)[0] / 255).double()
    assert len(event) > len(chosen[0]["event_pairs"])
    kernel = (event - start["event_mean"]) @ (event - start["event_mean"]).T
    best = max(cosines, key=lambda relative: cosines[relative])
    expected = torch.linalg.inv(kernel + best * kernel.diagonal().mean() * torch.eye(len(event)))
    torch.testing.assert_close(start["inverse"].double(), expected, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(starts, "split_pairs", lambda *words: split_pairs(*words).without_validation())
    with pytest.raises(ConfigError, match="regularisation on the validation part, which is empty"):
        begin(last.model_copy(update={"out": str(tmp_path / "none")}))


@pytest.mark.slow
def test_conv_learns_with_augmentation_on_two_workers(small_store: Path, tmp_path: Path) -> None:
    cfg = config(
        small_store, tmp_path / "conv", "conv", num_workers=2, flip=0.5, shift=0.1, schedule="cosine", num_epochs=6
    )
    result = run_train(cfg)
    store = PairStore.open(small_store)
    split = split_pairs(store.index, cfg.split_config)
    cos = judged(store, Path(result["checkpoint"]), split.val)
    assert result["val"]["cos_sim_mean"] == pytest.approx(float(cos.mean()), abs=1e-5)
    assert result["train"]["loss"] < 0.1


@pytest.mark.parametrize(
    ("strategy", "settings", "words"),
    [
        ("conv", {"init": "pca"}, "--init pca sets full-width layers, and conv has none"),
        ("ridge", {"init": "pca"}, "one of: lightweight, lightweight_reference"),
        ("lowrank", {"rank": 700}, r"--rank \(700\) is not below the number of training pairs"),
        ("conv", {"patch": 5}, r"--patch \(5\) must divide"),
        ("token_wide", {}, r"token_wide works on sequences .* shape \[3, 16, 16\]"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    small_store: Path, tmp_path: Path, strategy: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_train(config(small_store, tmp_path / "run", strategy, **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mse_weight": 0, "cosine_weight": 0}, "--centred-weight, .*are all 0"),
        ({"accept_weight": 1.0, "accept_thetas": ()}, "needs a θ"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(store=tmp_path, out=tmp_path, **settings)
