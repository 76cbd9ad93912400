"""Drafter of the answer whose EventGPT output is nearest."""

from collections.abc import Sequence
from itertools import pairwise

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.base import NOTHING, Draft, Drafter
from ray_app.drafters.previous_window import Continuation


class RetrievalDrafter(Drafter):
    """The answer whose EventGPT output is nearest: the most word pairs in common, of equal ones the latest."""

    name = "retrieval"
    needs_event_tokens = True
    learns_online = True

    def __init__(self) -> None:
        self._known: list[tuple[frozenset[tuple[int, int]], tuple[int, ...]]] = []
        self._found: tuple[Prompt, Continuation] | None = None

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        for each in answered:
            self.update(each.prompt, each.answer)

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        if not self._known:
            return NOTHING
        if self._found is None or self._found[0] is not prompt:
            mine = _word_pairs(prompt.event_tokens)
            nearest = max(range(len(self._known)), key=lambda n: (_jaccard(mine, self._known[n][0]), n))
            self._found = (prompt, Continuation(self._known[nearest][1]))
        return Draft(self._found[1].behind(accepted, num_tokens))

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        self._known.append((_word_pairs(prompt.event_tokens), tuple(answer)))
        self._found = None


def _word_pairs(tokens: Sequence[int]) -> frozenset[tuple[int, int]]:
    return frozenset(pairwise(tokens))


def _jaccard(a: frozenset[tuple[int, int]], b: frozenset[tuple[int, int]]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0
