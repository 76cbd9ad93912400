"""Correlation of the cosine of aligned and target states with the acceptance of tokens.

A place is one token of an answer: its cosine, and whether the token of the aligned state is the target's. Both
are kept as sums over blocks of neighbouring rows, so that every number has an interval.
Shapes: N = places, S = blocks, K = samples of the bootstrap, H = bins, A = adapters, M = sums of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.core.speculative.metrics import block_bootstrap
from ray_app.errors import InputError

REPORT_THETAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
AUC_BINS = 200
"""Bins of the cosine's histogram, from -1 to 1: cosines of one bin count as equal in `auc`."""
RELIABILITY_BINS = 10
"""Bins of predicted chances, from 0 to 1."""
LEAST_ADAPTERS = 3
"""A rank correlation of two says nothing."""
HEAD = ("places", "cos", "matches", "squared_error")

FloatArray1D = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Places:
    """All judged places of one adapter."""

    cos_N: FloatArray1D
    """Cosine of the aligned state with the target's state at the same place."""
    match_N: NDArray[np.bool_]
    """True if the aligned state's token is the target's."""
    block_N: NDArray[np.int64]
    """Places of one block are drawn together."""

    def __post_init__(self) -> None:
        if not len(self.cos_N) == len(self.match_N) == len(self.block_N) or not len(self.cos_N):
            raise InputError(f"{len(self.cos_N)} cosines, {len(self.match_N)} matches: each place needs both.")

    def sums(self, num_blocks: int) -> FloatArray1D:
        """Return sums of each block, (S, M).

        Columns: `HEAD`; for each θ the places above it and the matches among them; the histograms of matching and of
        other places; places, chances and matches of the reliability bins.
        """
        cos_N, match_N = self.cos_N, self.match_N.astype(np.float64)
        chance_N = np.clip(cos_N, 0.0, 1.0)
        columns: list[FloatArray1D] = [np.ones_like(cos_N), cos_N, match_N, (chance_N - match_N) ** 2]
        for theta in REPORT_THETAS:
            columns += [(cos_N > theta).astype(np.float64), (cos_N > theta) * match_N]
        head_SM = np.stack([np.bincount(self.block_N, weights=c, minlength=num_blocks) for c in columns], axis=1)
        fine_N = np.clip(((cos_N + 1.0) / 2.0 * AUC_BINS).astype(np.int64), 0, AUC_BINS - 1)
        coarse_N = np.minimum((chance_N * RELIABILITY_BINS).astype(np.int64), RELIABILITY_BINS - 1)

        def histogram(bin_N: NDArray[np.int64], weight_N: FloatArray1D, bins: int) -> FloatArray1D:
            flat = np.bincount(self.block_N * bins + bin_N, weights=weight_N, minlength=num_blocks * bins)
            return flat.reshape(num_blocks, bins).astype(np.float64)

        return np.concatenate(
            [
                head_SM,
                histogram(fine_N, match_N, AUC_BINS),
                histogram(fine_N, 1.0 - match_N, AUC_BINS),
                *(histogram(coarse_N, w_N, RELIABILITY_BINS) for w_N in (np.ones_like(cos_N), chance_N, match_N)),
            ],
            axis=1,
        )


def judge(places: Places, num_blocks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return what one adapter's cosine predicts, as JSON values with `interval95` where there are two blocks.

    `match_rate_above` is P(match | cos > θ); `auc` the chance that a matching place has the higher cosine than one
    that does not match (0.5: the cosine says nothing); `calibration_error` the mean distance between the cosine,
    taken as a chance, and the share that matches, over bins; `brier` the mean squared error of that chance,
    `brier_constant` that of the match rate itself. None: there is nothing to average.
    """
    sums_SM = places.sums(num_blocks)
    names = _row_names()
    values = _numbers(sums_SM.sum(axis=0, keepdims=True))[0]
    numbers: dict[str, Any] = {name: _value(value) for name, value in zip(names, values, strict=True)}
    low_M = high_M = np.full(len(names), np.nan)
    if num_blocks > 1:
        with np.errstate(invalid="ignore"):
            low_M, high_M = block_bootstrap(sums_SM, _numbers, rng)
    interval = {
        name: None if np.isnan(low + high) else [float(low), float(high)]
        for name, low, high in zip(names, low_M, high_M, strict=True)
    }
    n_H, chance_H, match_H = _reliability(sums_SM.sum(axis=0, keepdims=True))
    return {
        "places": len(places.cos_N),
        **_nested(numbers),
        "interval95": _nested(interval),
        "reliability": [
            {
                "from": bin_ / RELIABILITY_BINS,
                "to": (bin_ + 1) / RELIABILITY_BINS,
                "places": int(n),
                "mean_cos": float(chance / n),
                "match_rate": float(match / n),
            }
            for bin_, (n, chance, match) in enumerate(zip(n_H[0], chance_H[0], match_H[0], strict=True))
            if n
        ],
    }


def rank_correlation(adapters: Mapping[str, Places], num_blocks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Spearman's ρ over adapters, of cosine acceptance and of tokens matched.

    Both against the match rate: `cosine_accept_rate` at θ 0.80 and `cos_mean`, each with its 95 % interval. None with
    fewer than three adapters, or where one side is the same for all.
    """
    names = ("cosine_accept_rate_0.80", "cos_mean")
    nothing = {"adapters": len(adapters), **dict.fromkeys(names), "interval95": dict.fromkeys(names)}
    if len(adapters) < LEAST_ADAPTERS:
        return nothing
    per_adapter = [each.sums(num_blocks) for each in adapters.values()]
    width = per_adapter[0].shape[1]

    def both(total_KM: FloatArray1D) -> FloatArray1D:
        rows = []
        for total_M in total_KM:
            total_AM = total_M.reshape(len(per_adapter), width)
            numbers_AM = _numbers(total_AM)
            match_A, mean_A = (
                numbers_AM[:, _row_names().index("match_rate")],
                numbers_AM[:, _row_names().index("cos_mean")],
            )
            rate_A = numbers_AM[:, _row_names().index("cosine_accept_rate_0.80")]
            rows.append([spearman(rate_A, match_A), spearman(mean_A, match_A)])
        return np.array(rows)

    sums_SM = np.concatenate(per_adapter, axis=1)
    found = both(sums_SM.sum(axis=0, keepdims=True))[0]
    result: dict[str, Any] = {**nothing, **{name: _value(rho) for name, rho in zip(names, found, strict=True)}}
    if num_blocks > 1:
        # A draw of blocks in which one side is the same for all adapters shows no order: 0.
        low, high = block_bootstrap(sums_SM, lambda total_KM: np.nan_to_num(both(total_KM)), rng)
        result["interval95"] = {
            name: None if np.isnan(rho) else [float(a), float(b)]
            for name, rho, a, b in zip(names, found, low, high, strict=True)
        }
    return result


def spearman(one_A: Sequence[float] | FloatArray1D, other_A: Sequence[float] | FloatArray1D) -> float:
    """Correlation of ranks, equal values sharing their mean rank; NaN where one side is constant."""
    a, b = (_ranks(np.asarray(side, np.float64)) for side in (one_A, other_A))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def cosines(one_TD: NDArray[np.float32], other_TD: NDArray[np.float32]) -> FloatArray1D:
    """Cosine of each row, shape (T,); 0 for a row of zeros."""
    a, b = one_TD.astype(np.float64), other_TD.astype(np.float64)
    length_T = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), length_T, out=np.zeros(len(a)), where=length_T > 0)


def _row_names() -> list[str]:
    per_theta = [
        f"{what}_{theta:.2f}" for theta in REPORT_THETAS for what in ("cosine_accept_rate", "match_rate_above")
    ]
    return ["cos_mean", "match_rate", *per_theta, "auc", "calibration_error", "brier", "brier_constant"]


def _numbers(total_KM: FloatArray1D) -> FloatArray1D:
    """`_names` from totals, shape (K, len(_names())); a ratio of nothing is NaN."""

    def ratio(over: FloatArray1D, under: FloatArray1D) -> FloatArray1D:
        return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)

    at = {name: total_KM[:, n] for n, name in enumerate(HEAD)}
    match_K = ratio(at["matches"], at["places"])
    columns = [ratio(at["cos"], at["places"]), match_K]
    for n in range(len(REPORT_THETAS)):
        above, matching = total_KM[:, len(HEAD) + 2 * n], total_KM[:, len(HEAD) + 2 * n + 1]
        columns += [ratio(above, at["places"]), ratio(matching, above)]
    first = len(HEAD) + 2 * len(REPORT_THETAS)
    hit_KH, miss_KH = (
        total_KM[:, first : first + AUC_BINS],
        total_KM[:, first + AUC_BINS : first + 2 * AUC_BINS],
    )
    below_KH = miss_KH.cumsum(axis=1) - miss_KH / 2
    columns.append(ratio((hit_KH * below_KH).sum(axis=1), hit_KH.sum(axis=1) * miss_KH.sum(axis=1)))
    n_KH, chance_KH, matches_KH = _reliability(total_KM)
    columns.append(ratio(np.abs(chance_KH - matches_KH).sum(axis=1), n_KH.sum(axis=1)))
    columns += [ratio(at["squared_error"], at["places"]), match_K * (1.0 - match_K)]
    return np.stack(columns, axis=1)


def _reliability(total_KM: FloatArray1D) -> tuple[FloatArray1D, FloatArray1D, FloatArray1D]:
    """Places, sums of chances and matches of each bin, each of shape (K, H)."""
    n, chance, match = np.split(total_KM[:, -3 * RELIABILITY_BINS :], 3, axis=1)
    return n, chance, match


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`cosine_accept_rate_0.80` and its like as {θ: value}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        what, _, theta = name.rpartition("_")
        if what in ("cosine_accept_rate", "match_rate_above"):
            nested.setdefault(what, {})[theta] = value
        else:
            nested[name] = value
    return nested


def _value(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _ranks(values_A: FloatArray1D) -> FloatArray1D:
    order = np.argsort(values_A, kind="stable")
    ranks = np.empty(len(values_A))
    ranks[order] = np.arange(len(values_A), dtype=np.float64)
    for value in np.unique(values_A):
        same = values_A == value
        ranks[same] = ranks[same].mean()
    return ranks
