"""Draft length chosen while decoding, from measured costs and acceptance; 0 (plain decoding) where drafts do not pay.

For each γ the expected tokens of a pass are set against its expected time:

    tokens(γ) = 1 + (1 − e) · Σ_{i ≤ γ} a_1 ⋯ a_i
    time(γ)   = draft(γ) + e · pass(1) + (1 − e) · pass(1 + γ)

e is the share of empty drafts, a_i the chance that token i of a draft is accepted if those before it were, pass(k)
the time of a target pass over k tokens. All are running means, so that they follow a drive that changes.
"""

from collections.abc import Mapping

import numpy as np

from ray_app.core.speculative.decoding import Pass
from ray_app.errors import InputError

MEMORY = 0.98
"""Part of a count that is left after one more draft."""
COST_RATE = 0.1
"""Weight of a new time in its running mean."""
PRIOR = 2.0
"""Drafts that the assumed acceptance counts as."""
PROBE_SHARE = 0.01
"""Part of the decoding time that drafts may cost where plain decoding is the faster choice."""
OUTLIER = 3.0
"""A time beyond so many times its mean was interrupted: it counts as so many."""


class OnlineGamma:
    """Chooses the γ with the most tokens per second, from 0 to `most`."""

    def __init__(self, most: int, pass_s: Mapping[int, float]) -> None:
        """`pass_s`: measured seconds of a target pass by number of tokens, 1 among them."""
        if most < 1 or 1 not in pass_s or min(pass_s.values()) <= 0.0:
            raise InputError(f"γ needs a limit of at least 1 and the time of a pass over 1 token: {most}, {pass_s}.")
        sizes = sorted(pass_s)
        self._pass_s = np.interp(np.arange(most + 2), sizes, [pass_s[size] for size in sizes])
        self._token_s = 0.0
        self._accepted = np.zeros(most)
        self._reached = np.zeros(most)
        self._empty, self._drafts = 0.0, 0.0
        self._spent_s = self._lost_s = 0.0
        self._best = 0

    def choose(self) -> int:
        speeds = self.speeds()
        self._best = int(speeds.argmax())
        if self._best == 0 and self._lost_s < PROBE_SHARE * self._spent_s:
            return int(speeds[1:].argmax()) + 1
        return self._best

    def speeds(self) -> np.ndarray:
        """Return the expected tokens per second of each γ, shape (most + 1,)."""
        mean = (self._accepted.sum() + 1.0) / (self._reached.sum() + 2.0)
        chances = (self._accepted + PRIOR * mean) / (self._reached + PRIOR)
        tokens = 1.0 + np.concatenate([[0.0], chances.cumprod().cumsum()])
        empty = self._empty / self._drafts if self._drafts else 0.0
        gammas = np.arange(len(tokens))
        seconds = empty * self._pass_s[1] + (1.0 - empty) * self._pass_s[1:] + self._token_s * gammas
        speeds: np.ndarray = (empty + (1.0 - empty) * tokens) / seconds
        speeds[0] = 1.0 / self._pass_s[1]
        return speeds

    def observe(self, done: Pass) -> None:
        if done.fed:
            change = COST_RATE * (min(done.verify_s / self._pass_s[done.fed], OUTLIER) - 1.0)
            self._pass_s *= 1.0 + change / 2  # a machine that became slower is slower at every length
            self._pass_s[done.fed] *= 1.0 + change / 2
        self._spent_s += done.draft_s + done.verify_s
        if not done.gamma:
            return
        if self._best == 0:  # a probe: what it cost beyond plain decoding of the same tokens
            plain_s = (1 + done.accepted) * self._pass_s[1]
            self._lost_s = max(self._lost_s + done.draft_s + self._pass_s[1 + done.drafted] - plain_s, 0.0)
        each_s = done.draft_s / done.gamma
        self._token_s += (each_s - self._token_s) * (COST_RATE if self._drafts else 1.0)
        self._drafts = MEMORY * self._drafts + 1.0
        self._empty = MEMORY * self._empty + (not done.drafted)
        if not done.drafted:
            return
        judged = min(done.accepted + 1, done.drafted)
        self._accepted *= MEMORY
        self._reached *= MEMORY
        self._accepted[: done.accepted] += 1.0
        self._reached[:judged] += 1.0
