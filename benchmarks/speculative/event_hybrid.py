"""Do events help a drafter that learns from answers? `hybrid` alone, and with the distribution of one that sees.

    python -m benchmarks.speculative.event_hybrid models/demo --work runs/event_drafter

After `benchmarks.speculative.event_drafter`, whose --work this is, with its drafters of every seed. The probabilities
that `hybrid` and the drafter give for a token are multiplied as `decode` does, by the rule of
`ray_app/core/speculative/product.py`. Answers are replayed: the drafter is run once along each. Writes
benchmarks/results/event_hybrid.json.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.provenance import require_commit, save
from benchmarks.speculative.event_drafter import SEED, Part, ratios, replay
from ray_app.commands.demo.draft_training import TEST, TRAIN, Drafted, FrozenDrafter
from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.bootstrap import interval95, resampled_units
from ray_app.core.speculative.product import likeliest, product
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.base import Draft, Drafter
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.runs.run_dir import RunDir
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.checkpoint import load_checkpoint

HYBRID, ALONE = "hybrid", "drafter alone, events"


class WithDrafter(Drafter):
    """`hybrid` times a drafter's distributions, which are known along each answer."""

    name = "hybrid with a drafter"

    def __init__(self, hybrid: HybridDrafter, ids: Sequence[int], q: Mapping[str, NDArray[np.float64]]) -> None:
        """`q` by the prompt's sequence: probabilities of the ids at each token, (A, I)."""
        self._hybrid, self._ids, self._q = copy.deepcopy(hybrid), list(ids), q
        self.asked: Counter[int] = Counter()
        """Tokens for which the drafter was asked, by the length of the draft."""

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        text, q_AI = list(accepted), self._q[prompt.sequence]

        def ask() -> dict[int, float]:
            self.asked[num_tokens] += 1
            return dict(zip(self._ids, q_AI[len(text)].tolist(), strict=True))

        while len(text) < min(len(accepted) + num_tokens, len(q_AI)):
            text.append(likeliest(product(self._hybrid.expected(prompt, text), ask)))
        return Draft(text[len(accepted) :])

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        self._hybrid.update(prompt, answer)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    language_model, work = asked.target.absolute() / "language_model", asked.work.absolute()
    train, test = Part.of(work / TRAIN), Part.of(work / TEST)
    answers = [
        AnsweredPrompt(Prompt(KEY_ELEMENTS, (), sequence=str(row)), each.answer)
        for row, each in enumerate(test.answered)
    ]
    hybrid = HybridDrafter()
    hybrid.fit(train.answered)
    alone = replay(copy.deepcopy(hybrid), answers)
    seeds = sorted(work.glob("seed_*"))
    by_seed = [{HYBRID: alone, **of_seed(folder, language_model, hybrid, answers, test)} for folder in seeds]
    _, units = resampled_units(test.store.index.sequence.tolist())
    drawn = {name: np.mean([ratios(each[name], units) for each in by_seed], axis=0) for name in by_seed[0]}
    point = {
        name: [float(each[name].tokens_N.sum() / each[name].passes_N.sum()) for each in by_seed]
        for name in by_seed[0]
    }
    save(
        "event_hybrid",
        {
            "seeds": len(seeds),
            "seed_of_resamples": SEED,
            "tokens_per_target_pass": {
                name: {"mean": float(np.mean(each)), "interval95": interval95(drawn[name]), "by_seed": each}
                for name, each in point.items()
            },
            "over_hybrid": {
                name: {
                    "mean": float(np.mean(each) - point[HYBRID][0]),
                    "interval95": interval95(drawn[name] - drawn[HYBRID]),
                }
                for name, each in point.items()
                if name != HYBRID
            },
        },
    )


@torch.no_grad()
def of_seed(
    folder: Path, language_model: Path, hybrid: HybridDrafter, answers: Sequence[AnsweredPrompt], test: Part
) -> dict[str, Drafted]:
    """Return what `hybrid` drafts with the drafter of a seed, by what that is shown."""
    drafter, events, constant = (
        load_checkpoint(best).adapter
        for name in ("exit", "events_kl", "constant")
        if (best := RunDir(folder / name).best())
    )
    assert isinstance(drafter, EarlyExitLayers)
    event_NE = test.event_NE.float()
    shown: dict[str, Tensor | None] = {
        "hybrid with the drafter, events": events(event_NE),
        "· the target's own picture": test.image_NX,
        "· best constant": constant(event_NE),
        "· nothing": None,
    }
    frozen = FrozenDrafter(drafter, language_model, test.layout)
    found: dict[str, Drafted] = {ALONE: frozen.along(test.rows_NT, shown["hybrid with the drafter, events"])}
    for name, shown_NX in shown.items():
        q = {str(row): q_AI for row, q_AI in enumerate(frozen.probabilities(test.rows_NT, shown_NX))}
        found[name] = replay(WithDrafter(hybrid, test.layout.vocabulary, q), answers)
    return found


if __name__ == "__main__":
    require_commit()
    main()
