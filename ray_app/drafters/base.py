"""Drafters: who proposes the next tokens of the target's answer. One interface, a table of small classes.

A drafter sees the question, EventGPT's tokens, and the accepted part of the answer; never what comes behind it.
`fit` gets answers of other sequences, `update` each answer once it is whole, as a running deployment would have it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError

SUM_TOLERANCE = 1e-6
"""How far from one a drafter's probabilities may sum: they are float64."""
States = NDArray[np.float32]
"""A model's last hidden state for each token of its answer, shape (T, D): what the token was chosen from."""
START = -1
"""Stands before the first token of every answer in n-grams."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What both models were asked, and what EventGPT answered."""

    question: str
    """As asked."""
    event_tokens: tuple[int, ...]
    """EventGPT's own output."""
    event_states: States | None = field(default=None, compare=False, repr=False)
    """EventGPT's states, where they were captured."""
    aligned_states: States | None = field(default=None, compare=False, repr=False)
    """The same after an adapter: in the target's space."""
    sequence: str = ""
    """The continuous drive that the window is from, where it is named."""


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt with the target's answer."""

    prompt: Prompt
    """What was asked."""
    answer: tuple[int, ...]
    """The target's tokens."""
    target_states: States | None = field(default=None, compare=False, repr=False)
    """The target's states, where they were captured."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A drafter's probabilities for one place; tokens that are not named have none. InputError: no distribution."""

    tokens: tuple[int, ...]
    """Most likely first."""
    probabilities: tuple[float, ...]
    """One for each token."""

    def __post_init__(self) -> None:
        total = sum(self.probabilities)
        if len(self.tokens) != len(self.probabilities) or not abs(total - 1.0) <= SUM_TOLERANCE:
            raise InputError(
                f"{len(self.probabilities)} probabilities of {len(self.tokens)} tokens sum to {total:.6g}, not "
                "to one; give the drafter's softmax as it is."
            )
        if min(self.probabilities) < 0.0 or len(set(self.tokens)) != len(self.tokens):
            raise InputError("a distribution has a negative probability, or names a token twice.")

    @staticmethod
    def of(counts: Counter[int]) -> "Distribution":
        """Shares of counts; equal counts in order of first sight."""
        ranked, total = counts.most_common(), counts.total()
        return Distribution(tuple(t for t, _ in ranked), tuple(n / total for _, n in ranked))


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens."""

    tokens: Sequence[int]
    """At most as many as asked for."""
    probabilities: Sequence[Distribution] | None = None
    """One for each token, from drafters that have them."""


NOTHING = Draft(())


class Drafter:
    """The interface, and the rule that drafts nothing."""

    name: ClassVar[str] = "none"
    learns_online: ClassVar[bool] = False
    """Whether answers that were accepted during the replay change its drafts."""
    needs_event_tokens: ClassVar[bool] = False
    """Whether EventGPT must have run before it can draft."""
    needs_states: ClassVar[bool] = False
    """Whether it drafts from captured states, and drafts nothing without them."""

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        """Learns from other sequences; called once, before anything else."""

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:  # noqa: ARG002
        """What may follow the accepted part of the answer: at most `num_tokens`."""
        return NOTHING

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """Learns from an answer of this sequence that is now whole."""


class EventGptDrafter(Drafter):
    """EventGPT's tokens as they are, place for place."""

    name = "eventgpt"
    needs_event_tokens = True

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        return Draft(prompt.event_tokens[len(accepted) : len(accepted) + num_tokens])


class PositionalDrafter(Drafter):
    """The most frequent token of each place in the answers to the same question."""

    name = "positional"

    def __init__(self) -> None:
        self._tables: dict[str, tuple[tuple[int, ...], tuple[Distribution, ...]]] = {}

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        counts: dict[str, list[Counter[int]]] = {}
        for each in answered:
            places = counts.setdefault(each.prompt.question, [])
            places.extend(Counter() for _ in range(len(each.answer) - len(places)))
            for place, token in enumerate(each.answer):
                places[place][token] += 1
        for question, places in counts.items():
            rows = tuple(Distribution.of(place) for place in places)
            self._tables[question] = (tuple(row.tokens[0] for row in rows), rows)

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        table = self._tables.get(prompt.question)
        if table is None:
            return NOTHING
        start, end = len(accepted), len(accepted) + num_tokens
        return Draft(table[0][start:end], table[1][start:end])


class NgramDrafter(Drafter):
    """The most frequent token behind the last tokens: six of them, else five, down to none."""

    name = "ngram"
    order: ClassVar[int] = 6

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], Distribution] = {}

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        counts: dict[tuple[int, ...], Counter[int]] = {}
        for each in answered:
            text = (START, *each.answer)
            for place in range(1, len(text)):
                for start in range(max(place - self.order, 0), place + 1):
                    counts.setdefault(text[start:place], Counter())[text[place]] += 1
        self._next = {context: Distribution.of(behind) for context, behind in counts.items()}

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:  # noqa: ARG002
        if not self._next:
            return NOTHING
        table, context = self._next, (START, *accepted)[-self.order :]
        tokens: list[int] = []
        found: list[Distribution] = []
        for _ in range(num_tokens):
            behind = table.get(context)
            while behind is None:
                context = context[1:]
                behind = table.get(context)
            tokens.append(behind.tokens[0])
            found.append(behind)
            context = (*context[-self.order + 1 :], behind.tokens[0])
        return Draft(tokens, found)


class Continuation:
    """One text that others may go on from: where their last tokens occur in it, else at the same place."""

    longest: ClassVar[int] = 6

    def __init__(self, text: Sequence[int]) -> None:
        self._text = tuple(text)
        self._places: dict[tuple[int, ...], list[int]] = {}
        for end in range(1, len(text) + 1):
            for size in range(1, min(self.longest, end) + 1):
                self._places.setdefault(self._text[end - size : end], []).append(end)

    def behind(self, accepted: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """What stands behind the longest match; of equal ones the nearest to the same place, else the later."""
        place = self.match(accepted)
        start = len(accepted) if place is None else place
        return self._text[start : start + num_tokens]

    def match(self, accepted: Sequence[int]) -> int | None:
        """The place behind the longest match, or None."""
        here = len(accepted)
        context = tuple(accepted[-self.longest :])
        while context:
            places = self._places.get(context)
            if places:
                return places[0] if len(places) == 1 else min(places, key=lambda end: (abs(end - here), -end))
            context = context[1:]
        return None


class PromptLookupDrafter(Drafter):
    """What followed the last tokens earlier in the answer, else in EventGPT's output (after arXiv 2304.04487)."""

    name = "prompt_lookup"
    needs_event_tokens = True
    longest: ClassVar[int] = 3

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        text = (*prompt.event_tokens, *accepted)
        for size in range(min(self.longest, len(accepted)), 0, -1):
            suffix = tuple(accepted[-size:])
            for end in range(len(text) - 1, size - 1, -1):
                if text[end - 1] == suffix[-1] and text[end - size : end] == suffix:
                    return Draft(text[end : end + num_tokens])
        return NOTHING


class PreviousWindowDrafter(Drafter):
    """The last answer to the same question in the same sequence: what a streaming deployment has."""

    name = "previous_window"
    learns_online = True

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], Continuation] = {}

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        last = self._last.get((prompt.sequence, prompt.question))
        return Draft(last.behind(accepted, num_tokens)) if last else NOTHING

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        self._last[prompt.sequence, prompt.question] = Continuation(answer)


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
