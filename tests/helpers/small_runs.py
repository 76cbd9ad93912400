"""Small adapters in run folders as `train` leaves them, but fitted by a plain loop, without Ray."""

import json
from pathlib import Path
from typing import Any

import torch

from ray_app.config.base import SplitConfig, flat
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs


def make_run(
    store_folder: Path,
    out: Path,
    *,
    steps: int = 0,
    seed: int = 0,
    strategy: str = "bottleneck",
    split: str = "sequence",
    split_seed: int = 42,
    run_key: str | None = None,
) -> Path:
    """A run with one checkpoint, after so many full-batch steps on the training part."""
    store = PairStore.open(store_folder)
    rows = split_pairs(store.index, SplitConfig(by=split, seed=split_seed)).train
    event, target = (torch.tensor(side) / 255 for side in store.read_rows(rows))
    width = store.feature("event").width
    adapter = build_adapter(AdapterConfig(strategy, width, width, hidden_dim=16, dropout=0.0), seed)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (1 - torch.nn.functional.cosine_similarity(adapter(event), target)).mean().backward()
        optimizer.step()
    cfg = TrainConfig(
        store=store_folder, out=out, strategy=strategy, hidden_dim=16, split=split, split_seed=split_seed
    )
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"name": out.name, "config": flat(cfg)}))
    (out / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/epoch_0001", "epoch": 1}))
    save_checkpoint(
        out / "checkpoints" / "epoch_0001",
        adapter.eval(),
        metrics={},
        provenance={
            "argv": ["ray-app", "train"],
            "dataset_fingerprint": store.fingerprint,
            "run_key": run_key,
        },
        features=store.manifest.features,
    )
    return out


def keys(value: Any, path: str = "") -> set[str]:
    """Every key of a JSON value, by path; items of a list share one."""
    if isinstance(value, dict):
        return {f"{path}.{key}" for key in value}.union(*(keys(item, f"{path}.{key}") for key, item in value.items()))
    if isinstance(value, list):
        return set().union(*(keys(item, f"{path}[]") for item in value))
    return set()
