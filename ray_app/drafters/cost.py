"""Measured time of a replayed row, with the drafter and without it.

The plain decoding of L tokens is one prefill and L steps. A pass over γ drafted tokens costs verify(γ) where that was
measured; where it was not, one plain step, which is the least it can cost: such speed-ups are upper bounds.
"""

from dataclasses import dataclass
from typing import Literal

from ray_app.drafters.replay import RowReplay

Device = Literal["same", "separate"]
"""Device of EventGPT: the target's, before its prefill, or one of its own, during it."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Measured milliseconds for one row."""

    target_prefill_ms: float
    """The target's pass over the prompt."""
    target_step_ms: float
    """One plain step of the target."""
    verify_ms: float
    """A target pass over γ drafted tokens."""
    empty_ms: float
    """A target pass for which the drafter had no token."""
    event_start_ms: float
    """EventGPT's vision and prefill, where the drafter needs its tokens, else 0."""
    event_step_ms: float
    """One step of EventGPT, where the drafter needs its tokens, else 0."""
    own_ms: float | None = None
    """The drafter's own time for the whole answer; None: that of the replay."""


@dataclass(frozen=True, slots=True)
class RowCost:
    """Milliseconds of one row."""

    plain_ms: float
    """The target alone."""
    one_shot_ms: float
    """Draft once while the target prefills (or before, on the same device), verify once, then plain steps."""
    continuous_ms: float
    """Draft for every pass. EventGPT's tokens, where needed, are all made beforehand."""


def row_cost(row: RowReplay, times: StepTimes, *, gamma: int, num_event_tokens: int, device: Device) -> RowCost:
    """`num_event_tokens` are EventGPT's tokens that a whole answer's drafts need.

    The drafter's own measured time is added in full to the continuous mode; in one-shot mode a pass's share of it.
    """
    own_ms = row.seconds * 1e3 if times.own_ms is None else times.own_ms

    def start(num_tokens: int) -> float:
        event_ms = times.event_start_ms + num_tokens * times.event_step_ms
        return max(times.target_prefill_ms, event_ms) if device == "separate" else times.target_prefill_ms + event_ms

    plain_ms = times.target_prefill_ms + row.length * times.target_step_ms
    tokens = row.at_once[:gamma]
    taken = min(row.prefix, len(tokens))
    verified_ms = times.verify_ms if tokens else times.target_step_ms
    one_shot_ms = (
        start(min(gamma, num_event_tokens))
        + own_ms / len(row.drafted)
        + verified_ms
        + max(row.length - taken - 1, 0) * times.target_step_ms
    )
    passes_ms = sum(times.verify_ms if drafted else times.empty_ms for drafted in row.drafted)
    return RowCost(plain_ms, one_shot_ms, start(num_event_tokens) + own_ms + passes_ms)
