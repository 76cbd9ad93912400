"""Evaluation of a model before it was served; parsed when the model is loaded, so that nothing fails later."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_app.core.metrics import THETAS, rate_key
from ray_app.errors import CheckpointError
from ray_app.parsing.json_text import parse_json

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError)
"""Exceptions raised by values of an unexpected form."""


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """Evaluation results for `/v1/model` and for the drift of live cosines."""

    test: dict[str, Any] | None
    """Results of promotion on the test part, with baselines; None if not measured."""
    val: dict[str, Any] | None
    """Results of training on the validation part; of baselines at most their acceptance at θ 0.80."""
    curve: dict[str, Any] | None
    """Acceptance by θ on the test part, else on the validation part."""
    drift_reference: tuple[str, Any, Any] | None
    """Part, bin edges, and shares of the bins of that part's cosines."""


def read_evaluation_record(name: str, evaluation: str | None, metrics: Mapping[str, Any]) -> EvaluationRecord:
    """Parse the tag `evaluation` of a registered version and a checkpoint's metrics. CheckpointError: malformed."""
    try:
        test, val = parse_json(evaluation) if evaluation else None, metrics.get("val")
        val = {**val, "without_baselines": "baselines" not in val} if val else None
        record = EvaluationRecord(test, val, acceptance_curve(test, val), drift_reference(test, val))
        json.dumps([record.test, record.val], allow_nan=False, ensure_ascii=False).encode()
    except MALFORMED as error:
        raise CheckpointError(
            f"{name}: its evaluation cannot be read ({type(error).__name__}: {error}); promote it again."
        ) from error
    return record


def acceptance_curve(test: dict[str, Any] | None, val: dict[str, Any] | None) -> dict[str, Any] | None:
    """Acceptance by θ: on the test part with its baselines, else on the validation part without them."""
    result, part = (test, "test") if test else (val, "val")
    rates = (result or {}).get("cosine_accept_rate")
    if not isinstance(rates, dict):
        return None
    keys = [rate_key(theta) for theta in THETAS if rate_key(theta) in rates]
    curve = {"part": part, "theta": [float(key) for key in keys], "adapter": [rates[key] for key in keys]}
    baselines = (test or {}).get("baselines", {})
    if not baselines:
        return {**curve, "without_baselines": True}
    of_baselines = {name: [one["cosine_accept_rate"][key] for key in keys] for name, one in baselines.items()}
    return {**curve, "baselines": of_baselines}


def drift_reference(test: dict[str, Any] | None, val: dict[str, Any] | None) -> tuple[str, Any, Any] | None:
    """Return part, bin edges and shares of the cosines on the test part, else on the validation part."""
    for part, result in (("test", test), ("val", val)):
        percentiles = (result or {}).get("percentiles")
        if isinstance(percentiles, Mapping) and percentiles:
            points = sorted(
                (float(name.removeprefix("P")) / 100, float(value)) for name, value in percentiles.items()
            )
            if not np.isfinite(points).all():
                raise ValueError("a percentile is not finite")
            shares = np.diff([0.0, *(share for share, _ in points), 1.0])
            return part, np.array([value for _, value in points]), shares
    return None


def stability_index(live: Any, edges: Any, expected: Any) -> float:
    """PSI = Σ (a − e)·ln(a / e) over bins; a, e: shares of live and expected values, an empty bin counts as 10⁻⁴."""
    counts = np.bincount(np.searchsorted(edges, live, side="left"), minlength=len(edges) + 1)
    actual = np.maximum(counts / len(live), 1e-4)
    expected = np.maximum(expected, 1e-4)
    return float(((actual - expected) * np.log(actual / expected)).sum())
