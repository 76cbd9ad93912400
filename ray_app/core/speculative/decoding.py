"""Decoding of one answer: a drafter proposes tokens, one target pass verifies them, and the text is the target's own.

Plain decoding is the same loop with γ = 0. What a drafter proposes changes only the time: drafts are cut to the
length that was asked for and behind an end token, and verification is lossless (verification.py).

The pass over the prompt gives the distribution of the first token. So the first draft is verified behind the prompt,
and each later one behind the last token of the answer, which the target has not read yet.

Shapes: G = drafted tokens (γ), V = vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.core.speculative.metrics import DraftCounts
from ray_app.core.speculative.verification import Verified, require_tokens, verify_greedy, verify_sampled
from ray_app.errors import InputError


class Target(Protocol):
    """A language model's memory of one prompt and what follows it."""

    def prefill(self, prefix: Any) -> Tensor:
        """Read the prompt; return the logits of the token behind it, shape (1, V)."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read more tokens in one pass; return the logits of the token behind each, shape (len(tokens), V)."""
        ...

    def crop(self, num_tokens: int) -> None:
        """Forget the last tokens that were read."""
        ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens of one pass."""

    tokens: tuple[int, ...] = ()
    """Drafted tokens."""
    probabilities_GV: NDArray[np.floating] | None = None
    """Distribution that each token was drawn from; None where the token was not drawn but chosen."""

    def cut(self, num_tokens: int, end_token: int) -> "Proposal":
        """Return at most `num_tokens` of it, and nothing behind the first end token."""
        if end_token in self.tokens[:num_tokens]:
            num_tokens = self.tokens.index(end_token) + 1
        if num_tokens >= len(self.tokens):
            return self
        rows_GV = self.probabilities_GV
        return Proposal(self.tokens[:num_tokens], None if rows_GV is None else rows_GV[:num_tokens])


class Proposer(Protocol):
    """Source of drafts for one answer."""

    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        """Draft at most `num_tokens` that may follow the accepted part of the answer."""
        ...


class Choice(Protocol):
    """Rule by which the target chooses tokens."""

    def verify(self, draft: Proposal, logits_G1V: Tensor) -> Verified:
        """Accept a prefix of the draft and add one token."""
        ...


class Greedy:
    """The most likely token."""

    def verify(self, draft: Proposal, logits_G1V: Tensor) -> Verified:
        return verify_greedy(draft.tokens, logits_G1V.argmax(dim=-1).tolist())


class Sampled:
    """Draws from the softmax at a temperature, cut to the most likely tokens of mass `top_p`."""

    def __init__(self, temperature: float, top_p: float, rng: np.random.Generator) -> None:
        if not temperature > 0.0 or not 0.0 < top_p <= 1.0:
            raise InputError(f"sampling needs a temperature above 0 and 0 < top_p ≤ 1: {temperature}, {top_p}.")
        self._temperature, self._top_p, self.rng = temperature, top_p, rng

    def probabilities(self, logits_KV: Tensor) -> NDArray[np.float64]:
        """Return the distributions that tokens are drawn from, shape (K, V)."""
        p_KV = (logits_KV.double() / self._temperature).softmax(dim=-1)
        if self._top_p < 1.0:
            ordered_KV, order_KV = p_KV.sort(dim=-1, descending=True)
            before_KV = ordered_KV.cumsum(dim=-1) - ordered_KV
            ordered_KV[before_KV >= self._top_p] = 0.0
            p_KV = torch.zeros_like(p_KV).scatter_(-1, order_KV, ordered_KV / ordered_KV.sum(dim=-1, keepdim=True))
        return p_KV.cpu().numpy()

    def verify(self, draft: Proposal, logits_G1V: Tensor) -> Verified:
        p_G1V = self.probabilities(logits_G1V)
        q_GV = draft.probabilities_GV
        if q_GV is None:
            q_GV = np.zeros((len(draft.tokens), p_G1V.shape[1]))
            q_GV[np.arange(len(draft.tokens)), list(draft.tokens)] = 1.0
        return verify_sampled(draft.tokens, q_GV, p_G1V, self.rng)


@dataclass(frozen=True, slots=True)
class Pass:
    """One target pass."""

    gamma: int
    """Tokens asked of the drafter; 0 means that it was not asked."""
    drafted: int
    """Tokens that were verified."""
    accepted: int
    """Tokens among them that are in the answer."""
    fed: int
    """Tokens that the target read: the drafted ones, and before them the last of the answer."""
    draft_s: float
    """Time of the drafter."""
    verify_s: float
    """Time of the target's pass; 0 for a first token that the pass over the prompt already gave."""


class Gamma(Protocol):
    """Rule that sets γ pass by pass."""

    def choose(self) -> int:
        """Return the number of tokens to ask for; 0 is plain decoding."""
        ...

    def observe(self, done: Pass) -> None:
        """Learn from a pass."""
        ...


@dataclass(frozen=True, slots=True)
class FixedGamma:
    """The same γ for each pass."""

    gamma: int
    """Tokens to ask for."""

    def choose(self) -> int:
        return self.gamma

    def observe(self, done: Pass) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Decoded:
    """One answer, and where its time went."""

    tokens: tuple[int, ...]
    """The answer, with the end token where it came."""
    passes: tuple[Pass, ...]
    """Target passes in order; the pass over the prompt is not one of them."""
    prefill_s: float
    """The target's pass over the prompt."""
    total_s: float
    """Everything from the prompt's first token to the answer's last."""

    @property
    def draft_s(self) -> float:
        return sum(each.draft_s for each in self.passes)

    @property
    def verify_s(self) -> float:
        return sum(each.verify_s for each in self.passes)

    @property
    def bookkeeping_s(self) -> float:
        """Time of this loop itself: choosing, comparing, cropping."""
        return self.total_s - self.prefill_s - self.draft_s - self.verify_s

    @property
    def counts(self) -> DraftCounts:
        drafted, accepted = [each.drafted for each in self.passes], [each.accepted for each in self.passes]
        return DraftCounts.of(drafted, accepted, max((each.gamma for each in self.passes), default=0))


def decode(
    target: Target,
    prefix: Any,
    proposer: Proposer | None,
    *,
    choice: Choice,
    gamma: Gamma,
    max_new_tokens: int,
    end_token: int,
    clock: Callable[[], float],
    on_pass: Callable[[Sequence[int], Pass], None] | None = None,
) -> Decoded:
    """Decode one answer, up to its end token or `max_new_tokens`. Without a proposer this is plain decoding.

    `on_pass` gets the tokens of each pass as they become part of the answer.
    InputError: a drafted token outside the target's vocabulary.
    """
    began = clock()
    ahead_1V = target.prefill(prefix)
    prefilled = clock()
    tokens: list[int] = []
    passes: list[Pass] = []
    while len(tokens) < max_new_tokens and tokens[-1:] != [end_token]:
        asked = min(gamma.choose(), max_new_tokens - len(tokens) - 1) if proposer is not None else 0
        started = clock()
        draft = Proposal()
        if proposer is not None and asked > 0:
            draft = proposer.propose(tokens, asked).cut(asked, end_token)
            require_tokens(draft.tokens, ahead_1V.shape[1], "the drafter")
        drafted = clock()
        fed = [*tokens[-1:], *draft.tokens]
        logits_GV = target.step(fed) if fed else ahead_1V[:0]
        verified = clock()
        outcome = choice.verify(draft, logits_GV if tokens else torch.cat([ahead_1V, logits_GV]))
        target.crop(len(draft.tokens) - outcome.num_accepted)
        new = outcome.tokens[: outcome.tokens.index(end_token) + 1] if end_token in outcome.tokens else outcome.tokens
        accepted = min(outcome.num_accepted, len(new))
        verify_s = verified - drafted if fed else 0.0
        done = Pass(asked, len(draft.tokens), accepted, len(fed), drafted - started, verify_s)
        tokens += new
        passes.append(done)
        gamma.observe(done)
        if on_pass is not None:
            on_pass(new, done)
    return Decoded(tuple(tokens), tuple(passes), prefilled - began, clock() - began)
