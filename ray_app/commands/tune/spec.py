"""A sweep as its YAML file has it: what all trials share, what is searched, how, and how much it may cost.

Any setting of `ray-app train` may be under `base` or under `space`; store, out, split and resources have keys of
their own. In `space`, a list is a choice, and a range is one of

    {uniform: [low, high]}    {log: [low, high]}    either with step: …
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from ray_app.config.base import Positive, SplitFlags, StorePlace
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.errors import ConfigError
from ray_app.parsing.yaml_text import parse_yaml
from ray_app.store.filesystem import absolute

Setting = dict[str, Any]
"""Values of the searched settings, as JSON has them."""

RESERVED: dict[str, str] = {
    "store": "it has a key of its own",
    "out": "it has a key of its own",
    "resume": "use `ray-app tune --resume SWEEP`",
    "seed": "searching for a lucky seed finds luck; the final training takes several (`num_final_seeds`)",
    "train_on_val": "trials are compared on the validation part",
    **dict.fromkeys(("split", "split_seed", "test_share", "val_share"), "it has a key of its own"),
    **dict.fromkeys(("num_workers", "use_gpu", "cpus_per_worker"), "it has a key of its own"),
    **dict.fromkeys(("address", "tracking_uri", "experiment", "model_name"), "it is a flag of `ray-app tune`"),
}
"""Settings of `train` that are neither in `base` nor in `space`, and why."""


class SweepSpec(SplitFlags):
    """Settings of a sweep."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: StorePlace
    """Folder of the sweep, or a URI such as s3://bucket/sweep."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of `train` that all trials share."""
    space: dict[str, Any]
    """Settings of `train` that are searched."""
    objective: Literal["cosine_accept_rate_0.80", "lift"] = "cosine_accept_rate_0.80"
    """Metric to maximise: on the validation part, at a trial's best checkpoint (lowest validation loss). Of equal
    trials the one with fewer parameters wins."""
    secondary_objective: Literal["parameters", "latency_ms"] | None = None
    """Second objective, to minimise: the result is then a Pareto front, and `optuna` searches for both."""
    search_alg: Literal["grid", "random", "optuna"] = "optuna"
    """`grid`: every combination of choices. `optuna`: a tree-structured Parzen estimator."""
    scheduler: Literal["none", "asha"] = "asha"
    """`asha` stops trials that fall behind."""
    grace_period: Positive = 1
    """Epochs before `asha` may stop a trial."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """`asha` lets one trial in so many continue at each rung."""
    max_trials: Positive = 16
    """Most trials."""
    max_hours: float | None = Field(default=None, gt=0.0)
    """Most hours of search."""
    max_gpu_hours: float | None = Field(default=None, gt=0.0)
    """Most GPU hours of search."""
    max_concurrent_trials: int = Field(default=0, ge=0)
    """Most trials at a time; 0: as many as the cluster has room for."""
    num_workers: Positive = 1
    """Workers of one trial. One runs in the trial's own process, several are a Ray Train group."""
    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    """CPUs of each worker."""
    use_gpu: bool = False
    """One GPU for each worker."""
    num_to_keep: int = Field(default=5, ge=0)
    """Number of best trials whose weights are kept; of the others only the event log is. 0: all are kept."""
    num_final_seeds: Positive = 3
    """Number of seeds of the final training."""
    final_workers: Positive = 1
    """Data-parallel workers of the final training."""
    seed: int = 0
    """Seed of the search and of the trials."""

    @property
    def num_epochs(self) -> int:
        """Most epochs of a trial."""
        return int(self.base.get("num_epochs", TrainConfig.model_fields["num_epochs"].default))


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]
    """JSON values."""

    @property
    def bounds(self) -> tuple[Any, ...]:
        """Values that are checked to see whether all are allowed."""
        return self.values


@dataclass(frozen=True, slots=True)
class Range:
    """A number between two others."""

    low: float
    """Smallest."""
    high: float
    """Largest."""
    log: bool
    """Sample uniformly in the logarithm."""
    step: float | None
    """Distance of allowed values from `low` on, or None for any number."""
    integer: bool
    """Whole numbers only."""

    @property
    def bounds(self) -> tuple[Any, ...]:
        """Values that are checked to see whether all are allowed."""
        return (self.low, self.high)


Dimension = Choice | Range
Space = dict[str, Dimension]


def read_spec(path: Path, changes: Mapping[str, Any]) -> SweepSpec:
    """Read a sweep from its YAML file, with some keys changed. ConfigError names the key that cannot be used."""
    try:
        lines = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(lines, dict):
        raise ConfigError(f"{path} must hold `key: value` lines; tune_configs/smoke.yaml is an example")
    lines |= {key: value for key, value in changes.items() if value is not None}
    if unknown := set(map(str, lines)) - set(SweepSpec.model_fields):
        known = ", ".join(sorted(SweepSpec.model_fields))
        raise ConfigError(f"{path}: unknown key '{min(unknown)}'; known are: {known}")
    for name, example in (("store", "stores/scenes"), ("out", "sweeps/first")):
        if name not in lines:
            raise ConfigError(f"{path} names no {name}; add `{name}: {example}`, or --{name} {example}")
    try:
        spec = SweepSpec.model_validate(lines)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from error
    base = dict(spec.base)
    if "init_from" in base:
        base["init_from"] = Path(base["init_from"]).absolute()
    spec = spec.model_copy(update={"store": absolute(spec.store), "out": absolute(spec.out), "base": base})
    check(spec)
    return spec


def first_problem(error: ValidationError) -> str:
    """First error of pydantic, on one line."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"


def check(spec: SweepSpec) -> None:
    """Raise ConfigError if the space is empty, or has a value that `train` would refuse."""
    space = space_of(spec)
    if both := set(space) & set(spec.base):
        raise ConfigError(f"'{min(both)}' is under both `base` and `space`; remove one")
    train_config(spec, {}, spec.out)
    for name, dimension in space.items():
        for value in dimension.bounds:
            train_config(spec, {name: value}, spec.out)
    check_used(spec, space)
    if spec.search_alg == "grid" and (ranges := [name for name, d in space.items() if isinstance(d, Range)]):
        raise ConfigError(
            f"`search_alg: grid` needs lists, but {ranges[0]} is a range; list its values, or use `random`"
        )
    if spec.secondary_objective == "latency_ms" and spec.num_workers > 1:
        raise ConfigError("latency_ms is measured in a trial's own process; it needs `num_workers: 1`")


def check_used(spec: SweepSpec, space: Space) -> None:
    """Raise ConfigError if a searched setting changes no adapter of the space: trials would be equal."""

    def values(name: str) -> tuple[Any, ...]:
        return space[name].bounds if name in space else (spec.base.get(name, TrainConfig.model_fields[name].default),)

    kinds = {
        name: STRATEGIES[name] for name in (values("strategy") if None not in values("strategy") else STRATEGIES)
    }
    used = frozenset[str]().union(*(kind.SETTINGS for kind in kinds.values()))
    if "pca" in values("init") and any(kind.PCA_REQUIRES == "subspaces" for kind in kinds.values()):
        used |= {"rank"}
    for name in ("hidden_dim", "depth", "patch", "rank", "dropout"):
        if name in space and name not in used:
            raise ConfigError(
                f"space: {name} changes nothing in {', '.join(kinds)}, so trials would be equal; leave it out, "
                "or use another `strategy`"
            )


def space_of(spec: SweepSpec) -> Space:
    """Searched settings. ConfigError: none, an unknown one, or one that is neither a list nor a range."""
    if not spec.space:
        raise ConfigError(
            "the space is empty: name settings to search under `space`, such as `hidden_dim: [128, 256]`"
        )
    return {name: dimension(name, value) for name, value in spec.space.items()}


def dimension(name: str, value: Any) -> Dimension:
    """Parse one entry of `space`."""
    allowed(name)
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"space: {name} has no values; list some, or move it to `base`")
        return Choice(tuple(value))
    kinds = [kind for kind in ("uniform", "log") if isinstance(value, dict) and kind in value]
    if len(kinds) != 1 or set(value) - {"uniform", "log", "step"}:
        raise ConfigError(
            f"space: {name} must be a list of values, {{uniform: [low, high]}} or {{log: [low, high]}}, optionally "
            f"with a step; got {value!r}. A single value belongs under `base`."
        )
    ends, step = value[kinds[0]], value.get("step")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
    if not numbers or not ends[0] < ends[1] or (kinds[0] == "log" and (ends[0] <= 0 or step)):
        raise ConfigError(
            f"space: {name}: {value!r} is not a range; give two numbers, the lower one first (above 0 and without a "
            "step for log; 1.0e-4 is a number in YAML, 1e-4 is not)"
        )
    kind = TrainConfig.model_fields[name].annotation
    integer = int in (kind, *get_args(kind)) and float not in get_args(kind)
    return Range(ends[0], ends[1], kinds[0] == "log", step, integer)


def allowed(name: str) -> None:
    """Raise ConfigError unless this is a setting of `train` that a sweep may have."""
    if name in RESERVED:
        raise ConfigError(f"'{name}' cannot be set or searched: {RESERVED[name]}")
    if name not in TrainConfig.model_fields:
        known = ", ".join(sorted(set(TrainConfig.model_fields) - set(RESERVED)))
        raise ConfigError(f"'{name}' is not a setting of `ray-app train`; known are: {known}")


def train_config(spec: SweepSpec, setting: Setting, out: str, **more: Any) -> TrainConfig:
    """Settings of a training run. ConfigError: `train` refuses a value, or several together."""
    for name in spec.base:
        allowed(name)
    values = {
        **{name: getattr(spec, name) for name in SplitFlags.model_fields},
        "num_workers": spec.num_workers,
        "use_gpu": spec.use_gpu,
        "cpus_per_worker": spec.cpus_per_worker,
        "seed": spec.seed,
        **spec.base,
        **setting,
        **more,
    }
    try:
        return TrainConfig.model_validate({**values, "store": spec.store, "out": out})
    except ValidationError as error:
        raise ConfigError(f"`ray-app train` refuses {first_problem(error)}") from error


def data_key(cfg: TrainConfig) -> str:
    """Key of a run's data set among those of a sweep."""
    return "+".join(cfg.durations) or "all"


def describe_space(setting: Setting) -> str:
    """Return a setting on one line."""
    return ", ".join(f"{name} {shown_value(value)}" for name, value in setting.items())


def shown_value(value: Any) -> str:
    """Return a value in a short form."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)
