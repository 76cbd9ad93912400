"""`/v1/stats`: live numbers of all replicas as one. Sums add up; percentiles and drift are of all samples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.evaluation_record import EvaluationRecord, stability_index

ENOUGH = 100
"""Pairs below which a comparison would be noise."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One replica's numbers at a moment."""

    uptime_s: float
    """Since it was made."""
    codes: Counter[str]
    """Answers by status code."""
    request_rate: float
    """Requests a second, lately."""
    pair_rate: float
    """Pairs a second, lately."""
    seconds: list[float]
    """Times of the last minute's requests."""
    pairs: int
    """Aligned."""
    queue_rows: int
    """Waiting."""
    in_flight: int
    """Requests being answered."""
    verified: int
    """Pairs that came with a target."""
    accepted: int
    """Of them, at θ 0.80."""
    cos_sum: float
    """Of their cosines."""
    cosines: list[float]
    """The newest ones, of the model in service."""
    digest: str
    """Of the model in service."""


def summed(parts: Sequence[Snapshot], judged: EvaluationRecord, digest: str) -> dict[str, Any]:
    """JSON values. `judged`: the model of this digest; replicas that serve another have no part in its drift."""
    codes = sum((part.codes for part in parts), Counter[str]())
    seconds = [each for part in parts for each in part.seconds]
    points = np.percentile(seconds, (50, 95, 99)) * 1e3 if seconds else np.empty(0)
    verified = sum(part.verified for part in parts)
    return {
        "replicas": len(parts),
        "uptime_s": round(max((part.uptime_s for part in parts), default=0.0), 3),
        "requests": {"total": codes.total(), "by_code": dict(codes)},
        "request_rate_10s": round(sum(part.request_rate for part in parts), 3),
        "pairs": sum(part.pairs for part in parts),
        "pair_rate_10s": round(sum(part.pair_rate for part in parts), 3),
        "latency_ms_60s": dict(zip(("p50", "p95", "p99"), points.round(3).tolist(), strict=False)),
        "queue_rows": sum(part.queue_rows for part in parts),
        "in_flight": sum(part.in_flight for part in parts),
        "verified": {
            "pairs": verified,
            "accepted": sum(part.accepted for part in parts),
            "cos_sim_mean": sum(part.cos_sum for part in parts) / verified if verified else None,
        },
        "drift": drift([each for part in parts if part.digest == digest for each in part.cosines], judged),
    }


def drift(cosines: Sequence[float], judged: EvaluationRecord) -> dict[str, Any]:
    """How far live cosines are from those of the part the model was judged on."""
    psi = None
    if judged.drift_reference and len(cosines) >= ENOUGH:
        psi = stability_index(np.array(cosines), *judged.drift_reference[1:])
    return {
        "live_pairs": len(cosines),
        "reference": judged.drift_reference[0] if judged.drift_reference else None,
        "psi": psi,
    }
