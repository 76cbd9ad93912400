"""Does the event image draft? Tokens per target pass of one frozen drafter that is shown one thing or another.

    python -m benchmarks.speculative.event_drafter models/demo --work runs/event_drafter

The target is one that `ray-app demo build` made. It answers about drives of its training part, whose answers train a
drafter (its own first layers, with its own picture) and then, with the drafter frozen, image tokens of event images,
by one loss or another. On its states a head is trained, a second kind of drafter. Measured is on 26 rendered drives
that nothing was trained on, four pictures each, γ = 8, with three seeds of training. What is answered and trained is
kept in --work: a repeated command continues. One thread.
Writes benchmarks/results/event_drafter.json; with --drives other than the default, or fewer --seeds, it only prints.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.provenance import require_commit, save
from benchmarks.speculative.demo_target import ThreeGrams
from ray_app.commands.demo.draft_training import (
    START,
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
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, WorkerData, batches_in_memory, train_epochs
from ray_app.config.train import DraftTrainConfig
from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.drafting import ConstantTokens, EagleHead, EarlyExitLayers, EventTokens
from ray_app.core.adapters.registry import num_parameters
from ray_app.core.bootstrap import interval95, resampled_means, resampled_units
from ray_app.core.draft_losses import GAMMA
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.drafters.base import Drafter
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.drafters.replay import replay_rows
from ray_app.language_models.draft_rows import DraftLayout, layout_of, unpack
from ray_app.language_models.kinds import load
from ray_app.runs.event_log import EventLog
from ray_app.runs.run_dir import RunDir
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.atomic import make_folder
from ray_app.store.checkpoint import load_checkpoint, tensor_shapes
from ray_app.store.pair_store import PairStore

SEED, TEST_DRIVES, SEEDS = 0, 26, 3
CPU = torch.device("cpu")
RECIPE = DraftRecipe()
LOSSES: Mapping[str, Mapping[str, float]] = {
    "events, kl": {"kl": 1.0},
    "events, acceptance": {"acceptance": 1.0},
    "events, lk": {"lk": 1.0},
    "events, accepted length": {"accepted_length": 1.0},
    "events, cosine": {"cosine": 1.0},
    "events, kl + cosine": {"kl": 1.0, "cosine": 1.0},
}
FRAME, CONSTANT, OTHERS, MEAN, NOTHING = (
    "the frame itself",
    "best constant",
    "other drives' events",
    "mean",
    "nothing",
)
EVENTS, COSINE, EAGLE = "events, kl", "events, cosine", "eagle head"
DIFFERENCES = (
    *((EVENTS, other) for other in (CONSTANT, OTHERS, COSINE, MEAN, NOTHING, "3-gram", "hybrid")),
    *((f"events, {loss}", COSINE) for loss in ("acceptance", "lk", "accepted length", "kl + cosine")),
    (FRAME, CONSTANT),
    (EAGLE, FRAME),
    (EAGLE, EVENTS),
)


@dataclass(frozen=True, slots=True)
class Part:
    """Answers of one part of the drives."""

    store: PairStore
    """Its pair store."""
    layout: DraftLayout
    """Layout of its rows."""
    event_NE: Tensor
    """Features of the event images, as stored."""
    rows_NT: Tensor
    """Rows, as stored."""

    @classmethod
    def of(cls, folder: Path) -> "Part":
        store = PairStore.open(folder)
        sides = (torch.from_numpy(side) for side in store.read_rows(range(len(store.index.sequence))))
        return cls(store, layout_of(store.manifest.source, folder), *sides)

    @property
    def image_NX(self) -> Tensor:
        """Image tokens of the pictures."""
        return self.rows_NT[:, : self.layout.image_tokens * self.layout.width].float()

    @property
    def answered(self) -> list[AnsweredPrompt]:
        """Answers, for drafters that learn from them."""
        rows = unpack(self.layout, self.rows_NT.float())
        answers = [tuple(ids[used].tolist()) for ids, used in zip(rows.ids_BL, rows.used_BL, strict=True)]
        return [AnsweredPrompt(Prompt(KEY_ELEMENTS, ()), each) for each in answers]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--drives", type=int, default=RECIPE.drives)
    parser.add_argument("--test-drives", type=int, default=TEST_DRIVES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    recipe = replace(RECIPE, drives=asked.drives)
    work = asked.work.absolute()
    folder = asked.target.absolute()
    for states in (False, True):
        if not (work / (START + STATES * states)).exists():
            target = load(folder, "float32", "cpu")
            write_draft_stores(target, work, recipe, asked.test_drives, SEED, print, states=states)
    train, test = Part.of(work / TRAIN), Part.of(work / TEST)
    answered_s = time.process_time() - began
    result = measured(folder / "language_model", work, recipe, train, test, asked.seeds)
    result |= {
        "cpu_seconds": {"answers": answered_s, "all": time.process_time() - began},
        "target": train.layout.target,
    }
    if (asked.drives, asked.test_drives, asked.seeds) == (RECIPE.drives, TEST_DRIVES, SEEDS):
        save("event_drafter", result)
    else:
        print(json.dumps(result, indent=1))


def trained(cfg: DraftTrainConfig, part: Part) -> Adapter:
    """Train in this process by the loop of `train`, or resume; return the best adapter on validation."""
    context = RunContext.of(cfg, part.store)
    split, run = context.split, RunDir(cfg.folder)
    train, val = (
        PairTensors(np.arange(len(rows)), part.event_NE[rows], part.rows_NT[rows])
        for rows in (split.train, split.val)
    )
    order = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    worker = WorkerContext(context, 0, 1, CPU)
    make_folder(cfg.folder)
    with EventLog(cfg.folder) as log:
        data = WorkerData(lambda state: batches_in_memory(train, order, state, worker), True, val)
        train_epochs(worker, run, data, log, {}, lambda *_: None)
    best = run.best()
    assert best is not None
    return load_checkpoint(best).adapter


def measured(
    language_model: Path, work: Path, recipe: DraftRecipe, train: Part, test: Part, seeds: int
) -> dict[str, Any]:
    """Return all numbers."""
    sequences = test.store.index.sequence.tolist()
    unit, units = resampled_units(sequences)
    tables = {
        name: learnt(kind(), train.answered, test.answered)
        for name, kind in (("3-gram", ThreeGrams), ("hybrid", HybridDrafter))
    }
    shown: list[dict[str, Drafted]] = []
    sizes: dict[str, int] = {}
    for seed in range(seeds):
        arms, sizes = of_seed(seed, language_model, work, recipe, train, test)
        shown.append({**arms, **tables})
        print(
            f"seed {seed}:", {name: f"{each.tokens_N.sum() / each.passes_N.sum():.2f}" for name, each in arms.items()}
        )
    resampled = [{name: ratios(each, units) for name, each in of_one.items()} for of_one in shown]
    return {
        "recipe": asdict(recipe),
        "gamma": GAMMA,
        "pictures": len(sequences),
        "resampled": unit,
        "vocabulary": len(train.layout.vocabulary),
        "mass_outside": {"train": train.layout.mass_outside, "test": test.layout.mass_outside},
        "tokens_outside": test.layout.tokens_outside,
        "tokens_mean": float(shown[0][FRAME].tokens_N.mean()),
        "parameters": sizes,
        "by_seed": [numbers(shown[n : n + 1], resampled[n : n + 1]) for n in range(seeds)],
        "all_seeds": numbers(shown, resampled),
    }


def of_seed(
    seed: int, language_model: Path, work: Path, recipe: DraftRecipe, train: Part, test: Part
) -> tuple[dict[str, Drafted], dict[str, int]]:
    """Train a drafter and image tokens by every loss; return what each drafts on the test part, and their sizes."""
    folder = work / f"seed_{seed}"
    places = {"language_model": language_model, "seed": seed}
    exit_cfg = exit_settings(recipe, work, out=str(folder / "exit"), **places)
    drafter = trained(exit_cfg, train)
    assert isinstance(drafter, EarlyExitLayers)
    through = {"drafter": RunDir(exit_cfg.folder).best(), **places}
    event_NE, frozen = test.event_NE.float(), FrozenDrafter(drafter, language_model, test.layout)
    arms: dict[str, Drafted] = {}

    def show(name: str, shown_NX: Tensor | None) -> None:
        arms[name] = frozen.along(test.rows_NT, shown_NX)

    show(FRAME, test.image_NX)
    for name, weights in LOSSES.items():
        out = str(folder / re.sub(r"\W+", "_", name))
        adapter = trained(event_settings(recipe, work, weights, out=out, **through), train)
        with torch.no_grad():
            tokens_NX = adapter(event_NE)
        show(name, tokens_NX)
        if name == EVENTS:
            assert isinstance(adapter, EventTokens)
            events, sizes = (
                adapter,
                {
                    "target": sum(map(math.prod, tensor_shapes(language_model / "model.safetensors").values())),
                    "drafter": frozen.num_parameters,
                    "drafter_trained": num_parameters(drafter),
                    "events_trained": num_parameters(adapter),
                },
            )
            drives = test.store.index.sequence
            assert (drives != np.roll(drives, recipe.per_drive)).all(), "rows are in order of drives"
            show(OTHERS, tokens_NX.roll(recipe.per_drive, dims=0))
    constant = trained(
        event_settings(recipe, work, {"kl": 1.0}, constant=True, out=str(folder / "constant"), **through), train
    )
    assert isinstance(constant, ConstantTokens)
    with torch.no_grad():
        show(CONSTANT, constant(event_NE))
    show(MEAN, events.map.target_mean.expand(len(event_NE), -1))
    show(NOTHING, None)
    on_states = {side: Part.of(work / (side + STATES)) for side in (TRAIN, TEST)}
    head = trained(eagle_settings(recipe, work, out=str(folder / "eagle"), **places), on_states[TRAIN])
    assert isinstance(head, EagleHead)
    seen = on_states[TEST]
    arms[EAGLE] = drafted_by_eagle(head, language_model, seen.layout, seen.rows_NT)
    return arms, sizes | {"eagle_head": num_parameters(head)}


def learnt(drafter: Drafter, answered: Sequence[AnsweredPrompt], asked: Sequence[AnsweredPrompt]) -> Drafted:
    """Let a rule learn answers, and replay others."""
    drafter.fit(answered)
    return replay(drafter, asked)


def replay(drafter: Drafter, asked: Sequence[AnsweredPrompt]) -> Drafted:
    """Replay answers with a rule."""
    rows = replay_rows(drafter, asked, gamma=GAMMA, vocabulary=10**6, clock=time.perf_counter)
    tokens, passes = [float(row.length) for row in rows], [float(len(row.drafted)) for row in rows]
    return Drafted(np.array(tokens), np.array(passes), np.zeros(len(rows)))


def ratios(drafted: Drafted, units: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return tokens per target pass in every resample of the drives, the same resamples for all."""
    means_RC = resampled_means(units, [drafted.tokens_N, drafted.passes_N], SEED)
    return means_RC[:, 0] / means_RC[:, 1]


def numbers(
    shown: Sequence[Mapping[str, Drafted]], resampled: Sequence[Mapping[str, NDArray[np.float64]]]
) -> dict[str, Any]:
    """Return tokens per target pass of every arm, and paired differences: means over seeds, 95 % over drives."""
    point = {
        name: float(np.mean([each[name].tokens_N.sum() / each[name].passes_N.sum() for each in shown]))
        for name in shown[0]
    }
    drawn = {name: np.mean([each[name] for each in resampled], axis=0) for name in shown[0]}
    gap_R = (drawn[EVENTS] - drawn[CONSTANT]) / (drawn[FRAME] - drawn[CONSTANT])
    return {
        "tokens_per_target_pass": {
            name: {
                "mean": point[name],
                "interval95": interval95(drawn[name]),
                "cosine": float(np.mean([each[name].cos_N.mean() for each in shown])),
            }
            for name in point
        },
        "differences": {
            f"{one} − {other}": {
                "mean": point[one] - point[other],
                "interval95": interval95(drawn[one] - drawn[other]),
                "share": point[one] / point[other] - 1.0,
            }
            for one, other in DIFFERENCES
        },
        "gap_closed": {
            "mean": (point[EVENTS] - point[CONSTANT]) / (point[FRAME] - point[CONSTANT]),
            "interval95": interval95(gap_R),
        },
    }


if __name__ == "__main__":
    require_commit()
    main()
