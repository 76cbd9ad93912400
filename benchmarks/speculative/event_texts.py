"""Which texts should a drafter learn from? The target's own answers, or true captions of the same pictures.

    python -m benchmarks.speculative.event_texts models/demo --work runs/event_drafter

After `benchmarks.speculative.event_drafter`, whose --work this is: its drafters have learnt the target's own answers
by KL. Here drafters learn by cross-entropy from the answers, and from the renderer's captions of the same pictures.
All draft along the target's answers about the drives that nothing was trained on, with the target's own picture. What
is trained is kept in --work: a repeated command continues. One thread. Writes benchmarks/results/event_texts.json;
with fewer --seeds it only prints.

Shapes: N = pictures, T = width of a row, A = tokens of a text, I = ids of a drafter's head.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import require_commit, save
from benchmarks.speculative.event_drafter import RECIPE, SEED, SEEDS, Part, ratios, trained
from ray_app.commands.demo.answers import TRAINING, pictures
from ray_app.commands.demo.draft_data import head_of
from ray_app.commands.demo.draft_training import (
    EXIT_START,
    TEST,
    TRAIN,
    Drafted,
    FrozenDrafter,
    exit_settings,
)
from ray_app.config.train import DraftTrainConfig
from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.bootstrap import interval95, resampled_units
from ray_app.data.array_store import write_store
from ray_app.language_models.draft_objective import GAMMA
from ray_app.language_models.draft_rows import KEY, DraftLayout, pack
from ray_app.language_models.kinds import load
from ray_app.scenes.captions import KEY_ELEMENTS, answer
from ray_app.scenes.scene import RENDERER
from ray_app.store.checkpoint import save_verifiable

CAPTIONS, CAPTIONS_START = "captions", "captions_start"
KL, ANSWERS, TEXTS = "answers, kl", "answers, cross_entropy", "captions, cross_entropy"
DIFFERENCES = ((KL, ANSWERS), (KL, TEXTS), (ANSWERS, TEXTS))


def main() -> None:
    """Train, measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder, work = asked.target.absolute(), asked.work.absolute()
    train, test = Part.of(work / TRAIN), Part.of(work / TEST)
    if not (work / CAPTIONS_START).exists():
        write_captions(folder, work, train)
    captions = Part.of(work / CAPTIONS)
    as_captions = widened(test, captions.layout.vocabulary)
    by_seed: list[Mapping[str, Drafted]] = []
    for seed in range(asked.seeds):
        drafted: dict[str, Drafted] = {}
        for name, cfg in settings(work, folder / "language_model", seed).items():
            drafter = trained(cfg, captions if name == TEXTS else train)
            assert isinstance(drafter, EarlyExitLayers)
            layout, rows_NT = as_captions if name == TEXTS else (test.layout, test.rows_NT)
            each = FrozenDrafter(drafter, folder / "language_model", layout).along(rows_NT, test.image_NX)
            print(f"seed {seed}, {name}: {each.tokens_N.sum() / each.passes_N.sum():.2f} tokens per target pass")
            drafted[name] = each
        by_seed.append(drafted)
    own, said = set(train.layout.vocabulary), set(captions.layout.vocabulary)
    texts = [each.answer for each in captions.answered]
    result = {
        "target": train.layout.target,
        "gamma": GAMMA,
        "texts": len(texts),
        "tokens_of_a_text": {
            "answers": float(np.mean([len(each.answer) for each in train.answered])),
            "captions": float(np.mean([len(text) for text in texts])),
        },
        "same_texts": sum(
            one.answer == other.answer for one, other in zip(train.answered, captions.answered, strict=True)
        ),
        "ids": {"answers": len(own), "answers or captions": len(said)},
        **numbers(by_seed, test.store.index.sequence.tolist()),
    }
    if asked.seeds == SEEDS:
        save("event_texts", result)
    else:
        print(json.dumps(result, indent=1))


def write_captions(target: Path, work: Path, train: Part) -> None:
    """Write the store of captions and the head that training on it starts from, of the ids of answers and captions.

    A row has the event image and the picture of the same row of `train`, and all probability on the caption's tokens.
    """
    model, index = load(target, "float32", "cpu"), train.store.index
    texts = [[*ids, model.end_token] for ids in _captions(model.tokenizer, train)]
    vocabulary = sorted({*train.layout.vocabulary, *(token for text in texts for token in text)})
    changes = {"vocabulary": vocabulary, "length": max(map(len, texts)), "mass_outside": 0.0, "tokens_outside": 0.0}
    layout = DraftLayout.model_validate(train.layout.model_dump() | changes)
    place = {token: at for at, token in enumerate(vocabulary)}
    one_hot_II = np.eye(len(vocabulary))
    write_store(
        work / CAPTIONS,
        (
            {
                "event": train.event_NE[row].numpy(),
                "target": pack(layout, train.image_NX[row].numpy(), text, one_hot_II[[place[each] for each in text]]),
                "sequence": str(index.sequence[row]),
                "t_start_us": int(index.t_start_us[row]),
                "t_end_us": int(index.t_end_us[row]),
            }
            for row, text in enumerate(texts)
        ),
        source={"name": "captions", "renderer": RENDERER, "seed": SEED, KEY: layout.model_dump(mode="json")},
    )
    save_verifiable(work / CAPTIONS_START, {EXIT_START: {"head": head_of(model, vocabulary)}}, {})


def _captions(tokenizer: Any, train: Part) -> Iterator[list[int]]:
    """Yield the tokens of a true caption of each row's picture."""
    index = train.store.index
    drives = len(set(index.sequence.tolist()))
    shown = pictures(SEED, TRAINING, drives, len(index.sequence) // drives)
    for row, picture in enumerate(shown):
        assert (picture.sequence, picture.t_us) == (index.sequence[row], index.t_start_us[row]), "the same picture"
        text = answer(picture.facts, KEY_ELEMENTS, SEED + row)
        yield tokenizer(text, add_special_tokens=False)["input_ids"]


def widened(part: Part, vocabulary: tuple[int, ...]) -> tuple[DraftLayout, Tensor]:
    """Return layout and rows (N, T) of a part for a larger vocabulary, with no probability at the ids it adds."""
    layout = part.layout.model_copy(update={"vocabulary": vocabulary})
    places = [vocabulary.index(token) for token in part.layout.vocabulary]
    size = layout.length * len(places)
    front_NX, p_NX = part.rows_NT.split([part.layout.row_width - size, size], dim=1)
    wide_NLI = p_NX.new_zeros(len(p_NX), layout.length, len(vocabulary))
    wide_NLI[:, :, places] = p_NX.unflatten(1, (layout.length, -1))
    return layout, torch.cat([front_NX, wide_NLI.flatten(1)], dim=1)


def settings(work: Path, language_model: Path, seed: int) -> dict[str, DraftTrainConfig]:
    """Return the settings of every drafter of a seed; the first is that of `event_drafter`."""

    def to(name: str) -> DraftTrainConfig:
        out = str(work / f"seed_{seed}" / name)
        return exit_settings(RECIPE, work, out=out, language_model=language_model, seed=seed)

    by_tokens = {"kl_weight": 0.0, "cross_entropy_weight": 1.0}
    of_captions = {"store": str(work / CAPTIONS), "projector_start": work / CAPTIONS_START / EXIT_START}
    return {
        KL: to("exit"),
        ANSWERS: to("exit_cross_entropy").model_copy(update=by_tokens),
        TEXTS: to("exit_captions").model_copy(update=by_tokens | of_captions),
    }


def numbers(by_seed: list[Mapping[str, Drafted]], sequences: list[str]) -> dict[str, Any]:
    """Return tokens per target pass, and paired differences: means over seeds, 95 % over drives."""
    unit, units = resampled_units(sequences)
    drawn = {name: np.mean([ratios(each[name], units) for each in by_seed], axis=0) for name in by_seed[0]}
    seeds = {
        name: [float(each[name].tokens_N.sum() / each[name].passes_N.sum()) for each in by_seed]
        for name in by_seed[0]
    }
    return {
        "pictures": len(sequences),
        "resampled": unit,
        "tokens_per_target_pass": {
            name: {"mean": float(np.mean(each)), "interval95": interval95(drawn[name]), "by_seed": each}
            for name, each in seeds.items()
        },
        "differences": {
            f"{one} − {other}": {
                "mean": float(np.mean(seeds[one]) - np.mean(seeds[other])),
                "interval95": interval95(drawn[one] - drawn[other]),
                "by_seed": [a - b for a, b in zip(seeds[one], seeds[other], strict=True)],
            }
            for one, other in DIFFERENCES
        },
    }


if __name__ == "__main__":
    require_commit()
    main()
