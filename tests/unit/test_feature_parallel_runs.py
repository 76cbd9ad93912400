"""Runs of workers that divide the features, over gloo: equal to one worker's, resumed, resumed by other workers."""

import re
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from training_processes import train_here, train_on_processes

from ray_app.commands.train.context import RunContext, open_run_context
from ray_app.commands.train.parallelism import choose_division
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.errors import ConfigError
from ray_app.runs.event_log import entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import load_checkpoint, load_training_state, replay_golden
from ray_app.store.pair_store import PairStore

Config = Callable[..., TrainConfig]


@pytest.fixture
def config(small_store: Path, tmp_path: Path) -> Config:
    def make(name: str, **settings: Any) -> TrainConfig:
        small = {"strategy": "lightweight", "num_epochs": 2, "hidden_dim": 6, "batch_size": 16}
        return TrainConfig(store=small_store, out=tmp_path / name, **(small | settings))

    return make


def of_kind(cfg: TrainConfig, kind: str) -> list[dict[str, Any]]:
    return [line for line in entries(cfg.folder) if line["kind"] == kind]


def saved(cfg: TrainConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and training state of the newest checkpoint, which verifies and answers as it did."""
    run = RunDir(cfg.folder)
    name = run.latest_resumable()
    assert name is not None
    checkpoint = load_checkpoint(run.checkpoint(name))
    replay_golden(checkpoint)
    return checkpoint.adapter.state_dict(), load_training_state(run.state(name))[0]


def bytes_of(cfg: TrainConfig) -> list[str]:
    """SHA-256 of all numbers of the newest checkpoint."""
    run = RunDir(cfg.folder)
    name = run.latest_resumable()
    assert name is not None
    folders = run.checkpoint(name), run.state(name)
    return [sha256_file(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def assert_equal_runs(found: TrainConfig, expected: TrainConfig) -> None:
    """Losses to 5e-6 (float32 sums in another order, on any processor), accepted pairs equal, weights to 1e-5."""
    steps, epochs = ([of_kind(cfg, kind) for cfg in (found, expected)] for kind in ("step", "epoch"))
    assert len(steps[0]) == len(steps[1])
    for one, other in zip(*steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-6)
        assert one["pairs"] == other["pairs"]
    for one, other in zip(*epochs, strict=True):
        assert one["val"]["loss"] == pytest.approx(other["val"]["loss"], rel=5e-6)
        for key in ("pairs", "cosine_accept_rate"):
            assert one["val"][key] == other["val"][key]
    for own, others in zip(saved(found), saved(expected), strict=True):
        assert list(own) == list(others) or set(own) == set(others)
        for name, value in others.items():
            torch.testing.assert_close(own[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (3, {"val_every_steps": 2}),
        (2, {"strategy": "lightweight_reference", "accept_weight": 0.5, "depth": 2}),
        (2, {"strategy": "bottleneck", "contrastive_weight": 0.5}),
        (2, {"strategy": "linear", "mse_space": "unit"}),
    ],
    ids=["three", "reference", "contrastive", "linear"],
)
def test_workers_that_divide_the_features_train_and_save_as_one_does(
    config: Config, workers: int, settings: dict[str, Any]
) -> None:
    alone, divided = config("one", **settings), config("divided", num_workers=workers, **settings)
    train_here(alone)
    assert RunContext.of(divided, PairStore.open(divided.store)).division.parallelism == "feature"
    train_on_processes(divided)
    assert_equal_runs(divided, alone)
    judged = [[line["val"]["pairs"] for line in of_kind(cfg, "validation")] for cfg in (divided, alone)]
    assert judged[0] == judged[1]


@pytest.mark.parametrize(("nodes", "workers"), [((2, 2), 4), ((4, 2), 6)], ids=["2 and 2", "4 and 2"])
def test_workers_of_a_node_divide_the_features_and_nodes_the_pairs(
    config: Config, nodes: tuple[int, ...], workers: int
) -> None:
    """A mesh of two columns; where a node has more workers than another, it holds two of the lines."""
    settings = {"contrastive_weight": 0.3, "num_epochs": 1}
    alone, mesh = config("one", **settings), config("mesh", num_workers=workers, parallelism="mesh", **settings)
    train_here(alone)
    train_on_processes(mesh, nodes=nodes)
    assert_equal_runs(mesh, alone)


def test_killed_and_resumed_by_as_many_workers_a_run_ends_with_the_same_bytes(config: Config) -> None:
    """Killed in the second epoch, a step after a save within it."""
    often = {"num_workers": 2, "checkpoint_every": 2, "contrastive_weight": 0.1}
    whole, killed = config("whole", **often), config("killed", **often)
    train_on_processes(whole)
    with pytest.raises(BrokenProcessPool):
        train_on_processes(killed, die_at_step=5)
    assert RunDir(killed.folder).latest_resumable() == "epoch_0001_step_00000004"
    train_on_processes(killed)
    assert bytes_of(killed) == bytes_of(whole)
    assert [line["global_step"] for line in of_kind(killed, "step")] == [*range(1, 7)]


@pytest.mark.parametrize("then", [{"num_workers": 2}, {"num_workers": 3, "parallelism": "data"}, {"num_workers": 1}])
def test_a_run_is_resumed_by_other_workers_whichever_way_they_divide_it(config: Config, then: dict[str, Any]) -> None:
    alone, divided = config("one", num_epochs=3), config("divided", num_workers=3, num_epochs=1)
    train_here(alone)
    train_on_processes(divided)
    rest = config("divided", num_epochs=3, **then)
    train_on_processes(rest) if rest.max_workers > 1 else train_here(rest)
    assert_equal_runs(rest, alone)


def test_a_data_parallel_run_is_resumed_by_workers_that_divide_the_features(config: Config) -> None:
    alone = config("one")
    train_here(alone)
    train_on_processes(config("divided", num_workers=2, parallelism="data", num_epochs=1))
    rest = config("divided", num_workers=2, parallelism="feature")
    train_on_processes(rest)
    assert_equal_runs(rest, alone)


@pytest.mark.parametrize(
    ("settings", "way", "words"),
    [
        (
            {},
            "feature",
            "^2 workers divide the features of every pair: .* MB a step from each .the pairs of a batch",
        ),
        ({"parallelism": "data"}, "data", "divide the pairs of a batch: .* MB"),
        (
            {"parallelism": "mesh"},
            "mesh",
            "features of every pair inside each node, and the pairs of a batch over nodes",
        ),
        ({"strategy": "conv"}, "data", "conv needs whole features"),
        ({"flip": 0.5}, "data", "change whole images"),
        ({"bf16_gradients": True}, "data", "--bf16-gradients"),
        ({"shard_memory_gib": 1e-5}, "data", "--shard-memory-gib is 1e-05"),
        ({"num_workers": 15, "batch_size": 128, "hidden_dim": 4096}, "feature", "15 workers"),
        ({"num_workers": 97, "batch_size": 97}, "data", "768 and 768 columns give 97 workers less than 8 each, 96"),
        (
            {"strategy": "bottleneck", "hidden_dim": 4, "batch_size": 2000},
            "data",
            r"the features of every pair: 0\.10 MB",
        ),
    ],
)
def test_the_way_is_chosen_by_what_a_step_sends_and_the_reason_is_a_sentence(
    config: Config, settings: dict[str, Any], way: str, words: str
) -> None:
    cfg = config("run", **({"num_workers": 2} | settings))
    division = RunContext.of(cfg, PairStore.open(cfg.store)).division
    assert division.parallelism == way
    assert re.search(words, division.reason), division.reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "lowrank"}, "lowrank needs whole features"),
        ({"strategy": "conv"}, "conv needs whole features"),
        ({"event_noise": 0.1}, "change whole images"),
        ({"shard_memory_gib": 1e-5}, "--shard-memory-gib is 1e-05"),
        ({"num_workers": 97}, "768 and 768 columns give 97 workers less than 8 each, 96 at most"),
        ({"num_workers": "2:97"}, "give 97 workers less than 8 each, 96 at most"),
    ],
)
def test_features_that_cannot_be_divided_are_refused_with_the_reason(
    config: Config, settings: dict[str, Any], words: str
) -> None:
    cfg = config("run", **({"num_workers": 2, "parallelism": "feature"} | settings))
    with pytest.raises(ConfigError, match=rf"--parallelism feature: .*{words}.*; leave it out"):
        RunContext.of(cfg, PairStore.open(cfg.store))


def resumed(config: Config, recorded: dict[str, Any], **now: Any) -> RunContext:
    """Facts of a resumed run that has recorded these settings; None: it knew no such setting."""
    began = config("run", num_workers=2)
    context = RunContext.of(began, PairStore.open(began.store))
    run = RunDir(began.folder)
    settings = {**context.recorded, **recorded}
    metadata = context.metadata("run", None)
    run.create({**metadata, "config": {name: value for name, value in settings.items() if value is not None}})
    return open_run_context(config("run", **({"num_workers": 2, "resume": began.out} | now)))


WARNING = "parallelism changed: the run continues, but its weights will not be byte-identical"


@pytest.mark.parametrize(
    ("recorded", "now", "warned"),
    [
        ({"parallelism": "auto"}, {}, False),
        ({"parallelism": None}, {}, True),
        ({"parallelism": None}, {"parallelism": "data"}, False),
        ({"parallelism": None}, {"parallelism": "feature"}, True),
        ({"parallelism": None, "num_workers": "1"}, {"num_workers": 1}, False),
        ({"parallelism": "data"}, {"parallelism": "feature"}, True),
    ],
)
def test_a_run_that_would_be_divided_otherwise_than_before_warns(
    config: Config, recorded: dict[str, Any], now: dict[str, Any], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed(config, recorded, **now)
    assert (WARNING in capsys.readouterr().err) == warned


def test_a_resume_in_another_precision_is_refused_whatever_else_it_changes(config: Config) -> None:
    with pytest.raises(ConfigError, match="but precision was 'fp32', is 'bf16' now; leave that out"):
        resumed(config, {"parallelism": "data"}, parallelism="feature", precision="bf16")


def test_the_bytes_of_a_step_are_those_of_the_arithmetic(config: Config) -> None:
    """At the reference's size: 618 MB of gradients, or 0.13 MB of hidden activations and sums."""
    cfg = config("run", num_workers=2, batch_size=32)
    adapter = AdapterConfig("lightweight", 150_528, 150_528)
    store = PairStore.open(cfg.store)
    division = choose_division(cfg, STRATEGIES["lightweight"], adapter, store, 100, 154_556_416)
    assert "each (the pairs of a batch: 618.23 MB" in division.reason
    assert "every pair: 0.13 MB" in division.reason
