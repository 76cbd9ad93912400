"""A trial as its event log has it: its score, its time, its rank, and why it fails. Without Ray."""

from typing import Any

import pytest

from ray_app.commands.tune.space import describe, pareto_front
from ray_app.commands.tune.trial import give_up_reason, is_repeated, normalise_error
from ray_app.commands.tune.trials import Trial, active_seconds, best_of, ranked, trial_name


def trial(index: int, objective: float | None, parameters: int, **more: Any) -> Trial:
    return Trial(
        index, f"t{index}", {}, parameters, objective=objective, status=more.pop("status", "finished"), **more
    )


def test_of_equal_trials_the_one_with_fewer_parameters_is_best_and_a_failed_one_never_is() -> None:
    trials = [trial(0, 0.5, 30), trial(1, 0.5, 20), trial(2, 0.5, 20), trial(3, 0.9, 1, status="failed")]
    assert best_of([*trials, trial(4, None, 1)]) is trials[1]
    assert best_of(trials[3:]) is None
    more = [*trials, trial(5, 0.4, 5), trial(6, 0.3, 9)]
    assert [t.index for t in pareto_front(more, {}, "parameters")] == [1, 2, 5]
    assert pareto_front(more, {}, "latency_ms") == []
    assert [t.index for t in ranked(more)] == [1, 2, 0, 5, 6, 3]


def test_a_trials_name_is_its_number_and_its_setting() -> None:
    assert trial_name(7, {"a": 1, "b": 2}) == trial_name(7, {"b": 2, "a": 1})
    assert trial_name(7, {"a": 1}) != trial_name(7, {"a": 2})
    assert trial_name(7, {"a": 1}).startswith("trial_0007-")
    assert describe({"a": 0.12345, "b": "x", "c": ["1s"]}) == 'a 0.123, b x, c ["1s"]'


def epoch(n: int, loss: float, rate: float, cos: float = 0.0) -> dict[str, Any]:
    return {
        "kind": "epoch",
        "epoch": n,
        "time": float(n),
        "val": {"loss": loss, "cosine_accept_rate": {"0.80": rate}, "lift": rate - 0.5, "cos_sim_mean": cos},
    }


def test_a_trial_counts_with_its_best_checkpoint_not_with_its_luckiest_epoch() -> None:
    lines, new = [epoch(1, 3.0, 0.2), epoch(2, 1.0, 0.4), epoch(3, 2.0, 0.9)], Trial(0, "t", {}, 1)
    best = new.after(lines, "cosine_accept_rate_0.80")
    assert (best.objective, best.best_epoch, best.epochs, best.status) == (0.4, 2, 3, "running")
    assert new.after(lines, "lift").objective == pytest.approx(-0.1)
    assert new.after([], "lift").objective is None
    then = list(new.after_each_epoch(lines, "lift"))
    assert [(each.epochs, each.best_epoch) for each in then] == [(1, 1), (2, 2), (3, 2)]
    assert Trial.recorded({"kind": "trial_ended", "time": 0.0, **best.to_dict()}) == best


@pytest.mark.parametrize("objective", ["cosine_accept_rate_0.80", "lift"])
def test_under_way_the_mean_cosine_decides_between_equals_and_never_against_one_pair_more(objective: str) -> None:
    def metric(rate: float, cos: float) -> float:
        lines = [epoch(1, 1.0, rate, cos), epoch(2, 2.0, 1.0, 1.0)]
        return Trial(0, "t", {}, 1).after(lines, objective).metrics["compared"]

    assert metric(0.4, 0.71) > metric(0.4, 0.70)
    assert metric(0.4 + 1 / 100_000, -1.0) > metric(0.4, 1.0)


def test_time_between_attempts_is_not_counted() -> None:
    kinds = [("workers_started", 0), ("step", 3), ("workers_started", 10), ("step", 12), ("run_ended", 14)]
    assert active_seconds([{"kind": kind, "time": float(at)} for kind, at in kinds]) == 3 + 4


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("attempt", True),
        ("attempt attempt", False),
        ("attempt 1 2 attempt", False),
        ("attempt 1 attempt 2", True),
        ("attempt error attempt error", True),
        ("attempt error attempt", True),
        ("lost lost lost", True),
        ("attempt 1 lost", True),
        ("lost 1 attempt", True),
        ("attempt 1 lost attempt", False),
        ("lost 1 attempt attempt", False),
    ],
)
def test_a_process_that_dies_twice_at_one_step_is_not_started_again(words: str, again: bool) -> None:
    """`lost`: an attempt on a node that has gone since."""
    kinds = {
        "attempt": {"kind": "workers_started", "node": "here"},
        "lost": {"kind": "workers_started", "node": "gone"},
        "error": {"kind": "exception"},
    }
    lines = [kinds.get(word) or {"kind": "step", "global_step": int(word)} for word in words.split()]
    assert (give_up_reason(lines, {"gone"}) is None) == again


MEMORY = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate {} GiB. GPU 0 has a total capacity of 79.18 GiB of "
    "which {} MiB is free. Process {} has 77.90 GiB memory in use."
)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (MEMORY.format("2.00", "1,024.5", 4711), MEMORY.format("1.94", "7", 815), True),
        ("RuntimeError: at 0x7f3a00", "RuntimeError: at 0x55aaee", True),
        (
            "The gradient is not finite (nan) at epoch 1, step 4",
            "The gradient is not finite (inf) at epoch 2, step 31",
            True,
        ),
        ("loss 1.5e-07 at step 3.", "loss 12 at step 3.", True),
        ("ConfigError: --rank is too large", "ConfigError: --rank is too small", False),
        (MEMORY.format(1, 2, 3), "RuntimeError: CUDA error", False),
    ],
)
def test_a_cause_is_the_same_whatever_its_numbers_are(first: str, second: str, same: bool) -> None:
    assert (normalise_error(first) == normalise_error(second)) == same
    lines = [{"kind": "step", "global_step": 1}, {"kind": "exception", "cause": first}]
    assert is_repeated(second, lines) == same
    assert not is_repeated(second, lines[:1])
