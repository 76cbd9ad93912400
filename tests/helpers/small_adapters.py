"""Every strategy on small features, initialised as in training, without Ray."""

from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter, InitStats
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.initialization import Part, Passes, Sums, compute_stats, solve_ridge
from ray_app.core.adapters.registry import STRATEGIES, build_adapter
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import IMAGE_TOKENS, Features, FeatureSpec

PAIRS, VAL = 24, 6


def small_pairs(width: int = 48, pairs: int = PAIRS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positive events and targets that share a few hidden causes, (pairs, width) each."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.rand(pairs, 4, generator=generator)
    maps = torch.rand(2, 4, width, generator=torch.Generator().manual_seed(99))
    event, target = (causes @ side + 0.1 * torch.rand(pairs, width, generator=generator) for side in maps)
    return event, target


def in_batches(event: Tensor, target: Tensor, size: int = 7) -> Passes:
    """Passes over pairs in memory."""

    def passes(part: Part) -> Sums:
        found = [part(*batch) for batch in zip(event.split(size), target.split(size), strict=True)]
        return {key: reduce(torch.add, [sums[key] for sums in found]) for key in found[0]}

    return passes


def small_start(strategy: str, event: Tensor, target: Tensor, rank: int) -> InitStats:
    """All that a strategy may need of these pairs; the last few validate."""
    train = event[:-VAL], target[:-VAL]
    start = compute_stats(in_batches(*train), "subspaces", rank, len(train[0]), seed=0)
    if STRATEGIES[strategy].REQUIRES == "pairs":
        start, _ = solve_ridge(start, (train[0], event[-VAL:]), (train[1], target[-VAL:]), (1.0, 1.0))
    return start


def small_adapter(strategy: str, seed: int = 0, *, width: int = 48, pca: bool = False) -> Adapter:
    """An initialised adapter for features of shape (3, width / 12, 4), or for sequences (width / 8, 8)."""
    event, target = small_pairs(width)
    shape = (width // 8, 8) if strategy.startswith("token_") else (3, width // 12, 4)
    config = AdapterConfig(
        strategy,
        width,
        width,
        hidden_dim=8,
        event_shape=shape,
        target_shape=shape,
        patch=2,
        rank=PAIRS - VAL if STRATEGIES[strategy].REQUIRES == "pairs" else 5,
    )
    adapter = build_adapter(config, seed)
    if pca or adapter.REQUIRES != "nothing":
        adapter.initialize_from(small_start(strategy, event, target, 5), pca=pca)
    return adapter


def perturbed(adapter: Adapter, seed: int = 5) -> Adapter:
    """No weight at zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapter


def save_image_tokens(folder: Path) -> Path:
    """A checkpoint that makes one image token for a language model of one layer."""
    config = AdapterConfig(IMAGE_TOKENS, 2, 3, 2, rank=1, image_tokens=1, language_model=(1, 2, 2, 2, 2))
    event, target = (FeatureSpec(dtype="float32", shape=(width,), scale=1.0) for width in (2, 3))
    features = Features(event=event, target=target)
    save_checkpoint(folder, build_adapter(config, 0).eval(), metrics={}, provenance={}, features=features)
    return folder
