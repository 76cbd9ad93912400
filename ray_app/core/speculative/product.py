"""Product of two distributions of the next token: one that `hybrid` has learnt, and that of a language model."""

from collections.abc import Callable, Mapping

LEAST = 0.01
"""Least probability of either side; chosen with the validation drives of the event drafter's first seed."""
SURE = 0.9
"""Above this probability the drafter is not asked. On the same drives it is asked for a quarter of the tokens then,
and the target passes are as many as without this rule; above 0.8 they are 1 % more."""


def product(p: Mapping[int, float], ask: Callable[[], Mapping[int, float]]) -> Mapping[int, float]:
    """Return a score of every token that either side names: p · q, both at least `LEAST`, not normalised.

    `ask` gives the drafter's probabilities q; where `p` is empty they are the scores. Where `p` is sure of a token it
    is the scores, and the drafter is not asked.
    """
    if p and max(p.values()) > SURE:
        return p
    q = ask()
    if not p:
        return q
    return {token: max(p.get(token, 0.0), LEAST) * max(q.get(token, 0.0), LEAST) for token in (*p, *q)}


def likeliest(scores: Mapping[int, float]) -> int:
    """Return the token with the highest score; of equal ones the lowest."""
    return min(scores, key=lambda token: (-scores[token], token))
