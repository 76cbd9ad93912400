"""N-gram drafters: frequent continuations of other answers, and lookup in the prompt."""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.base import NOTHING, Distribution, Draft, Drafter

START = -1
"""Padding of n-grams before the first token of every answer."""


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


class PromptLookupDrafter(Drafter):
    """Tokens that followed the last ones earlier in the answer, else in EventGPT's output (arXiv 2304.04487)."""

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
