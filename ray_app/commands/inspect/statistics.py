"""What the windows of a store are like, in numbers that can be told: quantiles, sequences, day and night, overlap.

Shapes: N = pairs of the index.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.commands.inspect.scan import BRIGHT, StoreScan
from ray_app.store.pair_store import PairIndex, previous_window

NIGHT_BELOW = 40.0
"""Of 255. In 40 rendered drives whose daytime is known this calls night none of 22 by day, 3 of 11 at dusk and 6 of 7
by night; real recordings at night were not at hand."""
NIGHT_RULE = (
    f"a sequence is called night where, in half of its frames or more, less than {1 - BRIGHT:.0%} of the "
    f"target picture's 16 × 16 cells are brighter than {NIGHT_BELOW:.0f} of 255; names of sequences are not used"
)
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def window_statistics(index: PairIndex, survey: StoreScan) -> dict[str, Any]:
    """Summaries over windows; each says of how many windows it is known, and is None where of none."""
    return {
        "events_per_window": summary(survey.num_events),
        "events_drawn": summary(survey.num_drawn),
        "positive_share_of_events_drawn": summary(positive_share(survey)),
        "active_share_of_drawn_image": summary(survey.active),
        "positive_share_of_drawn_image": summary(survey.positive),
        "frame_minus_window_centre_ms": summary(survey.frame_offset_us / 1000),
        "overlap_with_previous": summary(overlap_with_previous(index)),
        "blank": {side: int((getattr(survey, f"{side}_hash") == "").sum()) for side in ("event", "target")},
    }


def sequence_statistics(index: PairIndex, survey: StoreScan) -> list[dict[str, Any]]:
    """A line for each sequence, sorted by name."""
    names, inverse = np.unique(index.sequence, return_inverse=True)
    lines = []
    for number, name in enumerate(names.tolist()):
        rows = np.flatnonzero(inverse == number)
        bright = median(survey.bright[rows])
        lines.append(
            {
                "sequence": name,
                "pairs": len(rows),
                "t_start_us": int(index.t_start_us[rows].min()),
                "t_end_us": int(index.t_end_us[rows].max()),
                "brightness": bright,
                "daytime": None if bright is None else "night" if bright < NIGHT_BELOW else "day",
                "active_share": median(survey.active[rows]),
                "events_drawn": median(survey.num_drawn[rows]),
            }
        )
    return lines


def summary(values: NDArray[np.float64]) -> dict[str, Any] | None:
    """Quantiles and mean of what is known, and how many that is."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    quantiles = zip(QUANTILES, np.quantile(known, list(QUANTILES.values())).tolist(), strict=True)
    return {"known": int(known.size), **dict(quantiles), "mean": float(known.mean())}


def median(values: NDArray[np.float64]) -> float | None:
    """Of what is known."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else None


def positive_share(survey: StoreScan) -> NDArray[np.float64]:
    """Positive share of the events that were drawn, (N,); NaN where there were none, or it is not known."""
    return survey.num_positive / np.where(survey.num_drawn > 0, survey.num_drawn, np.nan)


def overlap_with_previous(index: PairIndex) -> NDArray[np.float64]:
    """Share of each window that the one before it covers, (N,); NaN for the first of a sequence and duration."""
    before = previous_window(index, np.arange(len(index)))
    length_us = index.t_end_us - index.t_start_us
    covered_us = np.clip(index.t_end_us[before] - index.t_start_us, 0, length_us)
    return np.where(before >= 0, covered_us / length_us, np.nan)
