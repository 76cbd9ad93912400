"""Figures of a sweep's page: every trial with an objective is in them, and no two words touch."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from pages import assert_opens

from ray_app.commands.tune.report import (
    history_figure,
    importance_figure,
    pareto_figure,
    slice_figures,
)
from ray_app.commands.tune.space import Space, complete, draws, study_of
from ray_app.commands.tune.trials import Trial, scored
from ray_app.reports.html import Figure, Section, page

SPACE: Space = {
    "hidden_dim": CategoricalDistribution((64, 128, 256, 512)),
    "mse_weight": FloatDistribution(0.1, 30.0, log=True),
    "durations": CategoricalDistribution(('["1s"]', '["1s", "2s"]')),
    "learning_rate": FloatDistribution(1e-4, 3e-3, log=True),
    "strategy": CategoricalDistribution(("lightweight", "lightweight_reference", "bottleneck")),
    "dropout": FloatDistribution(0.0, 0.4, step=0.1),
    "accept_weight": CategoricalDistribution((0.0, 0.1, 0.5)),
    "cosine_weight": FloatDistribution(0.03, 3.0, log=True),
}
NAME = "accepted at 0.80, %"


def trials_of(space: Space, num: int = 12) -> list[Trial]:
    """Random trials, the last of them without an objective."""
    rng = np.random.default_rng(0)
    settings = list(islice(draws(space, 0), num))
    trials = [
        Trial(n, f"t{n}", setting, int(10 ** rng.uniform(4, 8)), objective=float(rng.uniform(0.4, 0.7)), ended_at=1.0)
        for n, setting in enumerate(settings)
    ]
    return [*trials, Trial(num, "failed", settings[0], 1, status="failed", ended_at=1.0)]


def test_the_study_has_every_trial_with_an_objective_in_percent_and_the_second_objective() -> None:
    trials = trials_of(SPACE)
    study = study_of(complete(trials[:-1]), SPACE, "parameters")
    assert [trial.values for trial in study.trials] == [
        [100 * (trial.objective or 0), trial.parameters] for trial in trials[:-1]
    ]
    assert study.trials[0].params["hidden_dim"] == trials[0].setting["hidden_dim"]
    assert {tuple(trial.setting["durations"]) for trial in trials} == {("1s",), ("1s", "2s")}
    assert {trial.params["durations"] for trial in study.trials} == {'["1s"]', '["1s", "2s"]'}
    assert len(scored(trials)) == len(trials) - 1


@pytest.mark.parametrize("num_settings", [1, 8])
def test_no_two_words_of_a_figure_touch_whatever_was_tried(num_settings: int, tmp_path: Path) -> None:
    space = dict(list(SPACE.items())[:num_settings])
    trials = complete(trials_of(space)[:-1])
    study = study_of(trials, space)
    figures = [
        history_figure(study, {"all": 0.55}, NAME, 3),
        history_figure(study, {"1s": 0.639, "2s": 0.639, "4s": 0.63}, NAME, 0),
        importance_figure({name: 1 / (n + 1.5) for n, name in enumerate(space)}),
        slice_figures(study, space, NAME),
        pareto_figure(trials, space, "parameters", NAME, scored(trials)[0]),
    ]
    shown = [Section("figure", [Figure(figure, "a figure", "caption")]) for figure in figures]
    (tmp_path / "figures.html").write_text(page("figures", "figures", "", [], shown), encoding="utf-8")
    assert_opens(tmp_path / "figures.html")


def test_equal_trials_and_a_solved_adapter_without_parameters_have_figures() -> None:
    trials = complete([Trial(n, f"t{n}", {"hidden_dim": 64}, 0, objective=0.5, ended_at=1.0) for n in range(2)])
    space: Space = {"hidden_dim": SPACE["hidden_dim"]}
    assert slice_figures(study_of(trials, space), space, NAME).startswith("<svg")
    assert pareto_figure(trials, space, "parameters", NAME, trials[0]).startswith("<svg")
    history = history_figure(study_of(trials, space), {"all": 0.4}, NAME, 1)
    assert "<title>best trial: 1.000, 50.00</title>" in history, (
        "of equal trials the one that is named best has the star"
    )
