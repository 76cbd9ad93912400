"""Drafters by position: EventGPT's own tokens, and the most frequent token of each place."""

from collections import Counter
from collections.abc import Sequence

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.base import NOTHING, Distribution, Draft, Drafter


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
