"""Statistics of a store's windows: quantiles, sequences, day and night, overlap.

Shapes: N = pairs of the index.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.commands.inspect.scan import BRIGHT, StoreScan
from ray_app.store.pair_store import PairIndex, previous_window

NIGHT_BELOW = 40.0
"""Brightness of 255 that separates night from day. In 40 rendered drives of known daytime it calls night none of 22
by day, 3 of 11 at dusk and 6 of 7 by night; not tested on real recordings at night."""
NIGHT_RULE = (
    f"a sequence is called night where, in half of its frames or more, less than {1 - BRIGHT:.0%} of the "
    f"target picture's 16 × 16 cells are brighter than {NIGHT_BELOW:.0f} of 255; names of sequences are not used"
)
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def window_statistics(index: PairIndex, scan: StoreScan) -> dict[str, Any]:
    """Summaries over windows, each with the number of windows for which it is known; None if for none."""
    return {
        "events_per_window": summarize(scan.num_events),
        "events_drawn": summarize(scan.num_drawn),
        "positive_share_of_events_drawn": summarize(positive_share(scan)),
        "active_share_of_drawn_image": summarize(scan.active),
        "positive_share_of_drawn_image": summarize(scan.positive),
        "frame_minus_window_centre_ms": summarize(scan.frame_offset_us / 1000),
        "overlap_with_previous": summarize(overlap_with_previous(index)),
        "blank": {side: int((getattr(scan, f"{side}_hash") == "").sum()) for side in ("event", "target")},
    }


def sequence_statistics(index: PairIndex, scan: StoreScan) -> list[dict[str, Any]]:
    """One line for each sequence, sorted by name."""
    names, inverse = np.unique(index.sequence, return_inverse=True)
    lines = []
    for number, name in enumerate(names.tolist()):
        rows = np.flatnonzero(inverse == number)
        bright = median(scan.bright[rows])
        lines.append(
            {
                "sequence": name,
                "pairs": len(rows),
                "t_start_us": int(index.t_start_us[rows].min()),
                "t_end_us": int(index.t_end_us[rows].max()),
                "brightness": bright,
                "daytime": None if bright is None else "night" if bright < NIGHT_BELOW else "day",
                "active_share": median(scan.active[rows]),
                "events_drawn": median(scan.num_drawn[rows]),
            }
        )
    return lines


def summarize(values: NDArray[np.float64]) -> dict[str, Any] | None:
    """Quantiles, mean and number of the known values; None if there is none."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    quantiles = zip(QUANTILES, np.quantile(known, list(QUANTILES.values())).tolist(), strict=True)
    return {"known": int(known.size), **dict(quantiles), "mean": float(known.mean())}


def median(values: NDArray[np.float64]) -> float | None:
    """Median of the known values; None if there is none."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else None


def positive_share(scan: StoreScan) -> NDArray[np.float64]:
    """Positive share of the events that were drawn, shape (N,); NaN where there were none, or it is unknown."""
    return scan.num_positive / np.where(scan.num_drawn > 0, scan.num_drawn, np.nan)


def overlap_with_previous(index: PairIndex) -> NDArray[np.float64]:
    """Share of each window that the one before covers, shape (N,); NaN for the first of a sequence and duration."""
    before = previous_window(index, np.arange(len(index)))
    length_us = index.t_end_us - index.t_start_us
    covered_us = np.clip(index.t_end_us[before] - index.t_start_us, 0, length_us)
    return np.where(before >= 0, covered_us / length_us, np.nan)
