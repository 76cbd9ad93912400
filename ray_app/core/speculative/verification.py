"""Verification of drafts: what a target model does with the tokens that a cheaper drafter proposes.

All three rules are lossless: with any drafter, the output is that of the target alone (token for token where it
decodes greedily, in distribution where it samples). Leviathan et al., arXiv 2211.17192; trees: Miao et al.,
arXiv 2305.09781.

Shapes: G = drafted tokens (γ), V = vocabulary, N = nodes of a tree, the root included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError

PROBABILITY_TOLERANCE = 1e-4
"""Largest distance of a distribution's sum from one: float32 softmax over 32,000 tokens stays well within it."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Outcome of one target pass."""

    tokens: tuple[int, ...]
    """Accepted tokens and behind them one of the target's own: never empty."""
    num_accepted: int
    """Drafted tokens among them."""


def accepted_prefix(draft: Sequence[int], answer: Sequence[int], start: int = 0) -> int:
    """Return the number of drafted tokens that equal the answer from `start` on, before the first that does not."""
    num_accepted = 0
    for drafted, right in zip(draft, answer[start : start + len(draft)], strict=False):
        if drafted != right:
            break
        num_accepted += 1
    return num_accepted


def verify_greedy(draft_G: Sequence[int], target_G1: Sequence[int]) -> Verified:
    """`target_G1[i]` is the target's greedy token behind the context and the first i drafted tokens."""
    if len(target_G1) != len(draft_G) + 1:
        raise InputError(
            f"{len(draft_G)} drafted tokens need {len(draft_G) + 1} greedy tokens of the target, one behind each and "
            f"one before; {len(target_G1)} were given."
        )
    num_accepted = accepted_prefix(draft_G, target_G1)
    return Verified((*draft_G[:num_accepted], int(target_G1[num_accepted])), num_accepted)


def verify_sampled(
    draft_G: Sequence[int],
    drafter_GV: NDArray[np.floating],
    target_G1V: NDArray[np.floating],
    rng: np.random.Generator,
) -> Verified:
    """Verify by rejection sampling.

    A token x drawn from q is kept with probability min(1, p(x) / q(x)); the first that is not kept is replaced by a
    draw from the positive part of p − q, normalised; when all are kept, one more is drawn from p.

    `drafter_GV[i]` is the q that `draft_G[i]` was drawn from, `target_G1V[i]` the target's p at the same place.
    InputError: tokens outside the vocabulary, shapes that do not fit, rows that are not distributions.
    """
    if drafter_GV.shape != (len(draft_G), target_G1V.shape[-1]) or len(target_G1V) != len(draft_G) + 1:
        raise InputError(
            f"{len(draft_G)} drafted tokens need probabilities of shape ({len(draft_G)}, V) and of the target "
            f"({len(draft_G) + 1}, V); the shapes are {drafter_GV.shape} and {target_G1V.shape}."
        )
    require_tokens(draft_G, target_G1V.shape[1], "the drafter")
    q_GV, p_G1V = distributions(drafter_GV, "the drafter"), distributions(target_G1V, "the target")
    for i, token in enumerate(draft_G):
        if not _keeps(p_G1V[i], q_GV[i], token, rng):
            return Verified((*draft_G[:i], draw(_residual(p_G1V[i], q_GV[i]), rng)), i)
    return Verified((*draft_G, draw(p_G1V[-1], rng)), len(draft_G))


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafts that share beginnings. Node 0 is the context; node n > 0 holds `tokens[n]` behind `parents[n] < n`."""

    tokens: tuple[int, ...]
    """A token for each node; that of node 0 means nothing."""
    parents: tuple[int, ...]
    """The node before each; that of node 0 means nothing."""

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.parents):
            raise InputError(
                f"a tree needs as many parents as tokens, and a root: {len(self.parents)} and {len(self.tokens)}."
            )
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise InputError(f"node {node} of a tree has parent {parent}; a parent comes before its children.")

    def children(self, node: int) -> list[int]:
        """Drafted tokens in the order in which they are tried."""
        return [n for n in range(1, len(self.tokens)) if self.parents[n] == node]


def verify_tree_greedy(tree: DraftTree, target_N: Sequence[int]) -> Verified:
    """Return the longest branch that the target would have taken; `target_N[n]` is its greedy token behind node n."""
    if len(target_N) != len(tree.tokens):
        raise InputError(f"a tree of {len(tree.tokens)} nodes needs as many greedy tokens, not {len(target_N)}.")
    node, taken = 0, []
    while (child := next((c for c in tree.children(node) if tree.tokens[c] == target_N[node]), None)) is not None:
        taken.append(tree.tokens[child])
        node = child
    return Verified((*taken, int(target_N[node])), len(taken))


def verify_tree_sampled(
    tree: DraftTree,
    drafter_NV: NDArray[np.floating],
    target_NV: NDArray[np.floating],
    rng: np.random.Generator,
) -> Verified:
    """Rejection sampling down a tree whose children were each drawn from `drafter_NV[parent]`, with replacement.

    A node's children are tried in turn; after each that is not kept, p becomes the normalised positive part of
    p − q; when none is kept the next token is drawn from what p has become. InputError as `verify_sampled`.
    """
    num_nodes, size = len(tree.tokens), target_NV.shape[-1]
    if drafter_NV.shape != (num_nodes, size) or len(target_NV) != num_nodes:
        raise InputError(
            f"a tree of {num_nodes} nodes needs probabilities of shape ({num_nodes}, V) of both models; the shapes "
            f"are {drafter_NV.shape} and {target_NV.shape}."
        )
    require_tokens(tree.tokens[1:], size, "the drafter")
    q_NV, p_NV = distributions(drafter_NV, "the drafter"), distributions(target_NV, "the target")
    node, taken = 0, []
    while True:
        p_V = p_NV[node]
        for child in tree.children(node):
            if _keeps(p_V, q_NV[node], tree.tokens[child], rng):
                taken.append(tree.tokens[child])
                node = child
                break
            p_V = _residual(p_V, q_NV[node])
        else:
            return Verified((*taken, draw(p_V, rng)), len(taken))


def require_tokens(tokens: Sequence[int], vocabulary: int, who: str) -> None:
    """InputError if a token is outside the vocabulary."""
    if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        raise InputError(
            f"{who} gave token {wrong}, outside the vocabulary of {vocabulary:,} tokens; do both models share one "
            "tokenizer?"
        )


def distributions(rows_NV: NDArray[np.floating], who: str) -> NDArray[np.float64]:
    """Return the rows in float64, summing to one exactly. InputError: negative, not finite, or another sum."""
    wide_NV = np.asarray(rows_NV, dtype=np.float64)
    sums_N = wide_NV.sum(axis=-1)
    bad_N = ~np.isfinite(sums_N) | (wide_NV < 0).any(axis=-1) | (np.abs(sums_N - 1) > PROBABILITY_TOLERANCE)
    if bad_N.any():
        row = int(np.flatnonzero(bad_N)[0])
        raise InputError(
            f"the probabilities of {who} at place {row} are no distribution: sum {sums_N[row]:.6g}, least "
            f"{wide_NV[row].min():.6g}. Give a softmax over the whole vocabulary."
        )
    return wide_NV / sums_N[:, None]


def _keeps(p_V: NDArray[np.float64], q_V: NDArray[np.float64], token: int, rng: np.random.Generator) -> bool:
    # u · q < p, with u in [0, 1), is u < p / q without a division by zero.
    return bool(rng.random() * q_V[token] < p_V[token])


def _residual(p_V: NDArray[np.float64], q_V: NDArray[np.float64]) -> NDArray[np.float64]:
    rest_V = np.maximum(p_V - q_V, 0.0)
    total = rest_V.sum()
    # A rejection has probability 1 − Σ min(p, q), which is this total: where it is 0, only rounding rejects.
    return rest_V / total if total > 0 else p_V


def draw(p_V: NDArray[np.float64], rng: np.random.Generator) -> int:
    """Return a token drawn from a distribution; the sum of `p_V` need not be one exactly."""
    cumulated_V = np.cumsum(p_V)
    return int(np.searchsorted(cumulated_V, rng.random() * cumulated_V[-1], side="right"))
