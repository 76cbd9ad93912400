"""Result files of the reference, key for key and in its units, each followed by keys of our own.

Under the reference's own keys acceptance is in percent; everywhere else rates and lifts are fractions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ray_app.core.adapters.base import Adapter
from ray_app.core.metrics import THETA, rate_key

ALIGNMENT_UNITS = (
    "before_alignment, after_alignment: acceptance in percent; improvement.relative_improvement: percent; "
    "everywhere else rates and lifts are fractions in [0, 1]"
)
BENCHMARK_UNITS = (
    "before_adapter, after_adapter: acceptance in percent; improvement.acceptance_gain_0.8: percentage points; "
    "timing: seconds; everywhere else rates are fractions in [0, 1]"
)


def alignment_metrics(
    result: Mapping[str, Any], before: Mapping[str, Any] | None, adapter: Adapter
) -> dict[str, Any]:
    """`alignment_metrics_<S>.json`. `before` and `result` hold the means of `AlignmentCounts`.

    Without a `before`, where widths differ, the values that need it are null.
    """
    mean = before["cos_sim_mean"] if before else None
    gain = None if mean is None else result["cos_sim_mean"] - mean
    config = adapter.config
    ours = ("baselines", "best_baseline", "lift", "lift_by_theta", "verdict", "retrieval", "interval95", "split")
    further = (
        "by_sequence",
        "by_lighting",
        "data",
        "warnings",
        "fingerprint",
        "test_fingerprint",
        "checkpoint_sha256",
        "provenance",
    )
    return {
        "dataset": result["dataset"],
        "checkpoint": result["checkpoint"],
        "test_samples": result["pairs"],
        "feature_dim": config.event_dim,
        "before_alignment": before and statistics(before, "{}_cosine_similarity"),
        "after_alignment": statistics(result, "{}_cosine_similarity"),
        "percentiles_after": result["percentiles"],
        "improvement": {
            "cosine_similarity_gain": gain,
            "relative_improvement": 100 * gain / mean if gain is not None and mean else None,
        },
        "config": {
            "event_dim": config.event_dim,
            "target_dim": config.target_dim,
            "hidden_dim": config.hidden_dim,
            "num_layers": sum(isinstance(module, nn.Linear) for module in adapter.modules()),
            "adapter_type": config.strategy,
        },
        "units": ALIGNMENT_UNITS,
        **{key: result[key] for key in ours},
        "centered": {
            "cos_sim_mean": result["centered_cos_sim_mean"],
            "cos_sim_mean_before": result["centered_cos_sim_mean_before"],
        },
        **{key: result[key] for key in further},
    }


def benchmark_adapter_full(
    result: Mapping[str, Any], samples: Sequence[tuple[str, float | None, float]]
) -> dict[str, Any]:
    """`benchmark_adapter_full_<S>.json`. `samples`: identity, cos_sim before (None: no such) and after of some pairs.

    `result` and each of its `parts` hold the means of `AlignmentCounts`, for the adapter and every baseline.
    """
    ours = ("baselines", "best_baseline", "lift", "split", "data", "warnings", "fingerprint", "checkpoint_sha256")
    return {
        "dataset": result["dataset"],
        "total_samples": result["pairs"],
        "adapter_checkpoint": result["checkpoint"],
        "acceptance_threshold": THETA,
        **before_and_after(result),
        "timing": result["timing"],
        "sample_results": [
            {
                "id": sample_id,
                "cos_sim_before": cos_before,
                "cos_sim_after": cos_after,
                f"accepted_at_{THETA:g}": cos_after > THETA,
            }
            for sample_id, cos_before, cos_after in samples
        ],
        "units": BENCHMARK_UNITS,
        "parts": {
            name: {
                "pairs": part["pairs"],
                "training_data": part["training_data"],
                **before_and_after(part),
                **{key: part[key] for key in ("baselines", "best_baseline", "lift")},
            }
            for name, part in result["parts"].items()
        },
        **{key: result[key] for key in ours},
        "provenance": result["provenance"],
    }


def before_and_after(result: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of some pairs under the reference's keys."""
    before, key = result["baselines"].get("before"), rate_key(THETA)
    rates = [part["cosine_accept_rate"][key] for part in (result, before) if part]
    return {
        "before_adapter": before and statistics(before, "{}"),
        "after_adapter": statistics(result, "{}"),
        "percentiles_after": result["percentiles"],
        "improvement": {
            "cosine_sim_gain": result["cos_sim_mean"] - before["cos_sim_mean"] if before else None,
            f"acceptance_gain_{THETA:g}": 100 * (rates[0] - rates[1]) if before else None,
        },
    }


def statistics(means: Mapping[str, Any], name: str) -> dict[str, float]:
    """Mean, spread and acceptance in percent under the reference's keys; `name`: format of std, min and max."""
    return {
        "mean_cosine_similarity": means["cos_sim_mean"],
        **{name.format(kind): means[f"cos_sim_{kind}"] for kind in ("std", "min", "max")},
        **{f"acceptance_at_{float(theta):g}": 100 * rate for theta, rate in means["cosine_accept_rate"].items()},
    }
