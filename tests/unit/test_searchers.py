"""What a search algorithm is given of the trials so far, in Optuna's own terms."""

from collections.abc import Sequence

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from ray_app.commands.tune.space import Space, propose, study_of
from ray_app.commands.tune.trials import Setting, Status, Trial
from ray_app.config.tune import TuneConfig

SPACE: Space = {
    "hidden_dim": CategoricalDistribution((8, 16)),
    "learning_rate": FloatDistribution(1e-6, 1e-1, log=True),
}


def record(status: Status, value: float | None, epochs: int = 3, rate: float = 1e-3) -> Trial:
    setting = {"hidden_dim": 8, "learning_rate": rate}
    ended_at = None if status == "running" else 1.0
    return Trial(0, "t", setting, 7, status=status, objective=value, epochs=epochs, ended_at=ended_at)


def asked(search_alg: str, seed: int, tried: Sequence[Trial]) -> Setting | None:
    lines = {"store": "S", "out": "O", "search_alg": search_alg, "seed": seed}
    return propose(TuneConfig.model_validate(lines), SPACE, tried)


def test_each_trial_is_what_it_was_and_a_stopped_one_is_pruned_with_what_it_had_reached() -> None:
    tried = [record("finished", 0.5), record("stopped", 0.2, 1), record("failed", 0.1), record("running", None)]
    finished, stopped, failed, running = study_of(tried, SPACE).trials
    assert (finished.state, finished.value) == (TrialState.COMPLETE, 50.0)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {1: 20.0})
    assert failed.state == TrialState.FAIL
    assert running.state == TrialState.RUNNING
    (nothing,) = study_of([record("stopped", None, 0)], SPACE).trials
    assert nothing.state == TrialState.FAIL, "it has shown nothing"


def test_with_two_objectives_a_stopped_trial_is_complete_since_optuna_cannot_prune_there() -> None:
    (stopped,) = study_of([record("stopped", 0.2, 1)], SPACE, "parameters").trials
    assert (stopped.state, stopped.values) == (TrialState.COMPLETE, [20.0, 7.0])


def test_what_stopped_trials_had_reached_leads_the_search() -> None:
    """Thirty stopped trials, better the larger the rate: Optuna asks for large ones, and for any without them."""
    rates = [10 ** (-6 + 5 * n / 29) for n in range(30)]
    stopped = [record("stopped", n / 30, 1, rate) for n, rate in enumerate(rates)]
    failed = [record("failed", None, 0, rate) for rate in rates]

    def share_of_large(tried: list[Trial]) -> float:
        settings = [asked("optuna", seed, tried) for seed in range(20)]
        return sum(setting is not None and setting["learning_rate"] > 1e-2 for setting in settings) / 20

    assert share_of_large(stopped) > share_of_large(failed) + 0.3


@pytest.mark.parametrize("search_alg", ["random", "optuna"])
def test_a_proposal_is_a_function_of_seed_and_trials(search_alg: str) -> None:
    tried = [record("finished", n / 10, rate=10.0 ** -(n + 1)) for n in range(5)]
    assert asked(search_alg, 3, tried) == asked(search_alg, 3, tried)
    assert asked(search_alg, 3, tried) != asked(search_alg, 4, tried)
