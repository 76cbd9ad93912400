"""Tree drafts against chains of as many tokens: `hybrid` on recorded outputs, and the time of SmolLM2's passes.

    python -m benchmarks.speculative.trees SMOLLM2 ../shared/data/tokens/dsec_test_1s*.jsonl

A tree holds the most likely continuations by the drafter's own probabilities, and the target follows one of its
branches. A pass over a tree costs at least what one over as many tokens in a row costs, and making the tree costs at
least what the chain does: neither is charged here, so that the gain is the most that trees can bring. Writes
benchmarks/results/trees.json.
"""

import heapq
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import require_commit, save
from ray_app.core.speculative.metrics import block_bootstrap
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.core.speculative.verification import accepted_prefix
from ray_app.drafters.hybrid import HybridDrafter, ScoredPosition
from ray_app.drafters.recorded_states import answers
from ray_app.language_models.kinds import load
from ray_app.store.traces import read_traces

SIZES = (2, 4, 8, 16)
"""Drafted tokens of a pass, in a row or in a tree."""
NUM_LEARN, NUM_ROWS, BLOCK_ROWS = 140, 400, 20
REPEATS = 9
QUESTION = "Rewrite in one short sentence: The image shows a city street at night with a tram and several cars."


class TreeHybrid(HybridDrafter):
    """`hybrid` that keeps what it thought about every text of a row, and draws trees of it."""

    def __init__(self) -> None:
        super().__init__()
        self._by_text: dict[tuple[int, ...], ScoredPosition] = {}

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        super().update(prompt, answer)
        self._by_text.clear()

    def _scored(self, text: tuple[int, ...]) -> ScoredPosition:
        if text not in self._by_text:
            self._by_text[text] = self._score(text)
        return self._by_text[text]

    def tree(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> set[tuple[int, ...]]:
        """Return the likeliest continuations of up to so many tokens in all, each with all that it begins with."""
        self._turn_to(prompt)
        ahead: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
        paths: set[tuple[int, ...]] = set()
        while ahead and len(paths) <= num_tokens:
            chance, path = heapq.heappop(ahead)
            paths.add(path)
            scores = self._scored((*accepted, *path)).scores
            top = max(scores.values(), default=0.0)
            odds = {token: math.exp(score - top) for token, score in scores.items()}
            total = sum(odds.values())
            for token, odd in odds.items():
                heapq.heappush(ahead, (chance * odd / total, (*path, token)))
        return paths - {()}


def main() -> None:
    """Replay, measure passes, and write the result."""
    torch.set_num_threads(1)
    rows = answers(read_traces(Path(sys.argv[2]), 32_000, 2))
    drafter = TreeHybrid()
    drafter.fit(rows[:NUM_LEARN])
    sums_SM = np.zeros((math.ceil(NUM_ROWS / BLOCK_ROWS), 1 + 2 * len(SIZES)))
    for n, each in enumerate(rows[NUM_LEARN : NUM_LEARN + NUM_ROWS]):
        passes = [count(drafter, each, size, tree) for tree in (False, True) for size in SIZES]
        sums_SM[n // BLOCK_ROWS] += [len(each.answer), *passes]
        drafter.update(each.prompt, each.answer)
    tokens_2G = (sums_SM[:, :1].sum() / sums_SM[:, 1:].sum(axis=0)).reshape(2, len(SIZES))

    def gains(total_KM: np.ndarray) -> np.ndarray:
        gain_KG: np.ndarray = total_KM[:, 1 : 1 + len(SIZES)] / total_KM[:, 1 + len(SIZES) :] - 1.0
        return gain_KG

    low_G, high_G = block_bootstrap(sums_SM, gains, np.random.default_rng(0))
    by_size = {
        str(size): {
            "chain": float(tokens_2G[0, n]),
            "tree": float(tokens_2G[1, n]),
            "gain": float(tokens_2G[1, n] / tokens_2G[0, n] - 1.0),
            "interval95": [float(low_G[n]), float(high_G[n])],
        }
        for n, size in enumerate(SIZES)
    }
    speeds = {dtype: best(by_size, pass_ms(Path(sys.argv[1]), dtype)) for dtype in ("float32", "bfloat16")}
    save("trees", {"rows": NUM_ROWS, "tokens_per_target_pass": by_size, "speed": speeds})


def count(drafter: TreeHybrid, each: AnsweredPrompt, size: int, tree: bool) -> int:
    """Return the number of passes that an answer takes."""
    place = passes = 0
    while place < len(each.answer):
        accepted = each.answer[:place]
        if tree:
            paths, path = drafter.tree(each.prompt, accepted, size), ()
            while (longer := each.answer[place : place + len(path) + 1]) in paths and longer != path:
                path = longer
            place += len(path) + 1
        else:
            place += accepted_prefix(drafter.draft(each.prompt, accepted, size).tokens, each.answer, place) + 1
        passes += 1
    return passes


def pass_ms(folder: Path, dtype: str) -> dict[int, float]:
    """Return the median milliseconds of a pass by the number of tokens that it reads."""
    model = load(folder, dtype, "cpu")
    context = model.context()
    context.prefill(model.prefix(model.prompt(None, QUESTION)))
    took: dict[int, list[float]] = {1: [], **{size + 1: [] for size in SIZES}}
    for _ in range(REPEATS):
        for size, times in took.items():
            began = time.perf_counter()
            context.step([5] * size)
            times.append(1e3 * (time.perf_counter() - began))
            context.crop(size)
    return {size: statistics.median(times) for size, times in took.items()}


def best(by_size: dict[str, Any], milliseconds: dict[int, float]) -> dict[str, Any]:
    """Return the highest speed of both kinds of drafts, in plain decoding's, each at its best size."""
    speed = {
        kind: {size: by_size[str(size)][kind] * milliseconds[1] / milliseconds[size + 1] for size in SIZES}
        for kind in ("chain", "tree")
    }
    size_of = {kind: max(values, key=values.__getitem__) for kind, values in speed.items()}
    chain, tree = (speed[kind][size_of[kind]] for kind in ("chain", "tree"))
    return {
        "pass_ms": {str(size): ms for size, ms in milliseconds.items()},
        "chain": chain,
        "tree": tree,
        "chain_size": size_of["chain"],
        "tree_size": size_of["tree"],
        "gain": tree / chain - 1.0,
    }


if __name__ == "__main__":
    require_commit()
    main()
