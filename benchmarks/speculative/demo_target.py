"""Sight of a target that `ray-app demo build` made, and how hard its language is for a table of n-grams.

    python -m benchmarks.speculative.demo_target models/demo

Rendered scenes: 26 drives that nothing was trained on, four pictures each. The tables learn the target's own greedy
answers about drives of the training part, and are replayed on its answers about the held-out ones. Writes
benchmarks/results/demo_target.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import require_commit, save
from ray_app.commands.demo.answers import TRAINING, features_of, pictures
from ray_app.commands.demo.build import probe_of
from ray_app.commands.demo.evaluate import PER_DRIVE, held_out
from ray_app.commands.demo.sight import Said, ask, judge
from ray_app.commands.demo.target import PROVENANCE, demo_encoder
from ray_app.core.bootstrap import interval95, resampled_means, resampled_units
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.ngram import NgramDrafter
from ray_app.drafters.replay import replay_rows
from ray_app.language_models.kinds import load
from ray_app.parsing.json_text import parse_object
from ray_app.scenes.captions import KEY_ELEMENTS

SEED, TEST_DRIVES, TRAIN_DRIVES = 0, 26, 60
GAMMA = 8


class ThreeGrams(NgramDrafter):
    """A table of 3-grams: the most frequent token behind the last two."""

    name = "3-gram"
    order = 2


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    folder = parser.parse_args().target
    torch.set_num_threads(1)
    target, encoder = load(folder, "float32", "cpu"), demo_encoder(folder / "encoder")
    probe, majority = probe_of(folder)
    some = held_out(SEED, TEST_DRIVES)
    sight = judge(target, some, majority, probe.answers(features_of(encoder, some)), SEED)
    learnt = ask(target, list(pictures(SEED, TRAINING, TRAIN_DRIVES, PER_DRIVE)), KEY_ELEMENTS)
    said = ask(target, some, KEY_ELEMENTS)
    drives = [each.sequence for each in some]
    save(
        "demo_target",
        {
            "build": parse_object((folder / PROVENANCE).read_bytes()),
            "sight": sight,
            "drafters": {
                kind.name: tokens_per_pass(kind, learnt, said, drives, target.end_token)
                for kind in (ThreeGrams, NgramDrafter)
            },
        },
    )


def tokens_per_pass(
    kind: type[NgramDrafter], learnt: Said, said: Said, drives: list[str], end_token: int
) -> dict[str, Any]:
    """Return tokens per target pass of a drafter that learnt one part's answers, on the other's, 95 % over drives."""
    drafter = kind()
    drafter.fit([AnsweredPrompt(Prompt(KEY_ELEMENTS, ()), (*tokens, end_token)) for tokens in learnt.tokens])
    rows = [AnsweredPrompt(Prompt(KEY_ELEMENTS, ()), (*tokens, end_token)) for tokens in said.tokens]
    replayed = replay_rows(drafter, rows, gamma=GAMMA, vocabulary=10**6, clock=time.perf_counter)
    tokens_N = np.array([float(row.length) for row in replayed])
    passes_N = np.array([float(len(row.drafted)) for row in replayed])
    _, units = resampled_units(drives)
    means_RC = resampled_means(units, [tokens_N, passes_N], SEED)
    return {
        "tokens_per_target_pass": float(tokens_N.sum() / passes_N.sum()),
        "interval95": interval95(means_RC[:, 0] / means_RC[:, 1]),
        "learnt_texts": len(set(learnt.texts)),
        "num_learnt": len(learnt.texts),
    }


if __name__ == "__main__":
    require_commit()
    main()
