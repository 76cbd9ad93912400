"""The build folder of `demo draft`, of tiny models, with drafters that nothing or little was trained for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_target
import torch
import yaml
from torch import Tensor

from ray_app.commands.demo.answers import TRAINING
from ray_app.commands.demo.draft_training import (
    STATES,
    TEST,
    TRAIN,
    DraftRecipe,
    exit_settings,
    write_draft_stores,
)
from ray_app.commands.demo.sight import MAX_NEW_TOKENS
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.state import resume_or_init
from ray_app.config.base import flat
from ray_app.config.train import DraftTrainConfig
from ray_app.config.tune import TOKENS
from ray_app.core.adapters.drafting import EagleHead, EventTokens
from ray_app.core.draft_losses import GAMMA
from ray_app.core.speculative.decoding import Decoded, FixedGamma, Gamma, Greedy, Proposer, decode
from ray_app.language_models.draft_rows import DraftLayout, layout_of
from ray_app.language_models.kinds import load
from ray_app.language_models.model import Context, LanguageModel
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.checkpoint import load_training_state, save_checkpoint
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


def rows_in(store: Path) -> tuple[DraftLayout, Tensor, Tensor]:
    """Layout of a store's rows, features of its event images, and its rows."""
    opened = PairStore.open(store)
    event_NE, rows_NT = opened.read_rows(range(len(opened.index.sequence)))
    return layout_of(opened.manifest.source, store), torch.from_numpy(event_NE), torch.from_numpy(rows_NT)


def exact_rows(work: Path) -> Tensor:
    """The training rows with the states as the target's passes gave them, without rounding to half precision."""
    layout, _, rows_NT = rows_in(work / (TRAIN + STATES))
    (folder,) = (work / "answers").glob(f"part_{TRAINING}_*")
    tensors, about = load_training_state(folder)
    states_NLD = torch.zeros(len(rows_NT), layout.length, layout.width)
    lengths = [len(each) for each in about["answers"]]
    for number, states_AD in enumerate(tensors["states"].split(lengths)):
        states_NLD[number, : len(states_AD)] = states_AD
    return torch.cat([rows_NT[:, : -states_NLD[0].numel()].float(), states_NLD.flatten(1)], dim=1)


def some_head(cfg: DraftTrainConfig, seed: int = 0, noise: float = 0.1) -> EagleHead:
    """A head whose weights are not where they begin."""
    adapter = resume_or_init(
        RunContext.of(cfg, PairStore.open(cfg.store)), None, torch.device("cpu")
    ).objective.adapter
    assert isinstance(adapter, EagleHead)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    return adapter.eval()


def head_that_knows(cfg: DraftTrainConfig, rows_NT: Tensor) -> EagleHead:
    """A head that has learnt some answers."""
    context = RunContext.of(cfg, PairStore.open(cfg.store))
    objective = resume_or_init(context, None, torch.device("cpu")).objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        objective.losses(rows_NT[:, :0], rows_NT)["loss"].mean().backward()
        optimizer.step()
    assert isinstance(objective.adapter, EagleHead)
    return objective.adapter.eval()


def decoded(
    target: LanguageModel, image_HWC: Any, proposer: Callable[[Context], Proposer], gamma: Gamma | None = None
) -> Decoded:
    """The answer about a picture, drafted live; γ is the one of training."""
    context = target.context()
    return decode(
        context,
        target.prefix(target.prompt(image_HWC[None], KEY_ELEMENTS)),
        proposer(context),
        choice=Greedy(),
        gamma=gamma or FixedGamma(GAMMA),
        max_new_tokens=MAX_NEW_TOKENS,
        end_token=target.end_token,
        clock=lambda: 0.0,
    )
