"""Defaults by the features at hand, and one line of what to try next where there is no lift."""

import math
from typing import Any

import pytest

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.advice import BEST, WHY, default_settings, what_to_try

IMAGE, ODD, VECTOR, TOKENS = (3, 224, 224), (3, 17, 16), (512,), (5, 16)


@pytest.mark.parametrize(
    ("event", "target", "pairs", "settings"),
    [
        (IMAGE, IMAGE, 500, {"strategy": "conv"}),
        (ODD, ODD, 500, {"strategy": "lowrank", "rank": 64}),  # no patch divides these sides
        (VECTOR, (768,), 500, {"strategy": "lowrank", "rank": 64}),
        (VECTOR, (768,), 20, {"strategy": "lowrank", "rank": 9}),
        ((8,), (768,), 500, {"strategy": "lowrank", "rank": 8}),
        (VECTOR, (768,), 2, {"strategy": "lowrank", "rank": 1}),
        (IMAGE, VECTOR, 500, {"strategy": "lowrank", "rank": 64}),
        (TOKENS, TOKENS, 500, {"strategy": "token_bottleneck", "init": "pca"}),
    ],
)
def test_the_default_is_the_best_known_and_works_on_the_features(
    event: tuple[int, ...], target: tuple[int, ...], pairs: int, settings: dict[str, Any]
) -> None:
    assert default_settings(event, target, pairs) == settings
    strategy = settings["strategy"]
    widths, rank = (math.prod(event), math.prod(target)), settings.get("rank", 64)
    STRATEGIES[strategy].check(AdapterConfig(strategy, *widths, event_shape=event, target_shape=target, rank=rank))
    assert strategy in WHY


def result(kind: str, strategy: str, lift: float = -0.1, pairs: int = 1000, rate: float = 0.3) -> dict[str, Any]:
    return {
        "lift": lift,
        "strategy": strategy,
        "cosine_accept_rate": {"0.80": rate},
        "split": {"train": pairs},
        "data": {"features": {"event": kind, "target": kind}},
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (result("images", "lightweight"), "--strategy conv"),
        (result("sequences", "token_wide"), "--strategy token_bottleneck --init pca"),
        (result("vectors", "ridge"), "--strategy lowrank"),
        (result("images", "conv", pairs=90), "90 training pairs are few"),
        (result("images", "conv"), "features of an encoder instead of pixels"),
        (result("vectors", "lowrank"), "--strategy ridge"),
        (result("sequences", "token_bottleneck"), "ray-app tune"),
        (result("images", "lightweight", lift=0.0, rate=1.0), "every pair is accepted"),
    ],
)
def test_what_to_try_follows_from_what_is_known(given: dict[str, Any], words: str) -> None:
    line = what_to_try(given)
    assert line is not None
    assert words in line
    assert "\n" not in line


def test_lift_needs_no_advice() -> None:
    assert what_to_try(result("images", "lightweight", lift=0.01)) is None
    assert set(BEST.values()) == set(WHY)
