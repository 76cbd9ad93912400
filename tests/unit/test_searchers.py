"""What a search algorithm is given of the trials so far, in Optuna's own terms."""

import pytest
from optuna.trial import TrialState

from ray_app.commands.tune.searchers import TrialRecord, frozen_trials, propose
from ray_app.commands.tune.spec import Choice, Range

SPACE = {"hidden_dim": Choice((8, 16)), "learning_rate": Range(1e-6, 1e-1, log=True, step=None, integer=False)}


def record(state: str, value: float | None, epochs: int = 3, rate: float = 1e-3) -> TrialRecord:
    values = () if value is None else (value,)
    return TrialRecord({"hidden_dim": 8, "learning_rate": rate}, state, values, epochs)


def test_each_trial_is_what_it_was_and_a_stopped_one_is_pruned_with_what_it_had_reached() -> None:
    tried = [record("finished", 0.5), record("stopped", 0.2, 1), record("failed", 0.1), record("running", None)]
    finished, stopped, failed, running = frozen_trials(SPACE, tried, 1)
    assert (finished.state, finished.value) == (TrialState.COMPLETE, 0.5)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {1: 0.2})
    assert failed.state == TrialState.FAIL
    assert running.state == TrialState.RUNNING
    assert frozen_trials(SPACE, [record("stopped", None, 0)], 1)[0].state == TrialState.FAIL, "it has shown nothing"


def test_with_two_objectives_a_stopped_trial_is_complete_since_optuna_cannot_prune_there() -> None:
    tried = [TrialRecord({"hidden_dim": 8, "learning_rate": 1e-3}, "stopped", (0.2, 7.0), 1)]
    (stopped,) = frozen_trials(SPACE, tried, 2)
    assert (stopped.state, stopped.values) == (TrialState.COMPLETE, [0.2, 7.0])


def test_what_stopped_trials_had_reached_leads_the_search() -> None:
    """Thirty stopped trials, better the larger the rate: Optuna asks for large ones, and for any without them."""
    rates = [10 ** (-6 + 5 * n / 29) for n in range(30)]
    stopped = [record("stopped", n / 30, 1, rate) for n, rate in enumerate(rates)]
    failed = [record("failed", None, 0, rate) for rate in rates]

    def share_of_large(tried: list[TrialRecord]) -> float:
        asked = [propose("optuna", SPACE, seed, tried) for seed in range(20)]
        return sum(setting is not None and setting["learning_rate"] > 1e-2 for setting in asked) / 20

    assert share_of_large(stopped) > share_of_large(failed) + 0.3


@pytest.mark.parametrize("search_alg", ["random", "optuna"])
def test_a_proposal_is_a_function_of_seed_and_trials(search_alg: str) -> None:
    tried = [record("finished", n / 10, rate=10.0 ** -(n + 1)) for n in range(5)]
    assert propose(search_alg, SPACE, 3, tried) == propose(search_alg, SPACE, 3, tried)
    assert propose(search_alg, SPACE, 3, tried) != propose(search_alg, SPACE, 4, tried)
