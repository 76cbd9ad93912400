"""Product of two distributions of the next token: one that `hybrid` has learnt, and that of a language model."""

from collections.abc import Callable, Mapping

LEAST = 0.01
"""Least probability of either side; chosen with the validation drives of the event drafter's first seed."""


def product(p: Mapping[int, float], ask: Callable[[], Mapping[int, float]]) -> Mapping[int, float]:
    """Return a score of every token that either side names: p · q, both at least `LEAST`, not normalised.

    `ask` gives the drafter's probabilities q. Where `p` is empty they are the scores. Where `p` leaves less than
    `LEAST` to all other tokens it is the scores, and the drafter is not asked.
    """
    if p and max(p.values()) > 1.0 - LEAST:
        return p
    q = ask()
    if not p:
        return q
    return {token: max(p.get(token, 0.0), LEAST) * max(q.get(token, 0.0), LEAST) for token in (*p, *q)}


def likeliest(scores: Mapping[int, float]) -> int:
    """Return the token with the highest score; of equal ones the lowest."""
    return min(scores, key=lambda token: (-scores[token], token))
