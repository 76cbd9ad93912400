"""The build folder of `demo draft`, of tiny models, with drafters that nothing was trained for."""

from pathlib import Path
from typing import Any

import tiny_target
import torch
import yaml

from ray_app.commands.demo.draft_training import TEST, TRAIN, DraftRecipe, exit_settings, write_draft_stores
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.state import resume_or_init
from ray_app.config.base import flat
from ray_app.config.train import DraftTrainConfig
from ray_app.config.tune import TOKENS
from ray_app.core.adapters.drafting import EventTokens
from ray_app.language_models.kinds import load
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.pair_store import PairStore

RECIPE = DraftRecipe(drives=5, per_drive=2, exit_layers=1, exit_rank=2, event_rank=3, batch_size=4)
SPACE: dict[str, Any] = {"kl_weight": [0.0, 1.0], "cosine_weight": [0.0, 1.0], "rank": [2, 3]}


def write_work(folder: Path) -> Path:
    """Stores, starts, and a drafter in `exit`; the language model next to them. Two pictures of each drive."""
    target = load(tiny_target.save_target(folder), "float32", "cpu")
    write_draft_stores(target, folder, RECIPE, 3, 0, lambda _: None)
    cfg = exit_settings(RECIPE, folder, out=str(folder / "none"), language_model=folder / "language_model")
    save_part(folder / "exit", cfg)
    return folder


def save_part(folder: Path, cfg: DraftTrainConfig) -> Path:
    """A checkpoint that says it was trained by these settings; event tokens differ from event to event."""
    store = PairStore.open(cfg.store)
    adapter = resume_or_init(RunContext.of(cfg, store), None, torch.device("cpu")).objective.adapter.eval()
    if isinstance(adapter, EventTokens):
        with torch.no_grad():
            adapter.map.output.weight.normal_(generator=torch.Generator().manual_seed(cfg.seed))
    origin = {"config": flat(cfg), "dataset_fingerprint": store.fingerprint}
    save_checkpoint(folder, adapter, metrics={}, provenance=origin, features=store.manifest.features)
    return folder


def draft_sweep_file(folder: Path, work: Path, **lines: Any) -> Path:
    """File of a sweep of event tokens; arguments replace or add keys, those named `base_…` keys of `base`."""
    base = {
        "strategy": "event_tokens",
        "exit_layers": 1,
        "drafter": str(work / "exit"),
        "language_model": str(work / "language_model"),
        "projector_start": str(work / "start" / "event.safetensors"),
        "batch_size": 4,
        **{name.removeprefix("base_"): lines.pop(name) for name in list(lines) if name.startswith("base_")},
    }
    sweep = {
        "store": str(work / TRAIN),
        "out": str(folder / "sweep"),
        "test_store": str(work / TEST),
        "test_share": 0.01,
        "val_share": 0.1,
        "base": {name: value for name, value in base.items() if value is not None},
        "space": SPACE,
        "objective": TOKENS,
    }
    path = folder / "drafting.yaml"
    path.write_text(yaml.safe_dump(sweep | lines))
    return path
