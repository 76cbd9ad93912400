"""Numbers of a replay: each a ratio of sums over rows, with a 95 % interval over blocks of neighbouring rows.

Shapes: S = blocks, M = sums of one block, K = samples of the bootstrap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.core.draft_cost import RowCost
from ray_app.core.draft_metrics import DraftCounts, block_bootstrap, break_even_alpha, expected_improvement
from ray_app.core.draft_replay import RowReplay, num_matches

SUMS = (
    *("rows", "tokens", "tokens_per_pass", "passes", "drafted", "accepted", "rejections", "matches", "prefix"),
    *("timed_rows", "plain_ms", "one_shot_ms", "continuous_ms", "slower", "own_ms", "step_ms", "event_step_ms"),
)
"""Columns of a block's sums, before the histogram of accepted prefixes."""
SLOWER = 1.01
"""A row that takes one hundredth more time than without a drafter has become slower."""
METRICS = (
    "tokens_per_target_pass",
    "mean_acceptance_length",
    "draft_acceptance_rate",
    "match_rate",
    "accepted_prefix_mean",
    "accepted_prefix_median",
    "one_shot_speedup",
    "expected_speedup",
)
"""What `--json` gives for each drafter, each with its interval."""


@dataclass(frozen=True, slots=True)
class ReplayedRow:
    """A row's replay beside its identity and cost."""

    block: int
    """Neighbouring rows share one: they are drawn together."""
    fold: int
    """Rows of one fold met the same drafter."""
    replay: RowReplay
    """What was accepted."""
    answer: tuple[int, ...]
    """The target's tokens."""
    cost: RowCost | None
    """None where no times were measured."""
    target_step_ms: float
    """One plain step of the target, 0 where not measured."""
    event_step_ms: float
    """EventGPT's time for each drafted token, 0 where the drafter does without it."""


def summarise(rows: Sequence[ReplayedRow], gamma: int, rng: np.random.Generator) -> dict[str, Any]:
    """`METRICS` and `interval95`, a [low, high] for each of them.

    Speed-ups are None where no times were measured; intervals are None with fewer than two blocks.
    """
    sums_SM = _sums(rows)
    with_times = bool(sums_SM[:, SUMS.index("timed_rows")].sum())
    means = _metrics(sums_SM.sum(axis=0, keepdims=True), gamma)[0]
    shown = [name for name in METRICS if with_times or not name.endswith("speedup")]
    numbers: dict[str, Any] = {
        name: float(value) if name in shown else None for name, value in zip(METRICS, means, strict=True)
    }
    interval: dict[str, list[float] | None] = dict.fromkeys(METRICS)
    if len(sums_SM) > 1:
        low_M, high_M = block_bootstrap(sums_SM, lambda total_KM: _metrics(total_KM, gamma), rng)
        for name, low, high in zip(METRICS, low_M, high_M, strict=True):
            interval[name] = [float(low), float(high)] if name in shown else None
    return {**numbers, "interval95": interval}


def details(rows: Sequence[ReplayedRow], gamma: int, shuffle: np.random.Generator) -> dict[str, Any]:
    """What the table does not hold: acceptance by place, histogram, controls, time.

    `shuffled_match_rate` compares drafts with answers in random order, within each fold: in another one the drafter
    would have learnt the answer.
    """
    counts = sum((row.replay.counts(gamma) for row in rows), DraftCounts())
    total = dict(zip(SUMS, _sums(rows).sum(axis=0), strict=False))
    folds: dict[int, list[ReplayedRow]] = {}
    for row in rows:
        folds.setdefault(row.fold, []).append(row)
    shuffled = sum(
        num_matches(row.replay.at_once, fold[other].answer)
        for fold in folds.values()
        for row, other in zip(fold, shuffle.permutation(len(fold)).tolist(), strict=True)
    )
    accepted = np.bincount([n for row in rows for n in row.replay.accepted], minlength=gamma + 1)
    timed, per_token_us = total["timed_rows"], total["own_ms"] * 1e3 / total["tokens"]
    cost_per_pass = 1.0 + gamma * _cost_coefficient(total) if timed else None
    return {
        "rows": len(rows),
        "num_drafts": counts.num_drafts,
        "num_draft_tokens": counts.num_draft_tokens,
        "num_accepted_tokens": counts.num_accepted_tokens,
        "num_accepted_tokens_per_pos": list(counts.num_accepted_tokens_per_pos),
        "acceptance_by_place": [n / counts.num_drafts for n in counts.num_accepted_tokens_per_pos],
        "passes_by_accepted": accepted.tolist(),
        "rows_by_prefix": np.bincount([row.replay.prefix for row in rows]).tolist(),
        "alpha": counts.alpha,
        "shuffled_match_rate": shuffled / total["tokens"],
        "verified_tokens_per_s": total["tokens"] / (total["own_ms"] / 1e3) if total["own_ms"] else None,
        "overhead_us_per_token": per_token_us,
        "timed_rows": int(timed),
        "continuous_speedup": total["plain_ms"] / total["continuous_ms"] if timed else None,
        "one_shot_slower_share": total["slower"] / timed if timed else None,
        "break_even_alpha": break_even_alpha(gamma, cost_per_pass) if cost_per_pass is not None else None,
    }


def match_rate_by_shift(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], shifts: Sequence[int]
) -> dict[int, float]:
    """Self-test: how well drafts match answers when moved by so many places. A best shift that is not 0 means that
    one side carries a token at its start which the other lacks."""
    tokens = sum(len(answer) for _, answer in pairs)
    return {shift: sum(num_matches(draft, answer, shift) for draft, answer in pairs) / tokens for shift in shifts}


def _sums(rows: Sequence[ReplayedRow]) -> NDArray[np.float64]:
    """Sums of each block, shape (S, M): `SUMS`, then how many rows had each accepted prefix."""
    longest = max(row.replay.length for row in rows)
    blocks = {block: n for n, block in enumerate(dict.fromkeys(row.block for row in rows))}
    sums_SM = np.zeros((len(blocks), len(SUMS) + longest + 1))
    for row in rows:
        replay, cost = row.replay, row.cost
        passes, accepted = len(replay.drafted), sum(replay.accepted)
        rejections = sum(a < d for a, d in zip(replay.accepted, replay.drafted, strict=True))
        line = [1, replay.length, replay.length / passes, passes, sum(replay.drafted), accepted, rejections]
        line += [replay.matches, replay.prefix]
        timed = [0.0] * 5
        if cost is not None:
            slower = cost.one_shot_ms > SLOWER * cost.plain_ms
            timed = [1.0, cost.plain_ms, cost.one_shot_ms, cost.continuous_ms, float(slower)]
        line += [*timed, replay.seconds * 1e3, row.target_step_ms, row.event_step_ms]
        sums_SM[blocks[row.block], : len(SUMS)] += line
        sums_SM[blocks[row.block], len(SUMS) + replay.prefix] += 1
    return sums_SM


def _metrics(total_KM: NDArray[np.float64], gamma: int) -> NDArray[np.float64]:
    """`METRICS` from totals, shape (K, len(METRICS)); a ratio of nothing is 0."""
    at = {name: total_KM[:, n] for n, name in enumerate(SUMS)}
    prefixes_KL = total_KM[:, len(SUMS) :]

    def ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(over, under, out=np.zeros_like(over), where=under > 0)

    alphas = ratio(at["accepted"], at["accepted"] + at["rejections"])
    # The drafter's time for each drafted token: EventGPT's step where it is needed, and the drafter's own.
    own_ms, step_ms = ratio(at["own_ms"], at["drafted"]), ratio(at["step_ms"], at["timed_rows"])
    costs = ratio(own_ms + ratio(at["event_step_ms"], at["timed_rows"]), step_ms)
    half_K1 = (prefixes_KL.sum(axis=1, keepdims=True) + 1) / 2
    cumulated_KL = prefixes_KL.cumsum(axis=1)
    middle = ((cumulated_KL < np.floor(half_K1)).sum(axis=1) + (cumulated_KL < np.ceil(half_K1)).sum(axis=1)) / 2
    return np.stack(
        [
            ratio(at["tokens_per_pass"], at["rows"]),
            1.0 + ratio(at["accepted"], at["passes"]),
            ratio(at["accepted"], at["drafted"]),
            ratio(at["matches"], at["tokens"]),
            ratio(at["prefix"], at["rows"]),
            middle,
            ratio(at["plain_ms"], at["one_shot_ms"]),
            np.array([expected_improvement(a, gamma, c) for a, c in zip(alphas, costs, strict=True)]),
        ],
        axis=1,
    )


def _cost_coefficient(total: dict[str, Any]) -> float:
    own_ms = total["own_ms"] / total["drafted"] if total["drafted"] else 0.0
    return (own_ms + total["event_step_ms"] / total["timed_rows"]) / (total["step_ms"] / total["timed_rows"])
