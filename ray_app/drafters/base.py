"""Interface of a drafter, which proposes the next tokens of the target's answer.

A drafter sees the question, EventGPT's tokens, and the accepted part of the answer; never what comes after it.
`fit` gets answers of other sequences, `update` each answer once it is whole, as a running deployment would have it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.errors import InputError

SUM_TOLERANCE = 1e-6
"""Largest distance of a sum of a drafter's probabilities from one: they are float64."""


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
    """Drafted tokens, at most as many as asked for."""
    probabilities: Sequence[Distribution] | None = None
    """One for each token, from drafters that have them."""


NOTHING = Draft(())


class Drafter:
    """The interface, and the rule that drafts nothing."""

    name: ClassVar[str] = "none"
    learns_online: ClassVar[bool] = False
    """True if answers that were accepted during the replay change its drafts."""
    needs_event_tokens: ClassVar[bool] = False
    """True if EventGPT must have run before it can draft."""
    needs_states: ClassVar[bool] = False
    """True if it drafts from captured states, and drafts nothing without them."""

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        """Learns from other sequences; called once, before anything else."""

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:  # noqa: ARG002
        """Draft at most `num_tokens` that may follow the accepted part of the answer."""
        return NOTHING

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """Learns from an answer of this sequence that is now whole."""
