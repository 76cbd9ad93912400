"""Numbers of a run: for each drafter ratios of sums over rows, with 95 % over sequences.

Shapes: S = sequences, M = sums of one sequence, K = samples of the bootstrap.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.core.speculative.metrics import DraftCounts, block_bootstrap

Line = Mapping[str, Any]
"""Line of a decoded row, as in the shards."""

SUMMED = ("tokens", "passes", "drafted", "accepted", "plain_ms", "total_ms", "plain_decode_ms", "decode_ms")
RATIOS = {
    "tokens_per_target_pass": ("tokens", "passes"),
    "draft_acceptance_rate": ("accepted", "drafted"),
    "speedup": ("plain_ms", "total_ms"),
    "decode_speedup": ("plain_decode_ms", "decode_ms"),
}
STAGES = ("encode_ms", "prefill_ms", "draft_ms", "verify_ms", "bookkeeping_ms", "learn_ms")
BLOCK_ROWS = 20
"""Neighbouring rows that the bootstrap draws together where there is one sequence only."""


def summarise(lines: Sequence[Line], name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return all numbers of one drafter: the field's names, speed-ups, shares of the time, texts that differ."""
    mine = [line["drafters"][name] for line in lines]
    counts = sum((counts_of(way) for way in mine), DraftCounts())
    stages = {stage: sum(way.get(stage, 0.0) for way in mine) for stage in STAGES}
    total_ms = sum(way["total_ms"] for way in mine)
    models_ms = total_ms - stages["bookkeeping_ms"]
    gammas = np.bincount([each[0] for way in mine for each in way["passes"]])
    differences = [
        {"row": line["row"], **way["difference"]}
        for line, way in zip(lines, mine, strict=True)
        if "difference" in way
    ]
    return {
        "rows": len(lines),
        "num_drafts": counts.num_drafts,
        "num_draft_tokens": counts.num_draft_tokens,
        "num_accepted_tokens": counts.num_accepted_tokens,
        "num_accepted_tokens_per_pos": list(counts.num_accepted_tokens_per_pos),
        "mean_acceptance_length": counts.mean_acceptance_length,
        "alpha": counts.alpha,
        **_ratios(lines, name, rng),
        "texts_that_differ": None if lines[0]["temperature"] > 0.0 else len(differences),
        "differences": differences,
        "stage_share": {stage.removesuffix("_ms"): ms / total_ms for stage, ms in stages.items()},
        "loop_overhead": stages["bookkeeping_ms"] / models_ms,
        "passes_by_gamma": gammas.tolist(),
        "weight_bytes": lines[-1]["weight_bytes"][name],
    }


def plain_summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the numbers of decoding without a drafter."""
    plain = [line["plain"] for line in lines]
    total_ms = sum(way["total_ms"] for way in plain)
    stages = {stage: sum(way.get(stage, 0.0) for way in plain) for stage in STAGES}
    tokens = sum(len(line["target_tokens"]) for line in lines)
    return {
        "rows": len(lines),
        "tokens": tokens,
        "tokens_per_s": 1e3 * tokens / total_ms,
        "step_ms": sum(map(decode_ms, plain)) / max(tokens - len(lines), 1),
        "stage_share": {stage.removesuffix("_ms"): ms / total_ms for stage, ms in stages.items()},
        "loop_overhead": stages["bookkeeping_ms"] / (total_ms - stages["bookkeeping_ms"]),
        "weight_bytes": lines[-1]["weight_bytes"]["target"],
    }


def counts_of(way: Mapping[str, Any]) -> DraftCounts:
    """Return what was drafted and accepted for one row."""
    passes = way["passes"]
    most = max((each[0] for each in passes), default=0)
    return DraftCounts.of([each[1] for each in passes], [each[2] for each in passes], most)


def decode_ms(way: Mapping[str, Any]) -> float:
    """Return the time of one row after the pass over its prompt."""
    milliseconds: float = way["total_ms"] - way["encode_ms"] - way["prefill_ms"]
    return milliseconds


def blocks_of(lines: Sequence[Line]) -> list[int]:
    """Return the block of each row that the bootstrap draws with it: its sequence, or neighbours of the only one."""
    names = [line["sequence"] for line in lines]
    if len(set(names)) < 2:
        return [place // BLOCK_ROWS for place in range(len(lines))]
    numbers = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def sums_of(lines: Sequence[Line], name: str) -> NDArray[np.float64]:
    """Return the sums of `SUMMED` of each block that the bootstrap draws, shape (S, M)."""
    blocks = blocks_of(lines)
    sums_SM = np.zeros((max(blocks) + 1, len(SUMMED)))
    for block, line in zip(blocks, lines, strict=True):
        way, plain = line["drafters"][name], line["plain"]
        counts = counts_of(way)
        sums_SM[block] += (
            len(way.get("tokens", line["target_tokens"])),
            counts.num_drafts,
            counts.num_draft_tokens,
            counts.num_accepted_tokens,
            plain["total_ms"],
            way["total_ms"],
            decode_ms(plain),
            decode_ms(way),
        )
    return sums_SM


def _ratios(lines: Sequence[Line], name: str, rng: np.random.Generator) -> dict[str, Any]:
    sums_SM = sums_of(lines, name)
    values = divide(sums_SM.sum(axis=0, keepdims=True))[0]
    ratios: dict[str, Any] = {ratio: float(value) for ratio, value in zip(RATIOS, values, strict=True)}
    interval: dict[str, list[float] | None] = dict.fromkeys(RATIOS)
    if len(sums_SM) > 1:
        low_M, high_M = block_bootstrap(sums_SM, divide, rng)
        interval = {ratio: [float(low), float(high)] for ratio, low, high in zip(RATIOS, low_M, high_M, strict=True)}
    return {**ratios, "interval95": interval}


def divide(total_KM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the `RATIOS` of totals, shape (K, len(RATIOS)); a ratio of nothing is 0."""
    columns = {name: total_KM[:, n] for n, name in enumerate(SUMMED)}
    return np.stack(
        [
            np.divide(columns[over], columns[under], out=np.zeros(len(total_KM)), where=columns[under] > 0)
            for over, under in RATIOS.values()
        ],
        axis=1,
    )
