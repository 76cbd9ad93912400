"""Drafter of the previous window's answer, and the lookup in an earlier text that it shares with retrieval."""

from collections.abc import Sequence
from typing import ClassVar

from ray_app.core.speculative.prompts import Prompt
from ray_app.drafters.base import NOTHING, Draft, Drafter


class Continuation:
    """Text whose continuation others may use: where their last tokens occur in it, else at the same place."""

    longest: ClassVar[int] = 6

    def __init__(self, text: Sequence[int]) -> None:
        self._text = tuple(text)
        self._places: dict[tuple[int, ...], list[int]] = {}
        for end in range(1, len(text) + 1):
            for size in range(1, min(self.longest, end) + 1):
                self._places.setdefault(self._text[end - size : end], []).append(end)

    def behind(self, accepted: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """Return what follows the longest match; of equal ones the nearest to the same place, else the later."""
        place = self.match(accepted)
        start = len(accepted) if place is None else place
        return self._text[start : start + num_tokens]

    def match(self, accepted: Sequence[int]) -> int | None:
        """Return the place behind the longest match, or None."""
        here = len(accepted)
        context = tuple(accepted[-self.longest :])
        while context:
            places = self._places.get(context)
            if places:
                return places[0] if len(places) == 1 else min(places, key=lambda end: (abs(end - here), -end))
            context = context[1:]
        return None


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
