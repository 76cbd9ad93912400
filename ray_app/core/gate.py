"""Verdicts, as pure functions: is a pair accepted, is a challenger promoted.

Shapes: B = pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ray_app.core.metrics import THETA, rate_key


def accept(cos_B: Tensor, theta: float = THETA) -> Tensor:
    """Which pairs come close enough, shape (B,), bool: cos_sim > θ, strictly."""
    return cos_B > theta


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the alias moves, and why."""

    promoted: bool
    """The challenger becomes champion."""
    forced: bool
    """It does only because it was asked to."""
    reason: str
    """One sentence with the numbers."""


def promotion_verdict(
    challenger: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    *,
    min_gain: float = 0.0,
    force: bool = False,
) -> Verdict:
    """Compares two evaluations: `AlignmentEvaluation.metrics()` with a `test_fingerprint` each.

    Without a champion the first version is promoted in any case, labelled with its lift. Otherwise it must
    gain more than `min_gain` over the champion at θ = 0.80, and have lift. `force` overrules, on record.
    """
    lift, control = challenger["lift"], challenger["best_control"]
    judged = f"lift {lift:+.4f} over the best control ({control})"
    if champion is None:
        note = "" if lift > 0 else "; it does not beat that control, and is champion only for want of another"
        return Verdict(True, False, f"first version: {judged}{note}")
    rate, best = (m["cosine_accept_rate"][rate_key(THETA)] for m in (challenger, champion))
    compared = f"cosine_accept_rate_0.80 {rate:.4f} against the champion's {best:.4f}"
    flaw = ""
    if challenger["test_fingerprint"] != champion["test_fingerprint"]:
        flaw = "the champion was judged on other test pairs"
    elif lift <= 0:
        flaw = f"does not beat the best control: {judged}"
    elif rate - best <= min_gain:
        flaw = f"not better than the champion by more than {min_gain:.4f}: {compared}"
    if flaw and not force:
        return Verdict(False, False, flaw)
    if flaw:
        return Verdict(True, True, f"forced, though {flaw}")
    return Verdict(True, False, f"{compared}; {judged}")
