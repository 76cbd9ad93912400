"""`/v1/stats`: live numbers of all replicas. Counts are summed; percentiles and drift are over all samples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.evaluation_record import EvaluationRecord, stability_index

MIN_DRIFT_PAIRS = 100
"""Pairs needed for a drift value; fewer would be noise."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Numbers of one replica at one moment."""

    uptime_s: float
    """Seconds since the replica started."""
    codes: Counter[str]
    """Answers by status code."""
    request_rate: float
    """Requests per second over the last seconds."""
    pair_rate: float
    """Pairs per second over the last seconds."""
    seconds: list[float]
    """Durations of the last minute's requests."""
    pairs: int
    """Pairs aligned."""
    queue_rows: int
    """Pairs waiting."""
    in_flight: int
    """Requests being answered."""
    verified: int
    """Pairs that came with a target."""
    accepted: int
    """Verified pairs accepted at θ 0.80."""
    cos_sum: float
    """Sum of the cosines of verified pairs."""
    cosines: list[float]
    """Newest cosines of the model in service."""
    digest: str
    """Digest of the model in service."""


def summed(parts: Sequence[Snapshot], record: EvaluationRecord, digest: str) -> dict[str, Any]:
    """Sum up as JSON values. `record` is of the model `digest`; replicas with another model do not count in drift."""
    codes = sum((part.codes for part in parts), Counter[str]())
    seconds = [value for part in parts for value in part.seconds]
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
        "drift": drift([cosine for part in parts if part.digest == digest for cosine in part.cosines], record),
    }


def drift(cosines: Sequence[float], record: EvaluationRecord) -> dict[str, Any]:
    """Distance of live cosines from those of the part on which the model was evaluated."""
    psi = None
    if record.drift_reference and len(cosines) >= MIN_DRIFT_PAIRS:
        psi = stability_index(np.array(cosines), *record.drift_reference[1:])
    return {
        "live_pairs": len(cosines),
        "reference": record.drift_reference[0] if record.drift_reference else None,
        "psi": psi,
    }
