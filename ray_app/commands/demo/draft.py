"""`ray-app demo draft`: a drafter for the demo's target, one that sees event images or a head on its states.

Each stage leaves a folder that appears whole or not at all, and is skipped where its folder is there:

    OUT.build/settings.json          what is built
    OUT.build/answers/               the target's answers, chunk by chunk
    OUT.build/{train,test}/          rows (pair stores) of drives that are trained on, and of others
    OUT.build/start/                 where training starts
    OUT.build/{exit,events}/         the two training runs
    OUT.build/…_states/, eagle/      the same for a head: rows, start and run
    OUT                              the drafter, for `decode --drafter OUT`
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ray_app.commands.demo.build import claim_work
from ray_app.commands.demo.draft_data import digest_of
from ray_app.commands.demo.draft_training import (
    STATES,
    TEST,
    TRAIN,
    Drafted,
    DraftRecipe,
    FrozenDrafter,
    drafted_by_eagle,
    eagle_settings,
    event_settings,
    exit_settings,
    write_draft_stores,
)
from ray_app.commands.demo.shipped import shipped_target
from ray_app.commands.train.command import run_train
from ray_app.config.demo import DemoDraftConfig
from ray_app.config.train import DraftTrainConfig
from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.bootstrap import interval95, resampled_means, resampled_units
from ray_app.errors import InputError, RunStopped
from ray_app.language_models.draft_rows import DraftLayout, layout_of
from ray_app.language_models.drafter_folder import EAGLE_HEAD, read_drafter, write_drafter
from ray_app.language_models.joined import JoinedModel
from ray_app.language_models.kinds import load
from ray_app.runs.run_dir import RUN
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance
from ray_app.terminal import make_console

RECIPES = {
    "full": DraftRecipe(),
    "small": DraftRecipe(
        drives=12, per_drive=2, exit_rank=4, exit_epochs=1, event_rank=4, event_epochs=1, batch_size=4
    ),
}
"""Recipes by --size."""


def run_demo_draft(cfg: DemoDraftConfig) -> dict[str, Any]:
    """Train what is not trained yet, then measure it; return the --json object.

    InputError: the target is not there, or is no joined folder. StoreError: a folder holds something else. Without
    --target: errors as `shipped_target`.
    """
    folder = (cfg.target or shipped_target(cfg.cache)).absolute()
    if not folder.exists():
        raise InputError(f"{cfg.target} is not there; build it first: ray-app demo build --out {cfg.target}")
    target = load(folder, "float32", "cpu")
    if not isinstance(target, JoinedModel):
        raise InputError(f"{cfg.target} is no target that `demo build` made, whose image tokens a drafter reads.")
    recipe, out, log = RECIPES[cfg.size], cfg.out.absolute(), make_console(stderr=True)
    work = out.with_name(f"{out.name}.build")
    on_states = cfg.kind == EAGLE_HEAD
    settings = {
        "size": cfg.size,
        "seed": cfg.seed,
        **({"kind": cfg.kind} if on_states else {"loss": cfg.loss}),
        "num_test_drives": cfg.num_test_drives,
        "target": digest_of(target.folder),
        **asdict(recipe),
    }
    claim_work(work, settings)
    kept = out.exists()
    log.rule("1/3 the target's own answers about rendered drives, with its distributions")
    write_draft_stores(target, work, recipe, cfg.num_test_drives, cfg.seed, log.print, states=on_states)
    train, test = (PairStore.open(work / (part + STATES * on_states)) for part in (TRAIN, TEST))
    if not kept:
        log.rule("2/3 train the " + ("head" if on_states else "drafter, then image tokens of events through it"))
        parts = _trained(target, work, cfg, recipe)
        origin = {**provenance(["demo", "draft"], train.fingerprint), "settings": settings}
        write_drafter(out, parts, _layout(train), origin)
    log.rule("3/3 measure")
    return {"drafter": str(cfg.out), "kept": kept, **_measured(target, out, test, recipe.per_drive)}


def render_demo_draft(result: dict[str, Any], console: Console) -> None:
    """Print what the drafter drafts."""
    table = Table("shown to the drafter", "tokens per target pass", "95 %")
    for name, each in result["tokens_per_target_pass"].items():
        table.add_row(name, f"{each['mean']:.2f}", "{:.2f} to {:.2f}".format(*each["interval95"]))
    console.print(table)
    console.print(f"{result['pictures']} pictures of rendered drives that nothing was trained on; γ = 8")


def _layout(store: PairStore) -> DraftLayout:
    return layout_of(store.manifest.source, store.folder)


def _trained(target: JoinedModel, work: Path, cfg: DemoDraftConfig, recipe: DraftRecipe) -> list[Adapter]:
    """Train the drafter's parts, or resume, or keep finished runs."""
    places: dict[str, Any] = {
        "language_model": target.text_folder(),
        "seed": cfg.seed,
        "address": cfg.address,
        "tracking_uri": cfg.tracking_uri,
    }
    if cfg.kind == EAGLE_HEAD:
        best = [_run(eagle_settings(recipe, work, out=str(work / "eagle"), **places))]
    else:
        drafter = _run(exit_settings(recipe, work, out=str(work / "exit"), **places))
        weights: dict[str, float] = {cfg.loss: 1.0}
        events = event_settings(recipe, work, weights, out=str(work / "events"), drafter=drafter, **places)
        best = [drafter, _run(events)]
    return [load_checkpoint(each).adapter for each in best]


def _run(settings: DraftTrainConfig) -> Path:
    """Train, or resume the run, or keep a finished one; return its best checkpoint."""
    resume = settings.out if (settings.folder / RUN).is_file() else None
    try:
        return Path(run_train(settings.model_copy(update={"resume": resume}))["checkpoint"])
    except RunStopped as error:
        raise type(error)("interrupted; what was saved is whole: repeat this command to continue.") from None


@torch.no_grad()
def _measured(target: JoinedModel, out: Path, test: PairStore, per_drive: int) -> dict[str, Any]:
    """Return tokens per target pass on drives that nothing was trained on, by what the drafter is shown."""
    drafter, layout, text = read_drafter(out, target), _layout(test), target.text_folder()
    event_NE, rows_NT = (torch.from_numpy(side) for side in test.read_rows(range(len(test.index.sequence))))
    if isinstance(drafter, EagleHead):
        drafted = {"the target's own states": drafted_by_eagle(drafter, text, layout, rows_NT)}
    else:
        frozen = FrozenDrafter(drafter.exit_layers, text, layout)
        tokens_NX = drafter.events(event_NE.float())
        shown = {
            "its event image": tokens_NX,
            "another drive's event image": tokens_NX.roll(per_drive, dims=0),
            "the target's own picture": rows_NT[:, : tokens_NX.shape[1]].float(),
            "mean image tokens": drafter.events.map.target_mean.expand_as(tokens_NX),
            "nothing": None,
        }
        drafted = {name: frozen.along(rows_NT, each) for name, each in shown.items()}
    _, units = resampled_units(test.index.sequence.tolist())

    def rate(each: Drafted) -> dict[str, Any]:
        means_RC = resampled_means(units, [each.tokens_N, each.passes_N], seed=0)
        mean = float(each.tokens_N.sum() / each.passes_N.sum())
        return {"mean": mean, "interval95": interval95(means_RC[:, 0] / means_RC[:, 1])}

    return {
        "tokens_per_target_pass": {name: rate(each) for name, each in drafted.items()},
        "pictures": len(rows_NT),
        "mass_outside": layout.mass_outside,
        "tokens_outside": layout.tokens_outside,
    }
