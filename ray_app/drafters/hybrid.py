"""The hybrid drafter: votes of many memories of earlier answers, and weights that learn which of them to trust.

Each memory counts which token followed under one kind of context: the last n tokens, the place, the words so far.
Each counts three times, once for good and twice with most of it forgotten by the next window or the one after, so
that "what was said a moment ago" is a voice of its own; a fourth voice is a token's share of the recent ones. A
token's score is the sum, over voices, of weight · log(1 + count / ε) or of weight · share, plus what earlier words of
the same answer say for or against it. The weights follow the gradient of the log-likelihood (log-linear mixing, as in
context-mixing compressors) and keep learning from every accepted answer. Those at a place are a sum of three: by the
length of the longest known context, by the token before, and by the part of the answer.

EventGPT's tokens are no voice: as contexts they made no drafts better on the recorded drives.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.base import NOTHING, Draft, Drafter

COUNT_SMOOTHING = 0.1
"""A count below this says little."""
DECAYS = (0.6, 0.2)
"""Part of each recent count that is left after one more window."""
FORGOTTEN = 40
"""Windows after which nothing is left of it; learning from other sequences ends with so many at once."""
FIRST_WEIGHT = 0.05
"""All memories are trusted alike at first, and little: votes of nested contexts repeat each other."""
VOTE_LEARNING_RATE = 0.0005
"""Step of the memories' weights."""
WORD_RATE = 0.02
"""Step of the weights between words of one answer."""
LEAST_STEP = 0.01
"""Errors of probability below this teach nothing about words."""
SHORT_LIST = 6
"""Candidates that words of the same answer are asked about."""
LARGE = 32
"""Memories with more tokens than this are asked about known candidates alone."""
DECAY_TABLE = tuple(tuple(left**age for left in DECAYS) for age in range(FORGOTTEN))
FEATURES_PER_CONTEXT = 2 + len(DECAYS)
"""Votes of one memory: all times, each of `FORGET`, share."""
SHARE_SCALE = 3.0
"""Brings a share to the size of the other votes."""
SHARE_FLOOR = 0.02
"""Recent counts that sum to less than this have no share worth a vote."""
PART = 4
"""Tokens of a part of an answer that has weights of its own."""

Context = Callable[[Sequence[int], int], Hashable]


def _last(size: int) -> Context:
    """Return the last `size` tokens, or all of them where there are fewer."""
    return lambda text, end: (size, *text[max(end - size, 0) : end])


MEMORIES: tuple[tuple[int, Context], ...] = (
    *((size, _last(size)) for size in (16, 12, 8, 6, 4, 3, 2, 1)),
    (0, lambda text, end: ("words", frozenset(text[:end]), text[end - 1] if end else -1)),
    (0, lambda text, end: ("around", *text[max(end - 5, 0) : max(end - 2, 0)], *text[max(end - 1, 0) : end])),
    (0, lambda text, end: ("place2", end, *text[max(end - 2, 0) : end])),
    (0, lambda text, end: ("place1", end, *text[max(end - 1, 0) : end])),
    (0, lambda _, end: ("place", end)),
)
"""Length in tokens that a memory vouches for, and its context; the longest first. `around` leaves one token out."""


@dataclass(slots=True)
class ContextCount:
    """Counts of a token in one context."""

    total: float
    """All times."""
    recent: list[float]
    """Recent counts, as of `window`, one for each of `FORGET`."""
    window: int
    """Window in which it last followed."""


@dataclass(slots=True)
class ScoredPosition:
    """Prediction for one place before its token is known."""

    text: tuple[int, ...]
    """Tokens before it."""
    sets: tuple[Hashable, ...]
    """Names of the weights that are added up here."""
    votes: dict[int, list[tuple[int, float]]]
    """Number of a weight, and its factor, for each candidate."""
    scores: dict[int, float]
    """Probability of each candidate that was asked about; empty where no context is known."""


class HybridDrafter(Drafter):
    """See the module."""

    name = "hybrid"
    learns_online: ClassVar[bool] = True
    lengths: ClassVar[tuple[int, ...]] = tuple(length for length, _ in MEMORIES)
    """Number of tokens that each memory vouches for."""

    def __init__(self) -> None:
        self._tallies: dict[Hashable, dict[int, ContextCount]] = {}
        self._weights: dict[Hashable, list[float]] = {}
        self._words: dict[int, dict[int, float]] = {}
        self._window = 0
        self._thought: dict[int, ScoredPosition] = {}
        self._prompt: Prompt | None = None

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        for each in answered:
            self.update(each.prompt, each.answer)
        self._window += FORGOTTEN

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        if not self._tallies:
            return NOTHING
        self._turn_to(prompt)
        text = tuple(accepted)
        for _ in range(num_tokens):
            scored = self._scored(text)
            if not scored.scores:
                break
            text = (*text, max(scored.scores, key=scored.scores.__getitem__))
        return Draft(text[len(accepted) :])

    def expected(self, prompt: Prompt, accepted: Sequence[int]) -> dict[int, float]:
        """Return the probability of each candidate for the next token; empty where no context is known.

        Asking changes nothing that `update` learns.
        """
        self._turn_to(prompt)
        scores = self._score(tuple(accepted)).scores
        odds = {token: math.exp(score - max(scores.values())) for token, score in scores.items()}
        return {token: odd / sum(odds.values()) for token, odd in odds.items()}

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        self._turn_to(prompt)
        text = tuple(answer)
        for end, token in enumerate(text):
            self._teach(self._scored(text[:end]), token)
        self._thought.clear()
        self._window += 1
        for end, token in enumerate(text):
            for context in self.contexts(prompt, text, end):
                self._count(self._tallies.setdefault(context, {}), token)

    def contexts(self, prompt: Prompt, text: Sequence[int], end: int) -> list[Hashable]:
        """Return the contexts of each memory at a place."""
        return [(prompt.question, context(text, end)) for _, context in MEMORIES]

    def _turn_to(self, prompt: Prompt) -> None:
        if prompt != self._prompt:
            self._prompt = prompt
            self._thought.clear()

    def _scored(self, text: tuple[int, ...]) -> ScoredPosition:
        """Kept until the answer is whole: most places were thought about when they were drafted."""
        known = self._thought.get(len(text))
        if known is None or known.text != text:
            known = self._thought[len(text)] = self._score(text)
        return known

    def _score(self, text: tuple[int, ...]) -> ScoredPosition:
        votes: dict[int, list[tuple[int, float]]] = {}
        length = 0
        assert self._prompt is not None
        contexts = self.contexts(self._prompt, text, len(text))
        for number, (size, context) in enumerate(zip(self.lengths, contexts, strict=True)):
            tallies = self._tallies.get(context)
            if not tallies:
                continue
            length = max(length, min(size, len(text)))
            shares = self._recent_shares(tallies) if len(tallies) <= LARGE else {}
            all_of_them = len(tallies) <= LARGE or not votes
            for token in tallies if all_of_them else [token for token in votes if token in tallies]:
                mine, tally = votes.setdefault(token, []), tallies[token]
                mine.append((FEATURES_PER_CONTEXT * number, math.log1p(tally.total / COUNT_SMOOTHING)))
                age = self._window - tally.window
                if age < FORGOTTEN:
                    for voice, (count, left) in enumerate(zip(tally.recent, DECAY_TABLE[age], strict=True), start=1):
                        mine.append(
                            (FEATURES_PER_CONTEXT * number + voice, math.log1p(count * left / COUNT_SMOOTHING))
                        )
                if token in shares:
                    mine.append((FEATURES_PER_CONTEXT * number + FEATURES_PER_CONTEXT - 1, shares[token]))
        sets = (("length", length), ("behind", text[-1] if text else -1), ("part", len(text) // PART))
        weights = self._mixed(sets)
        scores = {token: sum(weights[n] * vote for n, vote in mine) for token, mine in votes.items()}
        if len(scores) > SHORT_LIST:
            best = sorted(scores, key=scores.__getitem__, reverse=True)[:SHORT_LIST]
            scores = {token: scores[token] for token in best}
        if len(scores) > 1:
            so_far = set(text)
            for token in scores:
                ties = self._words.get(token)
                if ties:
                    scores[token] += sum(ties[word] for word in so_far if word in ties)
        return ScoredPosition(text, sets, votes, scores)

    def _recent_shares(self, tallies: dict[int, ContextCount]) -> dict[int, float]:
        """Return each token's part of the slower forgotten counts, times `SHARE_SCALE`."""
        ages = {token: self._window - tally.window for token, tally in tallies.items()}
        fresh = {
            token: tally.recent[0] * DECAY_TABLE[ages[token]][0]
            for token, tally in tallies.items()
            if ages[token] < FORGOTTEN
        }
        scale = SHARE_SCALE / (sum(fresh.values()) + SHARE_FLOOR)
        return {token: scale * count for token, count in fresh.items()}

    def _mixed(self, sets: tuple[Hashable, ...]) -> list[float]:
        """Return the sum of the sets' weights. The first set begins with trust in all, the others correct it."""
        for number, name in enumerate(sets):
            if name not in self._weights:
                self._weights[name] = [0.0 if number else FIRST_WEIGHT] * (FEATURES_PER_CONTEXT * len(self.lengths))
        return [sum(each) for each in zip(*(self._weights[name] for name in sets), strict=True)]

    def _teach(self, scored: ScoredPosition, token: int) -> None:
        """One gradient step for a place's true token; nothing is learnt where it was no candidate or the only one."""
        if len(scored.scores) < 2 or token not in scored.scores:
            return
        top = max(scored.scores.values())
        odds = {candidate: math.exp(score - top) for candidate, score in scored.scores.items()}
        total = sum(odds.values())
        learning, so_far = [self._weights[name] for name in scored.sets], set(scored.text)
        for candidate, odd in odds.items():
            error = (candidate == token) - odd / total
            for number, vote in scored.votes[candidate]:
                step = VOTE_LEARNING_RATE * error * vote
                for weights in learning:
                    weights[number] += step
            if abs(error) > LEAST_STEP:
                ties = self._words.setdefault(candidate, {})
                for word in so_far:
                    ties[word] = ties.get(word, 0.0) + WORD_RATE * error

    def _count(self, tallies: dict[int, ContextCount], token: int) -> None:
        tally = tallies.get(token)
        if tally is None:
            tallies[token] = ContextCount(1.0, [1.0] * len(DECAYS), self._window)
            return
        age = self._window - tally.window
        fade = DECAY_TABLE[age] if age < FORGOTTEN else (0.0,) * len(DECAYS)
        tally.recent = [count * left + 1.0 for count, left in zip(tally.recent, fade, strict=True)]
        tally.total += 1.0
        tally.window = self._window
