"""Exact replay of recorded greedy outputs: which drafted tokens the target would have accepted, pass by pass.

A greedy target's next token depends only on what precedes it, and what precedes it is its own recorded output
with any drafter. So the recording is the lossless result for every drafter, and no model is needed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ray_app.core.speculative.metrics import DraftCounts
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.core.speculative.verification import accepted_prefix, require_tokens
from ray_app.drafters.base import Draft, Drafter
from ray_app.drafters.hidden_states import AdapterDrafter, HiddenStateDrafter
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.drafters.ngram import NgramDrafter, PromptLookupDrafter
from ray_app.drafters.positional import EventGptDrafter, PositionalDrafter
from ray_app.drafters.previous_window import PreviousWindowDrafter
from ray_app.drafters.retrieval import RetrievalDrafter
from ray_app.errors import ConfigError, InputError


class ConstantDrafter(Drafter):
    """Baseline: one earlier answer for every window, the one that most agrees with the others place by place."""

    name = "constant"

    def __init__(self) -> None:
        self._text: tuple[int, ...] = ()

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        table = PositionalDrafter()
        table.fit(answered)

        def agreement(each: AnsweredPrompt) -> int:
            usual = table.draft(each.prompt, (), len(each.answer)).tokens
            return sum(a == b for a, b in zip(usual, each.answer, strict=True))

        self._text = max(answered, key=agreement).answer if answered else ()

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:  # noqa: ARG002
        return Draft(self._text[len(accepted) : len(accepted) + num_tokens])


DRAFTERS: dict[str, type[Drafter]] = {
    drafter.name: drafter
    for drafter in (
        Drafter,
        ConstantDrafter,
        EventGptDrafter,
        PositionalDrafter,
        NgramDrafter,
        PromptLookupDrafter,
        RetrievalDrafter,
        HiddenStateDrafter,
        AdapterDrafter,
        PreviousWindowDrafter,
        HybridDrafter,
    )
}
"""Every drafter by its name on the command line."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows to replay, and rows to learn from, both in order."""

    train: tuple[int, ...]
    """Rows of other sequences, or further than the gap from the stretch."""
    test: Sequence[int]
    """Rows of whole sequences, or a stretch."""


def are_named(sequences: Sequence[str]) -> bool:
    """Return True if every row names its sequence, and there are two or more."""
    return len(set(sequences)) > 1 and "" not in sequences


def folds_of(sequences: Sequence[str], num_folds: int, gap: int) -> list[Fold]:
    """Folds of whole sequences where they `are_named`, which need no gap; else `contiguous_folds`.

    One fold holds every row and leaves none to learn from. The longest sequence goes first, each to the fold that has
    the fewest rows: at most as many folds as sequences.
    """
    if num_folds == 1:
        return [Fold((), range(len(sequences)))]
    sizes = Counter(sequences)
    if not are_named(sequences):
        return contiguous_folds(len(sequences), num_folds, gap)
    rows = [0] * min(num_folds, len(sizes))
    fold_of: dict[str, int] = {}
    for sequence, size in sizes.most_common():
        fold_of[sequence] = rows.index(min(rows))
        rows[fold_of[sequence]] += size
    return [
        Fold(
            tuple(row for row, sequence in enumerate(sequences) if fold_of[sequence] != fold),
            tuple(row for row, sequence in enumerate(sequences) if fold_of[sequence] == fold),
        )
        for fold in range(len(rows))
    ]


def contiguous_folds(num_rows: int, num_folds: int, gap: int) -> list[Fold]:
    """Stretches of equal size; the `gap` rows on either side of one are neither learnt from nor replayed with it.

    ConfigError: too few rows for anything to be left to learn from.
    """
    if num_rows < num_folds or num_rows - -(-num_rows // num_folds) - 2 * gap < 1:
        raise ConfigError(
            f"{num_rows} rows in --folds ({num_folds}) with --fold-gap ({gap}) on both sides leave no row to learn "
            "from; take more rows, or a smaller gap."
        )
    ends = [num_rows * fold // num_folds for fold in range(num_folds + 1)]
    return [
        Fold((*range(max(low - gap, 0)), *range(min(high + gap, num_rows), num_rows)), range(low, high))
        for low, high in pairwise(ends)
    ]


@dataclass(frozen=True, slots=True)
class RowReplay:
    """Drafts and acceptance on one recorded answer."""

    length: int
    """Tokens of the answer."""
    drafted: tuple[int, ...]
    """Tokens drafted in each target pass."""
    accepted: tuple[int, ...]
    """Tokens accepted in each."""
    at_once: tuple[int, ...]
    """The whole answer drafted before any of it was known."""
    prefix: int
    """Its tokens accepted in a row."""
    matches: int
    """Its tokens that are right place for place."""
    seconds: float
    """Time of drafting, verifying and learning, by the clock that was given."""

    def counts(self, gamma: int) -> DraftCounts:
        return DraftCounts.of(list(self.drafted), list(self.accepted), gamma)


def replay_fold(
    drafter: Drafter,
    train: Sequence[AnsweredPrompt],
    test: Sequence[AnsweredPrompt],
    *,
    gamma: int,
    vocabulary: int,
    clock: Callable[[], float],
) -> list[RowReplay]:
    """Fits the drafter, then replays the test rows. InputError as `replay_rows`."""
    drafter.fit(train)
    return replay_rows(drafter, test, gamma=gamma, vocabulary=vocabulary, clock=clock)


def replay_rows(
    drafter: Drafter, test: Sequence[AnsweredPrompt], *, gamma: int, vocabulary: int, clock: Callable[[], float]
) -> list[RowReplay]:
    """Replays rows in order with a drafter that has been fitted; it learns from each when that is done.

    InputError: a token outside the vocabulary, or more tokens than were asked for.
    """
    rows: list[RowReplay] = []
    for each in test:
        answer = each.answer
        began = clock()
        drafted, accepted = _passes(drafter, each, gamma, vocabulary)
        seconds = clock() - began
        at_once = tuple(drafter.draft(each.prompt, (), len(answer)).tokens)
        began = clock()
        drafter.update(each.prompt, answer)
        rows.append(
            RowReplay(
                length=len(answer),
                drafted=tuple(drafted),
                accepted=tuple(accepted),
                at_once=at_once,
                prefix=accepted_prefix(at_once, answer),
                matches=num_matches(at_once, answer),
                seconds=seconds + clock() - began,
            )
        )
    return rows


def num_matches(draft: Sequence[int], answer: Sequence[int], shift: int = 0) -> int:
    """Places where the draft, moved `shift` places to the right, has the answer's token."""
    moved, fixed = (draft, answer[shift:]) if shift >= 0 else (draft[-shift:], answer)
    return sum(a == b for a, b in zip(moved, fixed, strict=False))


def _passes(drafter: Drafter, each: AnsweredPrompt, gamma: int, vocabulary: int) -> tuple[list[int], list[int]]:
    answer, prompt = each.answer, each.prompt
    length = len(answer)
    drafted: list[int] = []
    accepted: list[int] = []
    place = 0
    while place < length:
        tokens = drafter.draft(prompt, answer[:place], gamma).tokens
        if tokens:
            if len(tokens) > gamma:
                raise InputError(f"drafter '{drafter.name}' drafted {len(tokens)} tokens, asked for {gamma}.")
            if min(tokens) < 0 or max(tokens) >= vocabulary:
                require_tokens(tokens, vocabulary, f"drafter '{drafter.name}'")
        num_accepted = 0 if not tokens else accepted_prefix(tokens, answer, place)
        drafted.append(len(tokens))
        accepted.append(num_accepted)
        place += num_accepted + 1
    return drafted, accepted
