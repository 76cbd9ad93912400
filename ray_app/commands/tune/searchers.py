"""The next setting to try, as a pure function of the space, the seed and all trials so far.

A search algorithm therefore has no state that a killed driver could lose. Grid points and random draws do not depend
on results; Optuna's sampler is created for each proposal, with a seed of its own, and given every trial so far.
"""

import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from ray_app.commands.tune.spec import Choice, Dimension, Range, Setting, Space
from ray_app.core.adapters.seeded_noise import derive_seed

Direction = Literal["maximize", "minimize"]
REDRAWS = 200
"""Draws after which a space of choices counts as used up."""
MIN_TRIALS = 4
"""Fewest trials that importances are computed from."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial, as a search algorithm sees it."""

    setting: Setting
    """Values of the searched settings."""
    state: Literal["running", "finished", "stopped", "failed"]
    """State of the trial."""
    values: tuple[float, ...] = ()
    """Objectives, if it has finished an epoch."""
    epochs: int = 0
    """Finished epochs."""


def grid(space: Space) -> list[Setting]:
    """Every combination of choices, the last setting changing fastest."""
    choices = [dimension.values for dimension in space.values() if isinstance(dimension, Choice)]
    assert len(choices) == len(space)
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*choices)]


def propose(
    search_alg: Literal["grid", "random", "optuna"],
    space: Space,
    seed: int,
    tried: Sequence[TrialRecord],
    directions: Sequence[Direction] = ("maximize",),
) -> Setting | None:
    """Setting of the next trial, or None if all combinations were tried."""
    if search_alg == "grid":
        points = grid(space)
        return points[len(tried)] if len(tried) < len(points) else None
    if search_alg == "optuna":
        setting = suggest_with_optuna(space, seed, tried, directions)
        if setting not in [trial.setting for trial in tried]:
            return setting
    return sample_random(space, seed, tried)


def sample_random(space: Space, seed: int, tried: Sequence[TrialRecord]) -> Setting | None:
    """Random setting that was not tried yet, or None."""
    rng = np.random.default_rng(derive_seed(seed, len(tried)))
    seen = [trial.setting for trial in tried]
    for _ in range(REDRAWS):
        setting = {name: draw(dimension, rng) for name, dimension in space.items()}
        if setting not in seen:
            return setting
    return None


def draw(dimension: Dimension, rng: np.random.Generator) -> Any:
    """Random value of a dimension."""
    if isinstance(dimension, Choice):
        return dimension.values[rng.integers(len(dimension.values))]
    low, high = dimension.low, dimension.high
    if dimension.step or (dimension.integer and not dimension.log):
        step = dimension.step or 1
        value = low + step * int(rng.integers(int((high - low) / step + 1e-9) + 1))
    elif dimension.log:
        value = float(np.clip(np.exp(rng.uniform(np.log(low), np.log(high))), low, high))
    else:
        value = float(rng.uniform(low, high))
    return round(value) if dimension.integer else float(value)


def suggest_with_optuna(
    space: Space, seed: int, tried: Sequence[TrialRecord], directions: Sequence[Direction]
) -> Setting:
    """Proposal of Optuna after these trials; running ones count as bad, so that none is proposed twice."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=derive_seed(seed, len(tried)) % 2**32, multivariate=True, constant_liar=True
        )
        study = optuna.create_study(sampler=sampler, directions=list(directions))
        study.add_trials(frozen_trials(space, tried, len(directions)))
        params = study.ask({name: distribution(dimension) for name, dimension in space.items()}).params
    return {
        name: json.loads(params[name]) if isinstance(dimension, Choice) else params[name]
        for name, dimension in space.items()
    }


def frozen_trials(space: Space, tried: Sequence[TrialRecord], num_objectives: int) -> list[FrozenTrial]:
    """Trials as Optuna takes them. With two objectives a stopped trial counts as complete."""
    distributions = {name: distribution(dimension) for name, dimension in space.items()}
    states = {
        "running": TrialState.RUNNING,
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED if num_objectives == 1 else TrialState.COMPLETE,
        "failed": TrialState.FAIL,
    }
    frozen = []
    for trial in tried:
        state = states[trial.state] if trial.values or trial.state == "running" else TrialState.FAIL
        pruned = state == TrialState.PRUNED
        params = {
            name: json.dumps(trial.setting[name]) if isinstance(dimension, Choice) else trial.setting[name]
            for name, dimension in space.items()
        }
        frozen.append(
            create_trial(
                state=state,
                params=params,
                distributions=distributions,
                values=trial.values if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
                intermediate_values={trial.epochs: trial.values[0]} if pruned else None,
            )
        )
    return frozen


def importances(space: Space, tried: Sequence[TrialRecord], seed: int) -> dict[str, float]:
    """Share of the objective's variance that each setting explains (fANOVA); empty for too few or equal trials."""
    differing = {name for name in space if len({json.dumps(trial.setting[name]) for trial in tried}) > 1}
    if len(tried) < MIN_TRIALS or not differing or len({trial.values for trial in tried}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    study.add_trials(frozen_trials(space, tried, 1))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, params=sorted(differing))


def distribution(dimension: Dimension) -> BaseDistribution:
    """Distribution of Optuna for a dimension; choices are JSON, since their values may be lists."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution([json.dumps(value) for value in dimension.values])
    assert isinstance(dimension, Range)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), dimension.log, int(dimension.step or 1))
    return FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step)
