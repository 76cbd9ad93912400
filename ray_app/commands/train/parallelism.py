"""How several workers divide a run: by pairs (data-parallel) or by features; chosen by the bytes that a step sends.

By pairs, workers all-reduce the gradients of all parameters. By features, each trains all pairs of a batch on its
columns and its part of the first and last layer; workers all-reduce hidden activations, their gradient and a few sums
of each pair. In a mesh the workers of a node divide the features, and the nodes the pairs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.adapters.slices import WHOLE, FeatureSlice
from ray_app.errors import ConfigError
from ray_app.store.pair_store import PairStore

WAYS = {
    "data": "the pairs of a batch",
    "feature": "the features of every pair",
    "mesh": "the features of every pair inside each node, and the pairs of a batch over nodes",
}
MIN_COLUMNS = 8
"""Fewest columns of a feature for each worker."""


@dataclass(frozen=True, slots=True)
class Division:
    """How the workers of a run divide the work."""

    parallelism: Literal["data", "feature", "mesh"]
    """By pairs, by features, or by both."""
    shard_bytes: int
    """Bytes of the training pairs that each worker of the smallest group trains on."""
    reason: str
    """The choice in a sentence; empty for one worker."""

    @property
    def by_features(self) -> bool:
        """True if workers hold some columns of their pairs, which they read themselves."""
        return self.parallelism != "data"


def choose_division(
    cfg: TrainConfig, kind: type[Adapter], adapter: AdapterConfig, store: PairStore, pairs: int, parameters: int
) -> Division:
    """Choose for a run of this adapter; `pairs`: number of training pairs, `parameters`: of trained numbers.

    ConfigError: --parallelism feature, or mesh, for a run that cannot be divided so.
    """
    shards = _shard_bytes(cfg, kind, store, pairs)
    obstacle = _obstacle(cfg, kind, adapter, shards["feature"])
    if cfg.parallelism in ("feature", "mesh") and obstacle:
        raise ConfigError(f"--parallelism {cfg.parallelism}: {obstacle}; leave it out, and workers divide the pairs")
    if cfg.max_workers == 1:
        return Division("data", shards["data"], "")
    if cfg.parallelism == "mesh":
        return Division("mesh", shards["feature"], f"{cfg.num_workers} workers divide {WAYS['mesh']}")
    numbers = {"data": parameters, "feature": _numbers_a_step(cfg, kind, adapter)}
    if cfg.parallelism != "auto":
        way = cfg.parallelism
    else:
        way = "feature" if not obstacle and numbers["feature"] < numbers["data"] else "data"
    sends = {  # of a ring, as gloo and NCCL do it
        name: f"{8 * (cfg.max_workers - 1) / cfg.max_workers * count / 1e6:,.2f} MB a step from each"
        for name, count in numbers.items()
    }
    other = "feature" if way == "data" else "data"
    against = obstacle or f"{WAYS[other]}: {sends[other]}"
    return Division(way, shards[way], f"{cfg.num_workers} workers divide {WAYS[way]}: {sends[way]} ({against})")


def _obstacle(cfg: TrainConfig, kind: type[Adapter], adapter: AdapterConfig, shard_bytes: int) -> str:
    """Return why a run cannot divide features; empty if it can."""
    if not kind.DIVISIBLE:
        able = ", ".join(name for name, strategy in STRATEGIES.items() if strategy.DIVISIBLE)
        return f"{adapter.strategy} needs whole features ({able} can divide them)"
    if len(adapter.target_shape) == 2:
        return "the loss of a sequence is a mean over its tokens, which workers would cut"
    if cfg.flip or cfg.shift or cfg.event_dropout or cfg.event_noise:
        return "--flip, --shift, --event-dropout and --event-noise change whole images"
    if cfg.bf16_gradients:
        return "--bf16-gradients is for gradients that are sent, and none are"
    most = min(adapter.event_dim, adapter.target_dim) // MIN_COLUMNS
    if cfg.max_workers > most:
        widths = f"{adapter.event_dim} and {adapter.target_dim} columns"
        return f"features of {widths} give {cfg.max_workers} workers less than {MIN_COLUMNS} each, {most} at most"
    if shard_bytes > cfg.shard_memory_gib * 2**30:
        return (
            f"workers hold their columns of all pairs, {shard_bytes / 2**30:.3g} GiB each, and --shard-memory-gib is "
            f"{cfg.shard_memory_gib:g}"
        )
    return ""


def _shard_bytes(cfg: TrainConfig, kind: type[Adapter], store: PairStore, pairs: int) -> dict[str, int]:
    """Bytes of the training pairs of one worker, for each way."""
    sides = {side: store.feature(side).num_bytes for side in ("event", "target")}
    workers = cfg.min_workers
    columns = (-(-size // workers) if side in kind.DIVISIBLE else size for side, size in sides.items())
    return {"data": -(-pairs // workers) * sum(sides.values()), "feature": pairs * sum(columns)}


def _numbers_a_step(cfg: TrainConfig, kind: type[Adapter], adapter: AdapterConfig) -> int:
    """Numbers that workers who divide features all-reduce in a step."""
    hidden = 2 * adapter.hidden_dim if "event" in kind.DIVISIBLE else 0
    sums = 4 + 3 * (cfg.centred_weight > 0) + (cfg.batch_size + 2) * (cfg.contrastive_weight > 0)
    return cfg.batch_size * (hidden + sums)


@dataclass(frozen=True, slots=True)
class Membership:
    """Part of one worker in a divided run."""

    part: FeatureSlice = WHOLE
    """Slice of the features that it trains."""
    pair_group: dist.ProcessGroup | None = None
    """Workers with the same slice of other pairs; None: all workers, or none."""


def join(division: Division, rank: int, world: int, workers_of_node: int, device: torch.device) -> Membership:
    """Find what a worker of torch.distributed's default group has; all workers call this together.

    Ranks of a node are neighbours. A mesh has as many slices as a node has workers, or as divide the numbers of all
    nodes.
    """
    if world == 1 or not division.by_features:
        return Membership()
    slices = world
    if division.parallelism == "mesh":
        of_nodes = torch.zeros(world, dtype=torch.int64, device=device)
        of_nodes[rank] = workers_of_node
        slices = math.gcd(*_all_reduce(None, of_nodes).tolist())
    if slices == 1:
        return Membership()
    if slices == world:
        return Membership(FeatureSlice(rank, world, partial(_all_reduce, None)))
    grid = torch.arange(world).view(-1, slices)
    feature_groups, pair_groups = ([dist.new_group(ranks) for ranks in lines.tolist()] for lines in (grid, grid.T))
    node, index = divmod(rank, slices)
    return Membership(FeatureSlice(index, slices, partial(_all_reduce, feature_groups[node])), pair_groups[index])


def _all_reduce(group: dist.ProcessGroup | None, own: Tensor) -> Tensor:
    total = own.clone()
    dist.all_reduce(total, group=group)
    return total
