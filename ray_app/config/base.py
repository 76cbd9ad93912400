"""Strict frozen models, common kinds of values, and flags that several commands share."""

import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ray_app.errors import ConfigError
from ray_app.parsing.json_text import require_few_members

Strategy = Literal[
    "lightweight",
    "lightweight_reference",
    "linear",
    "bottleneck",
    "conv",
    "lowrank",
    "ridge",
    "token_bottleneck",
    "token_multilayer",
    "token_wide",
    "token_attention",
    "token_causal",
]
"""Names of the adapters in `ray_app.core.adapters.registry.STRATEGIES`; a test holds the two equal."""

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
"""A registered model by alias or by version."""

Share = Annotated[float, Field(gt=0.0, lt=1.0)]

Positive = Annotated[int, Field(ge=1)]


def _place(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PLACE = BeforeValidator(_place)
StorePlace = Annotated[str, PLACE]
"""A folder, or a URI such as s3://bucket/store. Text, for a Path would make one slash of the two."""


def _workers(value: Any) -> str:
    """Accept a number, or MIN:MAX; ConfigError otherwise."""
    found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", str(value))
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise ConfigError(
            f"--num-workers ({value}) must be a number from 1 on, or MIN:MAX with 1 ≤ MIN ≤ MAX, such as 1:8"
        )
    return str(value)


Workers = Annotated[str, BeforeValidator(_workers)]
"""A fixed number of workers, or the fewest and the most."""


class Config(BaseModel):
    """Frozen settings; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    _few = model_validator(mode="before")(require_few_members)

    @model_validator(mode="after")
    def _no_uri_for_a_path(self) -> Self:
        """Refuse a URI for a path on a disk, which would become a folder of that name."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Path) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(each))):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} takes a folder or file, and {scheme[1]}:/… is a URI; name one "
                        "on a disk (of a cluster: one that all nodes see)"
                    )
        return self


class SplitConfig(Config):
    """Division of a store's pairs, computed from its index and never stored in it."""

    by: Literal["sequence", "window"] = "sequence"
    """`sequence` never cuts a drive; `window` is the reference's random split, which leaks, and says so."""
    seed: int = 42
    """Seed of the division."""
    test: Share = 0.2
    """Share of all pairs for the test part, which `evaluate` alone reads."""
    val: Share = 0.1
    """Share of the training part that is taken out of it for validation."""


class SplitFlags(Config):
    """Flags of the split, the same on every command that makes one."""

    split: Literal["sequence", "window"] = "sequence"
    """Divide by whole drives, or by single windows at random as the reference did (leaks)."""
    split_seed: int = 42
    """Seed of the division."""
    test_share: Share = 0.2
    """Share of all pairs for the test part."""
    val_share: Share = 0.1
    """Share of the training part taken out of it for validation."""
    durations: tuple[str, ...] = ()
    """Window lengths to use, such as 1s; default: all that the store has."""

    @property
    def split_config(self) -> SplitConfig:
        return SplitConfig(by=self.split, seed=self.split_seed, test=self.test_share, val=self.val_share)


class ClusterFlags(Config):
    """Flag of the cluster."""

    address: str | None = None
    """Ray cluster to join (`auto`, host:port); default: RAY_ADDRESS, else one of its own on this machine."""


class TrackingFlags(Config):
    """Flags of the tracking server."""

    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    experiment: str = "alignment"
    """MLflow experiment."""
    model_name: str = "alignment-adapter"
    """Name of the registered model."""


def require_one(asked: Mapping[str, Any], example: str) -> None:
    """Raise ConfigError unless exactly one of these is given; `example` is a correct command."""
    given = [name for name, value in asked.items() if value]
    if len(given) != 1:
        *names, last = asked
        raise ConfigError(
            f"{example.split()[1]} takes exactly one of {', '.join(names)} and {last}; given: "
            f"{', '.join(given) or 'none'}. For instance: {example}"
        )


def flat(config: Config) -> dict[str, Any]:
    """Return settings as JSON values, for MLflow parameters and provenance."""
    return config.model_dump(mode="json")


def changed_settings(where: str, old: Config, new: Config, allowed: Set[str]) -> set[str]:
    """Return the names of settings that a resumed run changes. ConfigError: one of them is not in `allowed`."""
    was, now = flat(old), flat(new)
    changed = {name for name in was if was[name] != now[name]}
    if refused := sorted(changed - allowed):
        changes = "; ".join(f"{name} was {was[name]!r}, is {now[name]!r} now" for name in refused)
        raise ConfigError(f"--resume continues with the settings of {where}, but {changes}; leave that out.")
    return changed
