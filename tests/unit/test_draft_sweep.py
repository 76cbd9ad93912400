"""Sweeps of drafters: their settings, what is refused before anything starts, and tests on drives that are new."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_drafting import SPACE, draft_sweep_file, save_part, write_work
from sweeps import sweep_config

from ray_app.commands.demo.draft_training import TEST
from ray_app.commands.evaluate.drafting import draft_context, draft_result, evaluate_drafter, pairs_to_test_on
from ray_app.commands.train.progress import validation_line
from ray_app.commands.train.state import resume_or_init
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.progress import trial_cells
from ray_app.commands.tune.space import needed_weights, read_space, train_config
from ray_app.commands.tune.trials import Trial
from ray_app.config.base import SplitFlags
from ray_app.config.evaluate import EvaluationFlags
from ray_app.config.train import DraftTrainConfig
from ray_app.config.tune import TOKENS
from ray_app.core.adapters.drafting import EventTokens
from ray_app.core.promotion_policy import draft_verdict
from ray_app.core.speculative.draft_evaluation import DraftEvaluation
from ray_app.errors import CheckpointError, ConfigError
from ray_app.store.checkpoint import Checkpoint, load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_work(tmp_path_factory.mktemp("work"))


@pytest.fixture
def sweep(work: Path, tmp_path: Path) -> Callable[..., Path]:
    return partial(draft_sweep_file, tmp_path, work)


def test_a_sweep_of_drafters_has_their_settings(sweep: Callable[..., Path]) -> None:
    cfg = sweep_config(sweep(space={**SPACE, "lk_weight": {"log": [0.1, 1.0]}, "learning_rate": [1e-3, 1e-2]}))
    space = read_space(cfg)
    assert set(space) == {"kl_weight", "cosine_weight", "rank", "lk_weight", "learning_rate"}
    trial = train_config(cfg, {**needed_weights(cfg, space), "rank": 2})
    assert isinstance(trial, DraftTrainConfig)
    assert (trial.kl_weight, trial.cosine_weight, trial.lk_weight, trial.rank) == (1.0, 1.0, 0.1, 2)
    context = SweepContext.open(cfg)
    assert {run.cfg.rank for run in context.extreme} == {2, 3}


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        ({"objective": "lift"}, ConfigError, "trials of event_tokens .* set `objective: tokens_per_target_pass`"),
        ({"base_strategy": "lowrank"}, ConfigError, "needs a drafter's distributions, and lowrank has none"),
        ({"base_strategy": None}, ConfigError, "the default strategy has none; name one of early_exit, eagle_head"),
        ({"secondary_objective": "latency_ms"}, ConfigError, "latency_ms is that of an adapter"),
        ({"base_drafter": None}, ConfigError, "--strategy event_tokens and --drafter none do not go together"),
        ({"base_drafter": "nowhere"}, CheckpointError, "nowhere is not a folder; name a checkpoint, or the folder"),
        ({"base_projector_start": "none"}, CheckpointError, "none cannot be used"),
        (
            {"space": {**SPACE, "contrastive_weight": [0.0, 1.0]}},
            ConfigError,
            "contrastive_weight changes nothing in",
        ),
        ({"space": {**SPACE, "patch": [8, 16]}}, ConfigError, "patch changes nothing in event_tokens"),
        ({"space": {**SPACE, "rank": [3, 9]}}, ConfigError, r"--rank \(9\) is above the 3 directions of"),
        ({"space": {"rank": [2, 3]}}, ConfigError, r"--kl-weight, .* are all 0"),
        ({"val_share": 0.9}, ConfigError, r"trained on \d of the 6 validation pairs.*share 0.01, val_share 0.1"),
        ({"test_store": None, "test_share": 0.9}, ConfigError, r"trained on \d of the 6 test pairs, .* other drives"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_starts(
    lines: dict[str, Any], error: type[Exception], words: str, sweep: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=words):
        SweepContext.open(sweep_config(sweep(**lines)))


def test_rows_without_distributions_are_refused_by_name(sweep: Callable[..., Path], small_store: Path) -> None:
    with pytest.raises(ConfigError, match="holds no answers of a target with their distributions"):
        SweepContext.open(sweep_config(sweep(store=str(small_store))))
    with pytest.raises(ConfigError, match="test_store is for drafters"):
        sweep_config(sweep(objective="lift", base_strategy="lowrank"))


def test_a_smaller_rank_starts_at_the_first_directions(sweep: Callable[..., Path]) -> None:
    cfg = sweep_config(sweep())
    context = SweepContext.open(cfg)
    two, three = (
        resume_or_init(context.run({"rank": rank, "kl_weight": 1.0}), None, CPU).objective.adapter for rank in (2, 3)
    )
    assert isinstance(two, EventTokens)
    assert isinstance(three, EventTokens)
    for name in ("event_basis", "target_basis", "event_scale", "target_scale"):
        assert torch.equal(getattr(two.map, name), getattr(three.map, name)[..., :2])
    assert torch.equal(two.map.target_mean, three.map.target_mean)


@pytest.fixture
def events(sweep: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    cfg = train_config(sweep_config(sweep()), {"kl_weight": 1.0, "rank": 3})
    return load_checkpoint(save_part(tmp_path / "events", cfg))


def flags(**values: Any) -> EvaluationFlags:
    return EvaluationFlags(**({"test_share": 0.01, "batch_size": 4} | values))


def test_a_part_is_tested_on_drives_that_neither_it_nor_its_drafter_knows(work: Path, events: Checkpoint) -> None:
    own = draft_context(flags(), None, events)
    assert len(own.split.test) == 2
    other = draft_context(flags(), str(work / TEST), events)
    assert len(other.split.test) == len(other.store.index) == 6
    with pytest.raises(ConfigError, match=r"was trained on .* --test-share 0.01 --val-share 0.1"):
        draft_context(flags(test_share=0.4), None, events)
    split = SplitFlags(test_share=0.01)
    store, rows = pairs_to_test_on(split, None, own.store)
    assert (store, rows.tolist()) == (own.store, own.split.test.tolist())
    assert len(pairs_to_test_on(split, str(work / TEST), own.store)[1]) == 6


def test_tokens_per_target_pass_and_its_baselines_do_not_depend_on_batches(work: Path, events: Checkpoint) -> None:
    context = draft_context(flags(), str(work / TEST), events)
    found = evaluate_drafter(context, events)
    again = evaluate_drafter(draft_context(flags(batch_size=1), str(work / TEST), events), events)
    assert set(found.baselines) == {"no_drafter", "mean_tokens", "other_events"}
    assert np.array_equal(found.tokens_N, again.tokens_N)
    assert np.array_equal(found.passes_N, again.passes_N)
    assert all(np.array_equal(found.baselines[name], again.baselines[name]) for name in found.baselines)
    result = draft_result(context, events, found)
    assert result[TOKENS] == found.tokens_N.sum() / found.passes_N.sum() > 1.0
    assert result["baselines"]["no_drafter"] == 1.0
    assert result["split"]["test_pairs_trained_on"] == 0
    with pytest.raises(CheckpointError, match="is part of a drafter, and makes no target features"):
        events.require(events.features)  # nothing serves it
    drafter = load_checkpoint(work / "exit")
    of_exit = evaluate_drafter(draft_context(flags(), str(work / TEST), drafter), drafter)
    assert set(of_exit.baselines) == {"no_drafter"}


def test_gains_are_paired_and_the_best_baseline_is_the_one_with_the_fewest_passes() -> None:
    tokens_N = np.array([30.0, 30.0, 60.0, 60.0])
    slow_N = np.array([10.0, 12.0, 30.0, 31.0])
    drives = ("a", "b", "c", "d")
    each = DraftEvaluation(drives, tokens_N, slow_N / 2, np.ones(4), {"no_drafter": tokens_N, "other": slow_N})
    gain = each.gain_over(slow_N)
    assert gain["difference"] == pytest.approx(180 / 83)
    low, high = gain["interval95"]
    assert 60 / 31 <= low <= 180 / 83 <= high <= 30 / 10, "half of the passes: the gain is the slower one's rate"
    metrics = each.metrics()
    assert (metrics["best_baseline"], metrics["gain"]) == ("other", pytest.approx(180 / 83))
    assert metrics["interval95"]["gain"] == pytest.approx(gain["interval95"])
    assert each.gain_over(each.passes_N) == {"difference": 0.0, "interval95": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("interval", "own", "champions", "code"),
    [
        ((0.1, 0.5), 0.4, 0.1, "promoted"),
        ((-0.1, 0.5), 0.4, 0.1, "no_gain"),
        ((0.05, 0.5), 0.4, 0.1, "no_gain"),
        ((0.1, 0.5), -0.1, 0.1, "beaten_by_baseline"),
        ((0.1, 0.5), -0.1, -0.2, "promoted"),
        (None, 0.4, 0.1, "other_test_set"),
    ],
)
def test_a_champion_is_replaced_only_where_the_paired_interval_is_above_the_wanted_gain(
    interval: tuple[float, float] | None, own: float, champions: float, code: str
) -> None:
    challenger, champion = ({TOKENS: 5.0, "gain": gain, "best_baseline": "mean_tokens"} for gain in (own, champions))
    gain = interval and {"difference": 0.3, "interval95": interval}
    assert draft_verdict(challenger, champion, gain, min_gain=0.05).code == code
    forced = draft_verdict(challenger, champion, gain, min_gain=0.05, force=True)
    assert forced.promoted
    assert forced.forced == (code != "promoted")
    assert draft_verdict(challenger, None, None).code == "first"
    assert ("does not beat" in draft_verdict(challenger, None, None).reason) == (own <= 0)
    assert draft_verdict(challenger, champion, gain, is_champion=True).code == "already_champion"


def test_a_trial_is_compared_and_shown_by_its_tokens_and_these_are_no_percentage() -> None:
    val = {"cosine_accept_rate": {"0.80": 0.5}, "cos_sim_mean": 0.9}
    lines = [
        {"kind": "epoch", "epoch": n, "time": float(n), "val": {**val, "loss": loss, TOKENS: tokens}}
        for n, (loss, tokens) in enumerate([(2.0, 4.0), (1.0, 3.5), (3.0, 5.0)], 1)
    ]
    trial = Trial(0, "t", {"rank": 2}, 10).after(lines, TOKENS)
    assert (trial.objective, trial.shown_objective, trial.best_epoch, trial.lift) == (3.5, 3.5, 2, None)
    cells = trial_cells(trial, drafting=True)
    assert (cells["tokens per target pass"], cells["cosine"]) == ("3.500", "0.900")
    assert not [text for text in cells.values() if "%" in text]


def test_a_trainings_line_of_an_epoch_has_tokens_where_there_are_any() -> None:
    val = {"loss": 1.0, "cos_sim_mean": 0.5, "cosine_accept_rate": {"0.80": 0.25}}
    assert validation_line({**val, TOKENS: 4.321}).endswith("25.0% 4.32 tokens per target pass")
    assert "tokens" not in validation_line(val)
