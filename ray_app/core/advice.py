"""Best known settings for the features at hand, and what to try next where an adapter has no lift."""

import math
from collections.abc import Mapping
from typing import Any

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.thresholds import THETA, rate_key
from ray_app.errors import ConfigError

FEW_PAIRS = 500
"""Training pairs below which more of them are worth trying before other settings."""
RANK = 64
"""Dimensions of the subspaces that are wanted; fewer where pairs or widths are few."""
BEST = {"images": "conv", "vectors": "lowrank", "sequences": "token_bottleneck"}
"""Strategy that is best known, by the kind of the target feature."""
WHY = {
    "conv": "images: a thousandth of the size of lightweight, and better on rendered scenes and on clips",
    "lowrank": "starts at the mean target, and learns between the principal subspaces of both sides",
    "token_bottleneck": "sequences; with --init pca it starts at the mean target of each position",
}
"""Reason for each strategy that is a default."""


def default_settings(event_shape: tuple[int, ...], target_shape: tuple[int, ...], pairs: int) -> dict[str, Any]:
    """Return the settings of `train` that are best known for features of these shapes and so many training pairs."""
    event_dim, target_dim = math.prod(event_shape), math.prod(target_shape)
    if len(target_shape) == 2:
        return {"strategy": BEST["sequences"], "init": "pca"}
    try:
        STRATEGIES["conv"].check(
            AdapterConfig("conv", event_dim, target_dim, event_shape=event_shape, target_shape=target_shape)
        )
    except ConfigError:  # vectors, or images whose sides have no common patch
        return {"strategy": BEST["vectors"], "rank": max(min(RANK, (pairs - 1) // 2, event_dim, target_dim), 1)}
    return {"strategy": BEST["images"]}


def what_to_try(result: Mapping[str, Any]) -> str | None:
    """Return one line for an evaluation without lift; None where the adapter beats the best baseline.

    `result`: `AlignmentEvaluation.metrics()` with `strategy`, `split` and `data`.
    """
    if result["lift"] > 0:
        return None
    key = rate_key(THETA)
    if result["cosine_accept_rate"][key] == 1.0:
        return f"at θ {key} every pair is accepted, so no lift is possible there: compare at a higher θ, or by R@1"
    kind, pairs = result["data"]["features"]["target"], result["split"]["train"]
    best = BEST[kind]
    if result["strategy"] != best:
        init = " --init pca" if kind == "sequences" else ""
        return f"try next: ray-app train --strategy {best}{init} ({WHY[best]})"
    if pairs < FEW_PAIRS:
        return f"try next: more pairs, of more drives; {pairs:,} training pairs are few"
    if kind == "images":
        return (
            "try next: features of an encoder instead of pixels (`ray-app encode STORE --event-encoder DIR "
            "--target-encoder DIR`), or a search of the settings with `ray-app tune`"
        )
    solved = "ray-app train --strategy ridge (the best linear map, solved), or " if kind == "vectors" else ""
    return f"try next: {solved}a search of strategy, learning rate and loss with `ray-app tune`"
