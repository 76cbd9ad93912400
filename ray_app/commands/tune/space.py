"""Settings that a sweep searches: read from `space`, checked against `train`, and proposed.

Any setting of `ray-app train` may be under `base` or under `space`; store, out, split and resources have keys of
their own. In `space`, a list is a choice, and a range is one of

    {uniform: [low, high]}    {log: [low, high]}    either with step: …

A proposal is a function of the space, the seed and the trials so far, so a search has no state that a killed driver
could lose. Random draws are Optuna's too; its Parzen estimator gets every trial so far and a seed for each proposal.
"""

import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError

from ray_app.commands.tune.trials import Setting, Trial, scored
from ray_app.config.base import SplitFlags
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.core.adapters.registry import FOR_LANGUAGE_MODELS, STRATEGIES
from ray_app.core.adapters.seeded_noise import derive_seed
from ray_app.errors import ConfigError
from ray_app.parsing.json_text import parse_json

Space = dict[str, BaseDistribution]
"""Distribution of each searched setting."""

FORBIDDEN: dict[str, str] = {
    "store": "it has a key of its own",
    "out": "it has a key of its own",
    "resume": "use `ray-app tune --resume SWEEP`",
    "seed": "searching for a lucky seed finds luck; the final training takes several (`num_final_seeds`)",
    "train_on_val": "trials are compared on the validation part",
    **dict.fromkeys(("split", "split_seed", "test_share", "val_share"), "it has a key of its own"),
    **dict.fromkeys(("num_workers", "use_gpu", "cpus_per_worker"), "it has a key of its own"),
    **dict.fromkeys(("address", "tracking_uri", "experiment", "model_name"), "it is a setting of the whole sweep"),
}
"""Settings of `train` that are neither in `base` nor in `space`, and why."""
REDRAWS = 200
"""Draws after which a space of choices counts as used up."""
MIN_TRIALS = 4
"""Fewest trials that importances are computed from."""


def read_space(cfg: TuneConfig) -> Space:
    """Parse and check the searched settings. ConfigError: none, an unknown one, or a value that `train` refuses."""
    if not cfg.space:
        raise ConfigError(
            "the space is empty: name settings to search under `space`, such as `hidden_dim: [128, 256]`"
        )
    space = {name: distribution(name, value, cfg.train_settings) for name, value in cfg.space.items()}
    if both := set(space) & set(cfg.base):
        raise ConfigError(f"'{min(both)}' is under both `base` and `space`; remove one")
    some = needed_weights(cfg, space)
    train_config(cfg, some)
    for name, dimension in space.items():
        for value in bounds(dimension):
            if value or name not in some:
                train_config(cfg, {**some, name: value})
    require_used(cfg, space)
    ranges = [name for name, dimension in space.items() if not isinstance(dimension, CategoricalDistribution)]
    if cfg.search_alg == "grid" and ranges:
        raise ConfigError(
            f"`search_alg: grid` needs lists, but {ranges[0]} is a range; list its values, or use `random`"
        )
    if cfg.secondary_objective == "latency_ms" and cfg.num_workers > 1:
        raise ConfigError("latency_ms is measured in a trial's own process; it needs `num_workers: 1`")
    return space


def needed_weights(cfg: TuneConfig, space: Space) -> Setting:
    """Return a weight of each loss that is searched, where no loss has one without: those of drafters."""
    names = [name for name in space if name.endswith("_weight") and cfg.drafting]
    return {name: next(filter(None, bounds(space[name])), 0.0) for name in names}


def distribution(name: str, value: Any, settings: type[TrainConfig] = TrainConfig) -> BaseDistribution:
    """Parse one entry of `space`; `settings`: of the training."""
    require_allowed(name, settings)
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"space: {name} has no values; list some, or move it to `base`")
        return CategoricalDistribution([as_param(each) for each in value])
    kinds = [kind for kind in ("uniform", "log") if isinstance(value, dict) and kind in value]
    if len(kinds) != 1 or set(value) - {"uniform", "log", "step"}:
        raise ConfigError(
            f"space: {name} must be a list of values, {{uniform: [low, high]}} or {{log: [low, high]}}, optionally "
            f"with a step; got {value!r}. A single value belongs under `base`."
        )
    ends, step, log = value[kinds[0]], value.get("step"), kinds[0] == "log"
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
    if not numbers or not ends[0] < ends[1] or (log and (ends[0] <= 0 or step)):
        raise ConfigError(
            f"space: {name}: {value!r} is not a range; give two numbers, the lower one first (above 0 and without a "
            "step for log; 1.0e-4 is a number in YAML, 1e-4 is not)"
        )
    types = get_args(settings.model_fields[name].annotation) or (settings.model_fields[name].annotation,)
    if int in types and float not in types:
        return IntDistribution(int(ends[0]), int(ends[1]), log, int(step or 1))
    return FloatDistribution(ends[0], ends[1], log, step)


def require_allowed(name: str, settings: type[TrainConfig]) -> None:
    """Raise ConfigError unless this is a setting of the training that a sweep may have."""
    if name in FORBIDDEN:
        raise ConfigError(f"'{name}' cannot be set or searched: {FORBIDDEN[name]}")
    if name not in settings.model_fields:
        known = ", ".join(sorted(set(settings.model_fields) - set(FORBIDDEN)))
        raise ConfigError(f"'{name}' is not a setting of `ray-app train`; known are: {known}")


def require_used(cfg: TuneConfig, space: Space) -> None:
    """Raise ConfigError if a searched setting changes no adapter of the space: trials would be equal."""
    shared = train_config(cfg, needed_weights(cfg, space))

    def values(name: str) -> Sequence[Any]:
        return bounds(space[name]) if name in space else [getattr(shared, name)]

    named = values("strategy")
    known = STRATEGIES | FOR_LANGUAGE_MODELS
    kinds = dict(STRATEGIES) if None in named else {name: known[name] for name in named}
    used = frozenset[str]().union(*(kind.SETTINGS for kind in kinds.values()))
    if "pca" in values("init") and any(kind.PCA_REQUIRES == "subspaces" for kind in kinds.values()):
        used |= {"rank"}
    losses = {f"{name}_weight" for name in TrainConfig.LOSSES}
    unused = losses - {f"{name}_weight" for name in cfg.train_settings.LOSSES}
    for name in ("hidden_dim", "depth", "patch", "rank", "dropout", *sorted(losses)):
        if name in space and (name in unused if name in losses else name not in used):
            raise ConfigError(
                f"space: {name} changes nothing in {', '.join(kinds)}, so trials would be equal; leave it out, "
                "or use another `strategy`"
            )


def train_config(cfg: TuneConfig, setting: Setting, out: str = "", **more: Any) -> TrainConfig:
    """Settings of a training run. ConfigError: `train` refuses a value, or several together."""
    for name in cfg.base:
        require_allowed(name, cfg.train_settings)
    shared = (*SplitFlags.model_fields, "num_workers", "use_gpu", "cpus_per_worker", "seed", "store")
    tracking = ("address", "tracking_uri", "experiment", "model_name")
    values = {name: getattr(cfg, name) for name in (*shared, *tracking)}
    try:
        return cfg.train_settings.model_validate({**values, **cfg.base, **setting, **more, "out": out or cfg.out})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"`ray-app train` refuses {place}: {problem['msg']} (got {problem['input']!r})") from error


def as_param(value: Any) -> Any:
    """Value of a setting as Optuna takes it: a list becomes its JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def as_value(param: Any) -> Any:
    """Value of a setting out of Optuna."""
    return parse_json(param) if isinstance(param, str) and param.startswith("[") else param


def bounds(dimension: BaseDistribution) -> list[Any]:
    """Values that are checked to see whether all are allowed: every choice, or both ends of a range."""
    if isinstance(dimension, CategoricalDistribution):
        return [as_value(param) for param in dimension.choices]
    assert isinstance(dimension, IntDistribution | FloatDistribution)
    return [dimension.low, dimension.high]


def grid(space: Space) -> list[Setting]:
    """Every combination of `bounds`, the last setting changing fastest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*map(bounds, space.values()))]


def draws(space: Space, seed: int) -> Iterator[Setting]:
    """Yield random settings without end."""
    study = new_study(RandomSampler(seed=seed % 2**32))
    while True:
        yield ask(study, space)


def propose(cfg: TuneConfig, space: Space, trials: Sequence[Trial]) -> Setting | None:
    """Setting of the next trial, or None if all combinations were tried."""
    tried = [trial.setting for trial in trials]
    if cfg.search_alg == "grid":
        return next(itertools.islice(grid(space), len(tried), None), None)
    seed = derive_seed(cfg.seed, len(tried)) % 2**32
    if cfg.search_alg == "optuna":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
        setting = ask(study_of(trials, space, cfg.secondary_objective, sampler), space)
        if setting not in tried:
            return setting
    return next((setting for setting in itertools.islice(draws(space, seed), REDRAWS) if setting not in tried), None)


def new_study(sampler: BaseSampler | None = None, second: str | None = None) -> optuna.Study:
    """Study in memory. `second`: there is a second objective, to minimise."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=["maximize", "minimize"] if second else ["maximize"])


def ask(study: optuna.Study, space: Space) -> Setting:
    """Setting that a study's sampler proposes."""
    return {name: as_value(param) for name, param in study.ask(space).params.items()}


def study_of(
    trials: Sequence[Trial], space: Space, second: str | None = None, sampler: BaseSampler | None = None
) -> optuna.Study:
    """Study of these trials, rates in percent. `second`: an attribute of Trial that is minimised too."""
    study = new_study(sampler, second)
    study.add_trials([frozen(trial, space, second) for trial in trials])
    return study


def frozen(trial: Trial, space: Space, second: str | None) -> FrozenTrial:
    """A trial as Optuna takes it; with two objectives a stopped one counts as complete."""
    values = [getattr(trial, name) for name in ("objective", *([second] if second else []))]
    state = TrialState.RUNNING if trial.ended_at is None else TrialState.FAIL
    if trial.status in ("finished", "stopped") and None not in values:
        state = TrialState.PRUNED if trial.status == "stopped" and not second else TrialState.COMPLETE
        values[0] = trial.shown_objective
    done = state in (TrialState.COMPLETE, TrialState.PRUNED)
    return create_trial(
        state=state,
        params={name: as_param(trial.setting[name]) for name in space},
        distributions=space,
        values=values if done else None,
        intermediate_values={trial.epochs: values[0]} if state == TrialState.PRUNED else None,
    )


def complete(trials: Sequence[Trial]) -> list[Trial]:
    """Trials as if they had all finished, for figures and importances, which show what was reached."""
    return [replace(trial, status="finished") for trial in trials]


def importances(study: optuna.Study, seed: int) -> dict[str, float]:
    """Share of the objective's variance that each setting explains (fANOVA); empty for too few or equal trials."""
    trials = study.trials
    params = sorted(name for name in trials[0].params if len({trial.params[name] for trial in trials}) > 1)
    if len(trials) < MIN_TRIALS or not params or len({trial.value for trial in trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, params=params)


def pareto_front(trials: Sequence[Trial], space: Space, second: str) -> list[Trial]:
    """Trials that no other beats in the objective without losing in the second one, best objective first."""
    both = [trial for trial in scored(trials) if getattr(trial, second) is not None]
    front = {trial.number for trial in study_of(complete(both), space, second).best_trials}
    return [trial for number, trial in enumerate(both) if number in front]


def describe(setting: Setting) -> str:
    """Return a setting on one line."""

    def short(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{name} {short(value)}" for name, value in setting.items())
