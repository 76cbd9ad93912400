"""Drafters whose drafts are read from a script: right, wrong, empty, too long, beyond the end."""

from collections.abc import Sequence

import numpy as np

from ray_app.core.speculative.decoding import Proposal


class ScriptedDrafts:
    """Drafts the target's own answer with faults: each token is wrong with chance `wrong`, each length is random."""

    def __init__(self, answer: Sequence[int], vocabulary: int, wrong: float, rng: np.random.Generator) -> None:
        self._answer, self._vocabulary, self._wrong, self._rng = tuple(answer), vocabulary, wrong, rng
        self.asked: list[int] = []

    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        assert tuple(accepted) == self._answer[: len(accepted)], "what was accepted is not the target's own"
        self.asked.append(num_tokens)
        size = int(self._rng.integers(0, num_tokens + 4))  # nothing at all, fewer than asked for, or more
        right = (*self._answer[len(accepted) :], *self._rng.integers(0, self._vocabulary, size).tolist())[:size]
        faulty = self._rng.random(size) < self._wrong
        drawn = self._rng.integers(0, self._vocabulary, size)
        return Proposal(tuple(int(b) if bad else a for a, b, bad in zip(right, drawn, faulty, strict=True)))
