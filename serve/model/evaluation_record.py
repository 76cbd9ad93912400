"""How a model was judged before it is served: read once, when it is loaded, so that nothing in it fails later."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_app.core.metrics import THETAS, rate_key
from ray_app.errors import CheckpointError

MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a value of another form raises."""


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """What `/v1/model` and the drift of live cosines need."""

    test: dict[str, Any] | None
    """What promotion measured on the test part: acceptance by θ, of the baselines too. None where it did not."""
    val: dict[str, Any] | None
    """The same of the validation part, as training saw it: it has no baselines, and says so."""
    curve: dict[str, Any] | None
    """Acceptance by θ of the test part, else of the validation part."""
    drift_reference: tuple[str, Any, Any] | None
    """(part, edges, shares of the bins): the cosines of that part."""


def read_evaluation_record(name: str, evaluation: str | None, metrics: Mapping[str, Any]) -> EvaluationRecord:
    """From the tag `evaluation` of a registered version and a checkpoint's metrics. CheckpointError: not readable."""
    try:
        test, val = json.loads(evaluation) if evaluation else None, metrics.get("val")
        val = {**val, "without_baselines": True} if val else None
        made = EvaluationRecord(test, val, acceptance_curve(test, val), drift_reference(test, val))
        json.dumps([made.test, made.val], allow_nan=False)
    except MALFORMED as error:
        raise CheckpointError(
            f"{name}: how it was judged cannot be read ({type(error).__name__}: {error}); promote it again."
        ) from error
    return made


def acceptance_curve(test: dict[str, Any] | None, val: dict[str, Any] | None) -> dict[str, Any] | None:
    """Acceptance by θ: of the test part beside its baselines, else of the validation part, which has none."""
    found, part = (test, "test") if test else (val, "val")
    rates = (found or {}).get("cosine_accept_rate")
    if not isinstance(rates, dict):
        return None
    keys = [rate_key(theta) for theta in THETAS if rate_key(theta) in rates]
    curve = {"part": part, "theta": [float(key) for key in keys], "adapter": [rates[key] for key in keys]}
    baselines = (found or {}).get("baselines", {})
    if not baselines:
        return {**curve, "without_baselines": True}
    of_baselines = {name: [one["cosine_accept_rate"][key] for key in keys] for name, one in baselines.items()}
    return {**curve, "baselines": of_baselines}


def drift_reference(test: dict[str, Any] | None, val: dict[str, Any] | None) -> tuple[str, Any, Any] | None:
    """(part, edges, shares of the bins): cosines as they were on the test part, else on the validation part."""
    for part, found in (("test", test), ("val", val)):
        percentiles = (found or {}).get("percentiles")
        if isinstance(percentiles, Mapping) and percentiles:
            points = sorted(
                (float(name.removeprefix("P")) / 100, float(value)) for name, value in percentiles.items()
            )
            shares = np.diff([0.0, *(share for share, _ in points), 1.0])
            return part, np.array([value for _, value in points]), shares
    return None


def stability_index(live: Any, edges: Any, expected: Any) -> float:
    """PSI = Σ (a − e)·ln(a / e) over bins, a and e the shares of live and expected; an empty bin counts as 10⁻⁴."""
    counts = np.bincount(np.searchsorted(edges, live, side="left"), minlength=len(edges) + 1)
    actual = np.maximum(counts / len(live), 1e-4)
    expected = np.maximum(expected, 1e-4)
    return float(((actual - expected) * np.log(actual / expected)).sum())
