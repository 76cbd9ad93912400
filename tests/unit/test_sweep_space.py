"""The settings that a sweep searches: its file, its flags, and what is proposed next. Without Ray."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sweeps import spec_file, sweep_config

from ray_app import cli
from ray_app.commands.tune.space import Space, bounds, draws, propose, read_space, train_config
from ray_app.commands.tune.trials import Setting, Status, Trial
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "tune_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_sweep_that_is_shipped_can_be_read_and_says_what_it_is_for(path: Path) -> None:
    assert read_space(sweep_config(path))
    header = path.read_text().partition("\nstore:")[0]
    assert all(word in header for word in ("cost", "command", "measured")), "purpose, cost, command, measured outcome"


def test_the_shipped_sweeps_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {"smoke", "lightweight", "strategies", "durations", "tokens", "losses"}


def test_every_strategy_but_the_widest_and_every_loss_is_in_a_shipped_space() -> None:
    spaces = [read_space(sweep_config(path)) for path in CONFIGS]
    strategies = {each for space in spaces if "strategy" in space for each in bounds(space["strategy"])}
    assert strategies == set(STRATEGIES) - {"linear"}, "it would have 22.7 billion weights on images"
    losses = {name for name in TrainConfig.model_fields if name.endswith("_weight")}
    assert losses <= {name for space in spaces for name in space}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"spce": {}}, "unknown key 'spce'"),
        ({"space": {}}, "the space is empty"),
        ({"space": {"hidden": [1]}}, "'hidden' is not a setting of `ray-app train`"),
        ({"space": {"hidden_dim": []}}, "has no values"),
        ({"space": {"hidden_dim": 8}}, "must be a list of values"),
        ({"space": {"learning_rate": {"log": [0.1, 0.01]}}}, "is not a range"),
        ({"space": {"learning_rate": {"log": ["1e-4", 0.01]}}}, "1.0e-4 is a number in YAML"),
        ({"space": {"strategy": ["lightweight", "transformer"]}}, "strategy: .*transformer"),
        ({"space": {"dropout": {"uniform": [0.0, 1.5]}}}, "dropout: .*less than 1"),
        ({"space": {"seed": [1, 2]}}, "luck"),
        ({"base": {"out": "x"}}, "a key of its own"),
        ({"base": {"hidden_dim": 8}}, "under both"),
        ({"base": {"epochs": 8}}, "'epochs' is not a setting"),
        ({"search_alg": "grid", "space": {"dropout": {"uniform": [0.0, 0.5]}}}, "needs lists"),
        ({"search_alg": "bohb"}, "search_alg .*'grid', 'random' or 'optuna'"),
        ({"scheduler": "pbt"}, "scheduler .*'none' or 'asha'"),
        ({"max_trials": 0}, "max_trials"),
        ({"space": {"rank": [4, 8]}, "base": {"strategy": "lightweight"}}, "rank changes nothing in lightweight,"),
        ({"space": {"patch": [4, 8], "strategy": ["lightweight", "lowrank"]}}, "patch changes nothing in light"),
        ({"space": {"depth": [1, 2]}, "base": {"strategy": "linear"}}, "depth changes nothing in linear"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(lines: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_space(sweep_config(spec_file(tmp_path, **lines)))


def test_a_sweep_without_a_store_says_how_to_name_one(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("space: {hidden_dim: [8]}\n")
    with pytest.raises(ConfigError, match="--store stores/scenes"):
        parsed(str(path))
    with pytest.raises(ConfigError, match="--out sweeps/first"):
        parsed(str(path), "--store", "A")
    with pytest.raises(ConfigError, match=r"ray-app tune tune_configs/smoke\.yaml starts one"):
        parsed()


def parsed(*words: str) -> TuneConfig:
    """Settings as the command line gives them."""
    cfg = cli.parse("tune", cli.COMMANDS["tune"], None, words)
    assert isinstance(cfg, TuneConfig)
    return cfg


def test_every_key_of_the_file_but_the_mappings_is_a_flag_that_overrides_it(tmp_path: Path) -> None:
    file = str(spec_file(tmp_path, base={"batch_size": 4}, max_trials=9, use_gpu=False, scheduler="asha"))
    cfg = parsed(file, "--use-gpu", "--scheduler", "none", "--store", "A")
    assert (cfg.store, cfg.out, cfg.use_gpu, cfg.scheduler, cfg.max_trials) == ("A", "O", True, "none", 9)
    assert (cfg.base, cfg.space) == ({"batch_size": 4}, {"hidden_dim": [8, 16]})
    assert cli.parse("tune", cli.COMMANDS["tune"], Path(file), []) == parsed(file)
    with pytest.raises(ConfigError, match="has no flag --space"):
        parsed(file, "--space", "x")
    with pytest.raises(ConfigError, match=r"other\.yaml are two files; name one"):
        cli.parse("tune", cli.COMMANDS["tune"], Path("other.yaml"), [file])


def test_any_setting_of_train_may_be_searched(tmp_path: Path) -> None:
    space = {"mse_space": ["raw", "unit"], "plateau_patience": [1, 2], "durations": [["1s"], ["1s", "2s"]]}
    cfg = sweep_config(spec_file(tmp_path, space=space))
    train = train_config(cfg, {"durations": ["1s", "2s"], "mse_space": "unit"})
    assert (train.durations, train.mse_space) == (("1s", "2s"), "unit")
    assert bounds(read_space(cfg)["durations"]) == [["1s"], ["1s", "2s"]]


def test_a_setting_that_one_adapter_of_the_space_has_may_be_searched(tmp_path: Path) -> None:
    for space in ({"depth": [1, 2]}, {"rank": [4, 8], "init": ["random", "pca"]}):
        assert read_space(sweep_config(spec_file(tmp_path, space=space)))
    assert read_space(sweep_config(spec_file(tmp_path, space={"patch": [4, 8], "strategy": ["conv", "lightweight"]})))


SPACE: Space = {
    "hidden_dim": IntDistribution(8, 64, log=True),
    "dropout": FloatDistribution(0.0, 0.5, step=0.1),
    "strategy": CategoricalDistribution(["lightweight", "bottleneck"]),
}


def settings(search_alg: str, seed: int = 0, second: str | None = None) -> TuneConfig:
    """Settings of a search; the space is passed apart."""
    return TuneConfig.model_validate(
        {"store": "S", "out": "O", "search_alg": search_alg, "seed": seed, "secondary_objective": second}
    )


def tried(n: int, setting: Setting, status: Status, objective: float | None = None) -> Trial:
    """A trial of so many parameters as its number."""
    ended_at = None if status == "running" else 1.0
    return Trial(n, f"t{n}", setting, 1000 + n, status=status, objective=objective, epochs=3, ended_at=ended_at)


def proposals(search_alg: str, space: Space, seed: int = 0) -> list[Setting]:
    """All proposals until the space is used up."""
    trials: list[Trial] = []
    while setting := propose(settings(search_alg, seed), space, trials):
        trials.append(tried(len(trials), setting, "running"))
    return [trial.setting for trial in trials]


def test_a_grid_is_every_combination_once_in_one_order() -> None:
    space: Space = {"a": CategoricalDistribution([1, 2]), "b": CategoricalDistribution(["x", "y", "z"])}
    found = [tuple(setting.values()) for setting in proposals("grid", space)]
    assert found == [(a, b) for a in (1, 2) for b in ("x", "y", "z")]


def test_random_draws_stay_in_the_space_and_never_repeat_a_choice() -> None:
    for setting in islice(draws(SPACE, 0), 200):
        assert isinstance(setting["hidden_dim"], int)
        assert 8 <= setting["hidden_dim"] <= 64
        assert min(abs(setting["dropout"] - k / 10) for k in range(6)) < 1e-9
    space: Space = {"a": CategoricalDistribution([1, 2]), "b": CategoricalDistribution(["[3]", "[4, 5]"])}
    found = sorted(tuple(setting.values()) for setting in proposals("random", space, 7))
    assert found == [(1, [3]), (1, [4, 5]), (2, [3]), (2, [4, 5])]


def test_optuna_proposes_the_same_after_the_same_record_and_learns_from_it() -> None:
    """Twenty trials that tell it that a wide layer is good: it then proposes wider ones than a random draw does."""

    def record(n: int) -> list[Trial]:
        trials: list[Trial] = []
        for k in range(n):
            setting = propose(settings("optuna"), SPACE, trials)
            assert setting is not None
            trials.append(tried(k, setting, "finished", setting["hidden_dim"] / 64))
        return trials

    first = record(20)
    assert record(20) == first
    later = [propose(settings("optuna", seed), SPACE, first)["hidden_dim"] for seed in range(8)]  # type: ignore[index]
    drawn = [propose(settings("random", seed), SPACE, first)["hidden_dim"] for seed in range(8)]  # type: ignore[index]
    assert np.mean(later) > np.mean(drawn) + 5
    one, two, three = (trial.setting for trial in first[:3])
    states = [tried(0, one, "stopped", 0.1), tried(1, two, "failed"), tried(2, three, "running")]
    assert propose(settings("optuna"), SPACE, states)
    assert propose(settings("optuna", second="parameters"), SPACE, first)
    assert propose(settings("optuna", second="latency_ms"), SPACE, first), "of none is it known"
