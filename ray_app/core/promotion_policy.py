"""Verdicts as pure functions: is a pair accepted, is a challenger promoted.

Shapes: B = pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ray_app.core.metrics import THETA, rate_key


def accept(cos_B: Tensor, theta: float = THETA) -> Tensor:
    """True where cos_sim > θ, strictly: shape (B,), bool."""
    return cos_B > theta


VerdictCode = Literal[
    "first",
    "promoted",
    "forced",
    "already_champion",
    "no_gain",
    "beaten_by_baseline",
    "other_test_set",
    "checksum_failed",
    "golden_failed",
]
"""`first`, `promoted` and `forced` move the alias; `already_champion` leaves it where it should be."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of a promotion, with its reason."""

    code: VerdictCode
    """For programs."""
    reason: str
    """One sentence with the numbers."""

    @property
    def promoted(self) -> bool:
        """True if the challenger is champion now."""
        return self.code in ("first", "promoted", "forced", "already_champion")

    @property
    def forced(self) -> bool:
        """True if it is champion only because of --force."""
        return self.code == "forced"


@dataclass(frozen=True, slots=True)
class InvalidCheckpoint:
    """A challenger that is damaged or answers differently from when it was saved."""

    code: Literal["checksum_failed", "golden_failed"]
    """`checksum_failed`: its bytes changed; `golden_failed`: its outputs changed."""
    reason: str
    """One sentence with the file or the row."""


def promotion_verdict(
    challenger: Mapping[str, Any] | InvalidCheckpoint,
    champion: Mapping[str, Any] | None,
    *,
    min_gain: float = 0.0,
    force: bool = False,
    is_champion: bool = False,
) -> Verdict:
    """Compare two evaluations: `AlignmentEvaluation.metrics()` with a `test_fingerprint` each.

    Without a champion the first version is promoted in any case, labelled with its lift. Otherwise it must gain more
    than `min_gain` over the champion at θ = 0.80, on the same pairs; and have lift if the champion has, so that a
    champion that beats the baselines is never replaced by one that does not. `force` overrides that verdict and is
    recorded; it never promotes an invalid checkpoint. `is_champion`: both are the same version.
    """
    if isinstance(challenger, InvalidCheckpoint):
        return Verdict(challenger.code, challenger.reason)
    lift, baseline = challenger["lift"], challenger["best_baseline"]
    lift_words = f"lift {lift:+.4f} over the best baseline ({baseline})"
    if is_champion:
        return Verdict("already_champion", f"it is the champion already: {lift_words}")
    if champion is None:
        reason = f"first version: {lift_words}"
        if lift <= 0:
            reason += "; it does not beat that baseline, and is promoted only because there is no champion yet"
        return Verdict("first", reason)
    rate, best = (m["cosine_accept_rate"][rate_key(THETA)] for m in (challenger, champion))
    compared = f"cosine_accept_rate_0.80 {rate:.4f} against the champion's {best:.4f}"
    neither = "; it does not beat that baseline, and neither does the champion" if lift <= 0 else ""
    verdict = Verdict("promoted", f"{compared}; {lift_words}{neither}")
    if challenger["test_fingerprint"] != champion["test_fingerprint"]:
        verdict = Verdict("other_test_set", "the champion was evaluated on other test pairs")
    elif rate - best <= min_gain:
        verdict = Verdict("no_gain", f"not better than the champion by more than {min_gain:.4f}: {compared}")
    elif lift <= 0 < champion["lift"]:
        verdict = Verdict(
            "beaten_by_baseline", f"does not beat the best baseline, and the champion does: {lift_words}"
        )
    return _or_forced(verdict, force)


def draft_verdict(
    challenger: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    gain: Mapping[str, Any] | None,
    *,
    min_gain: float = 0.0,
    force: bool = False,
    is_champion: bool = False,
) -> Verdict:
    """Compare two parts of drafters by tokens per target pass: `DraftEvaluation.metrics()` of the same answers.

    As `promotion_verdict`, but the whole paired interval of the `gain` over the champion must be above `min_gain`.
    `gain`: `DraftEvaluation.gain_over`; None: the champion cannot be evaluated on these answers.
    """
    rate = f"{challenger['tokens_per_target_pass']:.3f} tokens per target pass"
    over = f"{challenger['gain']:+.3f} over the best baseline ({challenger['best_baseline']})"
    beaten = challenger["gain"] <= 0
    if is_champion:
        return Verdict("already_champion", f"it is the champion already: {rate}, {over}")
    if champion is None:
        only = "; it does not beat that baseline, and is promoted only because there is no champion yet"
        return Verdict("first", f"first version: {rate}, {over}{only if beaten else ''}")
    if gain is None:
        return _or_forced(Verdict("other_test_set", "the champion cannot be evaluated on these answers"), force)
    low, high = gain["interval95"]
    compared = (
        f"{rate} against the champion's {champion['tokens_per_target_pass']:.3f}: {gain['difference']:+.3f} (95 %: "
        f"{low:+.3f} to {high:+.3f})"
    )
    verdict = Verdict("promoted", f"{compared}; {over}")
    if low <= min_gain:
        verdict = Verdict("no_gain", f"not surely better than the champion by more than {min_gain:.3f}: {compared}")
    elif beaten and champion["gain"] > 0:
        verdict = Verdict("beaten_by_baseline", f"does not beat the best baseline, and the champion does: {over}")
    return _or_forced(verdict, force)


def _or_forced(verdict: Verdict, force: bool) -> Verdict:
    if force and not verdict.promoted:
        return Verdict("forced", f"forced, though {verdict.reason}")
    return verdict
