"""Numbers of a replay: each a ratio of sums over rows, with a 95 % interval over blocks of neighbouring rows.

Shapes: S = blocks, M = sums of one block, K = samples of the bootstrap, G = places of a draft, L = prefixes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.core.speculative.metrics import DraftCounts, block_bootstrap, break_even_alpha, expected_improvement
from ray_app.drafters.cost import RowCost
from ray_app.drafters.replay import RowReplay, num_matches

SUMMED_FIELDS = (
    *("rows", "tokens", "tokens_per_pass", "passes", "drafted", "accepted", "rejections", "matches", "prefix"),
    *("timed_rows", "plain_ms", "one_shot_ms", "continuous_ms", "one_shot_slower", "continuous_slower"),
    *("own_ms", "step_ms", "verify_ms", "event_step_ms"),
)
"""Columns of a block's sums; behind them how often each place of a draft was accepted, and each prefix's rows."""
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
"""Metrics of each drafter in `--json`, each with its interval."""
MORE = ("alpha", "continuous_speedup", "one_shot_slower_share", "continuous_slower_share")
"""Metrics of `details` with an interval, besides acceptance by place."""
TIMED = tuple(name for name in (*METRICS, *MORE) if name.endswith(("speedup", "slower_share")))
"""Metrics of measured times."""


@dataclass(frozen=True, slots=True)
class ReplayedRow:
    """A row's replay with its identity and cost."""

    block: int
    """Neighbouring rows share one: they are drawn together."""
    fold: int
    """Rows of one fold met the same drafter."""
    replay: RowReplay
    """Outcome of the replay."""
    answer: tuple[int, ...]
    """The target's tokens."""
    cost: RowCost | None
    """None where no times were measured."""
    target_step_ms: float
    """One plain step of the target, 0 where not measured."""
    verify_ms: float
    """A target pass over γ drafted tokens, 0 where no times were measured."""
    event_step_ms: float
    """EventGPT's time for each drafted token, 0 where the drafter does without it."""


def summarise(rows: Sequence[ReplayedRow], gamma: int, rng: np.random.Generator) -> dict[str, Any]:
    """`METRICS` and `interval95`, a [low, high] for each of them.

    Speed-ups are None where no times were measured; intervals are None with fewer than two blocks.
    """
    sums_SM = _sums(rows, gamma)
    means, interval = _with_intervals(METRICS, sums_SM, lambda total_KM: _metrics(total_KM, gamma), rng)
    return {**means, "interval95": interval}


def details(rows: Sequence[ReplayedRow], gamma: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the numbers beyond the table: acceptance by place, histogram, baselines, time, with `interval95`.

    `shuffled_match_rate` compares drafts with answers in random order, within each fold: in another one the drafter
    would have learnt the answer.
    """
    counts = sum((row.replay.counts(gamma) for row in rows), DraftCounts())
    folds: dict[int, list[ReplayedRow]] = {}
    for row in rows:
        folds.setdefault(row.fold, []).append(row)
    shuffled = sum(
        num_matches(row.replay.at_once, fold[other].answer)
        for fold in folds.values()
        for row, other in zip(fold, rng.permutation(len(fold)).tolist(), strict=True)
    )
    sums_SM = _sums(rows, gamma)
    total = dict(zip(SUMMED_FIELDS, sums_SM.sum(axis=0), strict=False))
    names = (*MORE, *(str(place) for place in range(1, gamma + 1)))
    means, interval = _with_intervals(names, sums_SM, lambda total_KM: _more(total_KM, gamma), rng)
    accepted = np.bincount([n for row in rows for n in row.replay.accepted], minlength=gamma + 1)
    timed = total["timed_rows"]
    c = _cost_coefficient(total) if timed else None
    verify_steps = total["verify_ms"] / total["step_ms"] if timed else None
    least = None if c is None or verify_steps is None else break_even_alpha(gamma, verify_steps + gamma * c)
    return {
        "rows": len(rows),
        "num_speculative_tokens": gamma,
        "num_drafts": counts.num_drafts,
        "num_draft_tokens": counts.num_draft_tokens,
        "num_accepted_tokens": counts.num_accepted_tokens,
        "num_accepted_tokens_per_pos": list(counts.num_accepted_tokens_per_pos),
        "acceptance_by_place": [means[name] for name in names[len(MORE) :]],
        "passes_by_accepted": accepted.tolist(),
        "rows_by_prefix": np.bincount([row.replay.prefix for row in rows]).tolist(),
        "shuffled_match_rate": shuffled / total["tokens"],
        "verified_tokens_per_s": total["tokens"] / (total["own_ms"] / 1e3) if total["own_ms"] else None,
        "overhead_us_per_token": total["own_ms"] * 1e3 / total["tokens"],
        "timed_rows": int(timed),
        "cost_coefficient": c,
        "verify_steps": verify_steps,
        "break_even_alpha": least,
        **{name: means[name] for name in MORE},
        "interval95": {
            **{name: interval[name] for name in MORE},
            "acceptance_by_place": [interval[name] for name in names[len(MORE) :]],
        },
    }


def rate_of_group(rows: Sequence[ReplayedRow], rng: np.random.Generator) -> dict[str, Any]:
    """Tokens per target pass of some rows, with `interval95`."""
    sums_SM = _sums(rows, 0)
    name = METRICS[0]
    means, interval = _with_intervals((name,), sums_SM, lambda total_KM: _metrics(total_KM, 0)[:, :1], rng)
    return {**means, "interval95": interval[name]}


def match_rate_by_shift(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], shifts: Sequence[int]
) -> dict[int, float]:
    """Return the match rate of drafts and answers for each shift between them, as a self-test.

    A best shift that is not 0 means that one side carries a token at its start which the other lacks.
    """
    tokens = sum(len(answer) for _, answer in pairs)
    return {shift: sum(num_matches(draft, answer, shift) for draft, answer in pairs) / tokens for shift in shifts}


def _with_intervals(
    names: Sequence[str],
    sums_SM: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    rng: np.random.Generator,
) -> tuple[dict[str, float | None], dict[str, list[float] | None]]:
    """Each name's value and interval; `statistic` gives them in this order."""
    timed = bool(sums_SM[:, SUMMED_FIELDS.index("timed_rows")].sum())
    shown = [timed or name not in TIMED for name in names]
    value_M = statistic(sums_SM.sum(axis=0, keepdims=True))[0]
    values = {n: float(value) if show else None for n, value, show in zip(names, value_M, shown, strict=True)}
    interval: dict[str, list[float] | None] = dict.fromkeys(names)
    if len(sums_SM) > 1:
        low_M, high_M = block_bootstrap(sums_SM, statistic, rng)
        for name, low, high, show in zip(names, low_M, high_M, shown, strict=True):
            interval[name] = [float(low), float(high)] if show else None
    return values, interval


def _sums(rows: Sequence[ReplayedRow], gamma: int) -> NDArray[np.float64]:
    """Return sums of each block, (S, M): `SUMS`, acceptances of each place, rows that had each prefix."""
    longest = max(row.replay.length for row in rows)
    blocks = {block: n for n, block in enumerate(dict.fromkeys(row.block for row in rows))}
    prefixes = len(SUMMED_FIELDS) + gamma
    sums_SM = np.zeros((len(blocks), prefixes + longest + 1))
    for row in rows:
        replay, cost = row.replay, row.cost
        passes, accepted = len(replay.drafted), sum(replay.accepted)
        rejections = sum(a < d for a, d in zip(replay.accepted, replay.drafted, strict=True))
        line = [1, replay.length, replay.length / passes, passes, sum(replay.drafted), accepted, rejections]
        line += [replay.matches, replay.prefix]
        timed = [0.0] * 6
        if cost is not None:
            both = (cost.one_shot_ms, cost.continuous_ms)
            timed = [1.0, cost.plain_ms, *both, *(float(ms > SLOWER * cost.plain_ms) for ms in both)]
        line += [*timed, replay.seconds * 1e3, row.target_step_ms, row.verify_ms, row.event_step_ms]
        sums_M = sums_SM[blocks[row.block]]
        sums_M[: len(SUMMED_FIELDS)] += line
        sums_M[len(SUMMED_FIELDS) : prefixes] += replay.counts(gamma).num_accepted_tokens_per_pos
        sums_M[prefixes + replay.prefix] += 1
    return sums_SM


def _ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a ratio of nothing is 0."""
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)


def _metrics(total_KM: NDArray[np.float64], gamma: int) -> NDArray[np.float64]:
    """`METRICS` from totals, shape (K, len(METRICS))."""
    at = {name: total_KM[:, n] for n, name in enumerate(SUMMED_FIELDS)}
    prefixes_KL = total_KM[:, len(SUMMED_FIELDS) + gamma :]
    alphas = _ratio(at["accepted"], at["accepted"] + at["rejections"])
    # The drafter's time for each drafted token: EventGPT's step where it is needed, and the drafter's own.
    own_ms, step_ms = _ratio(at["own_ms"], at["drafted"]), _ratio(at["step_ms"], at["timed_rows"])
    costs = _ratio(own_ms + _ratio(at["event_step_ms"], at["timed_rows"]), step_ms)
    half_K1 = (prefixes_KL.sum(axis=1, keepdims=True) + 1) / 2
    cumulated_KL = prefixes_KL.cumsum(axis=1)
    middle = ((cumulated_KL < np.floor(half_K1)).sum(axis=1) + (cumulated_KL < np.ceil(half_K1)).sum(axis=1)) / 2
    return np.stack(
        [
            _ratio(at["tokens_per_pass"], at["rows"]),
            1.0 + _ratio(at["accepted"], at["passes"]),
            _ratio(at["accepted"], at["drafted"]),
            _ratio(at["matches"], at["tokens"]),
            _ratio(at["prefix"], at["rows"]),
            middle,
            _ratio(at["plain_ms"], at["one_shot_ms"]),
            np.array([expected_improvement(a, gamma, c) for a, c in zip(alphas, costs, strict=True)]),
        ],
        axis=1,
    )


def _more(total_KM: NDArray[np.float64], gamma: int) -> NDArray[np.float64]:
    """`MORE`, and how often each place of a draft was accepted, shape (K, len(MORE) + γ)."""
    at = {name: total_KM[:, n] for n, name in enumerate(SUMMED_FIELDS)}
    places_KG = total_KM[:, len(SUMMED_FIELDS) : len(SUMMED_FIELDS) + gamma]
    more_KM = np.stack(
        [
            _ratio(at["accepted"], at["accepted"] + at["rejections"]),
            _ratio(at["plain_ms"], at["continuous_ms"]),
            _ratio(at["one_shot_slower"], at["timed_rows"]),
            _ratio(at["continuous_slower"], at["timed_rows"]),
        ],
        axis=1,
    )
    return np.concatenate([more_KM, places_KG / at["passes"][:, None]], axis=1)


def _cost_coefficient(total: dict[str, Any]) -> float:
    own_ms = total["own_ms"] / total["drafted"] if total["drafted"] else 0.0
    return (own_ms + total["event_step_ms"] / total["timed_rows"]) / (total["step_ms"] / total["timed_rows"])
