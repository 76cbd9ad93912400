"""Evaluate an adapter and every baseline pair by pair, fed batch by batch.

The evaluator keeps the aligned features in bfloat16 and the targets as stored, for the baselines that pair one with
another: 450 KB a pair at 150,528 wide, 0.47 GB for 1,042 pairs.

Shapes: B = pairs of a batch, N = pairs in all, E, D = widths of event and target, T = thresholds,
R = resamples, C = columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.sequences import masked, sequence_cosine
from ray_app.core.bootstrap import RESAMPLES, interval95, resampled_means, resampled_units
from ray_app.core.metrics import THETA, THETAS, AlignmentCounts, cos_sim, rate_key, retrieval
from ray_app.core.optimizer_step import Precision, decode
from ray_app.errors import InputError

BASELINES = ("before", "white", "mean_target", "shuffled")
"""Rules without learning; lift is over the best of them. `before` needs features of one width, `white` images."""
RETRIEVAL_CHUNK = 128
"""Rows of the aligned features that are compared with all targets at a time."""
DARK = 0.5
"""A target below this share of the mean training target's brightness is called night."""

Cosines = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TrainingMeans:
    """Sums over training pairs; `a + b` merges shards; divide once."""

    pairs: int
    """Number of pairs."""
    target_sum_D: NDArray[np.float64]
    """Sum of target features as stored, before the scale."""
    tokens_T: NDArray[np.int64] | None = None
    """Token sequences only: pairs with a token at each position, shape (T,)."""

    @staticmethod
    def of(target_BD: NDArray[Any], token_width: int | None = None) -> "TrainingMeans":
        """Sums of one batch of stored features; `token_width`: width of a token, if they are token sequences."""
        exact = np.uint64 if target_BD.dtype.kind == "u" else np.float64
        sum_D = target_BD.sum(axis=0, dtype=exact).astype(np.float64)
        if not token_width:
            return TrainingMeans(len(target_BD), sum_D)
        has_token_BT = target_BD.reshape(len(target_BD), -1, token_width).any(axis=2)
        return TrainingMeans(len(target_BD), sum_D, has_token_BT.sum(axis=0))

    def __add__(self, other: "TrainingMeans") -> "TrainingMeans":
        tokens = [sums.tokens_T for sums in (self, other) if sums.tokens_T is not None]
        tokens_T = np.sum(tokens, axis=0) if tokens else None
        return TrainingMeans(self.pairs + other.pairs, self.target_sum_D + other.target_sum_D, tokens_T)

    def mean_target(self, scale: float) -> Tensor:
        """Mean training target, shape (D,), float32; of token sequences over those that reach a position.

        InputError where it is zero everywhere: as a baseline it has no direction.
        """
        if not self.target_sum_D.any():
            raise InputError(
                "the mean training target is zero everywhere, so the baseline mean_target has no cosine; "
                "check the pairs with `ray-app inspect`"
            )
        if self.tokens_T is None:
            return torch.from_numpy(self.target_sum_D * (scale / self.pairs)).float()
        sum_TW = self.target_sum_D.reshape(len(self.tokens_T), -1)
        return torch.from_numpy(sum_TW * (scale / np.maximum(self.tokens_T, 1)[:, None])).float().flatten()


@dataclass(frozen=True, slots=True)
class AlignmentEvaluation:
    """Cosines of every pair, each of length N in the order of the pairs, and the metrics they give."""

    sequences: tuple[str, ...]
    """Drive of each pair."""
    after: Cosines
    """Aligned feature with its own target."""
    baselines: dict[str, Cosines]
    """Cosines of those of `BASELINES` that such features have, by name."""
    previous_window: Cosines
    """The preceding window's target with this one; NaN where there is none."""
    centered: dict[str, float]
    """Mean cosine `after` and, where widths agree, `before` with the mean training target subtracted from both."""
    retrieval: dict[str, float]
    """R@1, R@5, R@10 by centred cosine: share of pairs whose own target is among the k nearest; and chance."""
    seed: int
    """Seed of the resampling."""
    light: tuple[str, ...] = ()
    """`day` or `night` of each pair, by its target's brightness; empty if targets are not images."""

    def best_baseline(self, theta: float = THETA) -> str:
        """Name of the baseline that accepts most at θ; of equals the first of `BASELINES`."""
        return max(self.baselines, key=lambda name: float((self.baselines[name] > theta).mean()))

    def lift(self, theta: float = THETA) -> float:
        """cosine_accept_rate of the adapter minus that of the best baseline."""
        return float((self.after > theta).mean() - (self.baselines[self.best_baseline(theta)] > theta).mean())

    def metrics(self) -> dict[str, Any]:
        """All metrics as JSON values; rates and lifts are fractions."""
        previous = self.previous_window[~np.isnan(self.previous_window)]
        baselines: dict[str, Any] = {name: _summary(cos) for name, cos in self.baselines.items()}
        better = False
        if previous.size:
            baselines["previous_window"] = _summary(previous)
            same = ~np.isnan(self.previous_window)
            better = bool((previous > THETA).mean() > (self.after[same] > THETA).mean())
        return {
            **AlignmentCounts.of(self.after).means(),
            "baselines": baselines,
            "best_baseline": self.best_baseline(),
            "lift": self.lift(),
            "lift_by_theta": {rate_key(theta): self.lift(theta) for theta in THETAS},
            "previous_window_better": better,
            "centered_cos_sim_mean": self.centered["after"],
            "centered_cos_sim_mean_before": self.centered.get("before"),
            "retrieval": self.retrieval,
            "interval95": self.intervals(),
            "by_sequence": self.groups(self.sequences),
            "by_lighting": self.groups(self.light),
        }

    def groups(self, labels: Sequence[str]) -> dict[str, Any]:
        """Pairs, mean cosine, acceptance and lift at θ of each label; the best baseline is that of all pairs.

        `lift_interval95`: as in `intervals`, resampled within the label: its sequences, or blocks if it has one or
        two. None where it has one pair.
        """
        best = self.baselines[self.best_baseline()] > THETA
        groups = {}
        for label in sorted(set(labels)):
            (members,) = np.nonzero(np.array(labels) == label)
            accepted, baseline = self.after[members] > THETA, best[members]
            unit, units = resampled_units([self.sequences[n] for n in members])
            lift_R = resampled_means(units, [accepted.astype(float) - baseline], self.seed)[:, 0]
            groups[label] = {
                "pairs": len(members),
                "cos_sim_mean": float(self.after[members].mean()),
                f"cosine_accept_rate_{rate_key(THETA)}": float(accepted.mean()),
                "lift": float(accepted.mean() - baseline.mean()),
                "lift_interval95": interval95(lift_R) if len(members) > 1 else None,
                "unit": unit,
                "units": int(units.max()) + 1,
            }
        return groups

    def intervals(self) -> dict[str, Any]:
        """95 % bootstrap intervals (percentile method) of mean, acceptance and lift.

        Whole sequences are resampled, since windows of one drive are alike; with fewer than three, contiguous
        blocks of windows. The best baseline is chosen again in every resample.
        """
        unit, units = resampled_units(self.sequences)
        columns = (self.after, *self.baselines.values())
        rates = [cos > theta for theta in THETAS for cos in columns]
        means_RC = resampled_means(units, [self.after, *rates], self.seed)
        rates_RTC = means_RC[:, 1:].reshape(RESAMPLES, len(THETAS), len(columns))
        lift_RT = rates_RTC[:, :, 0] - rates_RTC[:, :, 1:].max(axis=2)
        lifts = {rate_key(theta): interval95(lift_RT[:, n]) for n, theta in enumerate(THETAS)}
        return {
            "cos_sim_mean": interval95(means_RC[:, 0]),
            f"cosine_accept_rate_{rate_key(THETA)}": interval95(rates_RTC[:, THETAS.index(THETA), 0]),
            "lift": lifts[rate_key(THETA)],
            "lift_by_theta": lifts,
            "unit": unit,
            "units": int(units.max()) + 1,
            "resamples": RESAMPLES,
        }


@dataclass(slots=True)
class AlignmentEvaluator:
    """Takes batches of pairs in their order; `result` evaluates them."""

    adapter: Adapter
    """In evaluation mode, on `device`."""
    mean_target_D: Tensor
    """Mean training target."""
    event_scale: float
    """Factor from stored event features to values."""
    target_scale: float
    """Factor from stored target features to values."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device to compute on."""
    precision: Precision = "fp32"
    """bf16: autocast in the forward pass."""
    images: bool = False
    """True if targets are images of values in [0, 1], whose brightness separates day from night."""
    token_width: int | None = None
    """Width of a token if features are token sequences: a pair's cosine is the mean over its target's tokens."""
    _cosines: dict[str, list[Tensor]] = field(default_factory=dict)
    _brightness: list[Tensor] = field(default_factory=list)
    _aligned: list[Tensor] = field(default_factory=list)
    _targets: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, event_BE: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """Take a batch of stored features; returns its cosines `after`, `before`, …, each of shape (B,)."""
        assert not self.adapter.training
        event = decode(event_BE, self.event_scale, self.device)
        target = decode(target_BD, self.target_scale, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            aligned = self.adapter(event).float()
        mean_1D = self.mean_target_D.to(self.device)[None]
        cosines = {
            "after": pair_cosine(aligned, target, self.token_width),
            "centered_after": _cos_or_zero(self._centred(aligned), self._centred(target), self.token_width),
            **fixed_baselines(event, target, mean_1D, self.token_width, images=self.images),
        }
        if event.shape == target.shape:
            centred = self._centred(event), self._centred(target)
            cosines["centered_before"] = _cos_or_zero(*centred, self.token_width)
        cosines = {name: cos_B.cpu() for name, cos_B in cosines.items()}
        for name, cos_B in cosines.items():
            self._cosines.setdefault(name, []).append(cos_B)
        self._brightness.append(target.mean(dim=1).cpu())
        self._aligned.append(aligned.bfloat16())
        self._targets.append(target_BD.clone())
        return cosines

    @torch.no_grad()
    def result(self, sequences: Sequence[str], previous: NDArray[np.int64], seed: int = 0) -> AlignmentEvaluation:
        """Evaluate all pairs added; `sequences`: their drives, `previous`: position of the window before, or −1."""
        cosines = {name: torch.cat(parts).double().numpy() for name, parts in self._cosines.items()}
        aligned_ND, target_ND = torch.cat(self._aligned), torch.cat(self._targets)
        assert len(sequences) == len(previous) == len(target_ND)
        others = derangement(sequences, seed)
        return AlignmentEvaluation(
            sequences=tuple(sequences),
            after=cosines["after"],
            baselines={
                **{name: cosines[name] for name in BASELINES if name in cosines},
                "shuffled": self._against(aligned_ND, target_ND, others),
            },
            previous_window=self._targets_against(target_ND, previous),
            centered={
                name: float(cosines[f"centered_{name}"].mean())
                for name in ("after", "before")
                if f"centered_{name}" in cosines
            },
            retrieval=self._retrieval(aligned_ND, target_ND),
            seed=seed,
            light=self._light() if self.images else (),
        )

    def _light(self) -> tuple[str, ...]:
        """`night` where a target is less than half as bright as the mean training target."""
        dark = torch.cat(self._brightness) < DARK * float(self.mean_target_D.mean())
        return tuple("night" if is_dark else "day" for is_dark in dark.tolist())

    def _against(self, aligned_ND: Tensor, target_ND: Tensor, others: NDArray[np.int64]) -> Cosines:
        """Cosines of aligned feature i with target others[i]."""
        parts = []
        for rows in torch.arange(len(others)).split(RETRIEVAL_CHUNK):
            target = decode(target_ND[torch.from_numpy(others)[rows]], self.target_scale, self.device)
            parts.append(pair_cosine(aligned_ND[rows].float(), target, self.token_width).cpu())
        return torch.cat(parts).double().numpy()

    def _targets_against(self, target_ND: Tensor, previous: NDArray[np.int64]) -> Cosines:
        """Cosines of target i with target previous[i]; NaN where that is −1."""
        cosines = np.full(len(previous), np.nan)
        (known,) = np.nonzero(previous >= 0)
        for rows in np.array_split(known, max(1, len(known) // RETRIEVAL_CHUNK)):
            if rows.size:
                now, past = (
                    decode(target_ND[torch.from_numpy(which)], self.target_scale, self.device)
                    for which in (rows, previous[rows])
                )
                cosines[rows] = pair_cosine(past, now, self.token_width).cpu()
        return cosines

    def _retrieval(self, aligned_ND: Tensor, target_ND: Tensor) -> dict[str, float]:
        """Retrieval by centred cosine, of token sequences as a whole: uncentred, all features look alike."""
        similarity_NN = torch.empty(len(target_ND), len(target_ND))
        unit = torch.nn.functional.normalize
        for columns in torch.arange(len(target_ND)).split(RETRIEVAL_CHUNK):
            target = unit(self._centred(decode(target_ND[columns], self.target_scale, self.device)), dim=1)
            for rows in torch.arange(len(aligned_ND)).split(RETRIEVAL_CHUNK):
                aligned = unit(self._centred(aligned_ND[rows].float()), dim=1)
                similarity_NN[rows[:, None], columns] = (aligned @ target.T).cpu()
        return retrieval(similarity_NN)

    def _centred(self, feature_BD: Tensor) -> Tensor:
        """Feature minus the mean training target, where there is a token."""
        mean_1D = self.mean_target_D.to(self.device)[None]
        centred_BD = feature_BD - mean_1D
        return masked(centred_BD, feature_BD, self.token_width) if self.token_width else centred_BD


def pair_cosine(feature_BD: Tensor, target_BD: Tensor, token_width: int | None = None) -> Tensor:
    """Cosine of each pair, shape (B,); of token sequences the mean over the target's tokens.

    A zero vector, or a target without tokens, raises InputError.
    """
    if token_width is None:
        return cos_sim(feature_BD, target_BD)
    if (empty := torch.nonzero(~target_BD.any(dim=1))).numel():
        raise InputError(f"the target of pair {int(empty[0])} of the batch has no token")
    return sequence_cosine(feature_BD, target_BD, token_width).clamp(-1.0, 1.0)


def fixed_baselines(
    event_BE: Tensor, target_BD: Tensor, mean_1D: Tensor, token_width: int | None = None, *, images: bool
) -> dict[str, Tensor]:
    """Cosines (B,) of the baselines that need no adapter: `before` where widths agree, `white` for images."""
    answers = {
        **({"before": event_BE} if event_BE.shape == target_BD.shape else {}),
        **({"white": torch.ones_like(mean_1D).expand_as(target_BD)} if images else {}),
        "mean_target": mean_1D.expand_as(target_BD),
    }
    return {name: pair_cosine(answer_BD, target_BD, token_width) for name, answer_BD in answers.items()}


@dataclass(frozen=True, slots=True)
class Baselines:
    """Baselines of some pairs as counts, taken once; only `shuffled` changes with the adapter."""

    fixed: dict[str, AlignmentCounts]
    """Counts of the baselines that need no adapter, by name."""
    others: NDArray[np.int64]
    """For each pair the one whose target `shuffled` takes, shape (N,)."""

    def lift(self, after: AlignmentCounts, shuffled: AlignmentCounts) -> dict[str, Any]:
        """`baselines`, the cosine_accept_rate at θ of each, and `lift` over the best of them."""
        rates = {name: counts.accept_rate() for name, counts in (*self.fixed.items(), ("shuffled", shuffled))}
        return {"baselines": rates, "lift": after.accept_rate() - max(rates.values())}


def derangement(sequences: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Another pair for each pair, shape (N,): a permutation without fixed points, seeded.

    From another sequence if no sequence has more than half of the pairs. A single pair keeps itself.
    """
    rng = np.random.default_rng(seed)
    labels = np.unique(sequences, return_inverse=True)[1]
    # Drives in random order, their windows too; a shift by the longest drive's length leaves every drive.
    order = np.lexsort((rng.random(len(labels)), rng.permutation(labels.max() + 1)[labels]))
    shift = int(np.bincount(labels).max()) if labels.max() else 1
    others = np.empty(len(labels), np.int64)
    others[order] = np.roll(order, -shift)
    return others


def _cos_or_zero(a_BD: Tensor, b_BD: Tensor, token_width: int | None) -> Tensor:
    """Cosine; 0 by convention for a zero vector, such as the mean target minus the mean."""
    if token_width:
        return sequence_cosine(a_BD, b_BD, token_width)
    return torch.nn.functional.cosine_similarity(a_BD, b_BD, dim=1, eps=1e-12)


def _summary(cos: Cosines) -> dict[str, Any]:
    means = AlignmentCounts.of(cos).means()
    return {key: means[key] for key in ("pairs", "cos_sim_mean", "cos_sim_std", "cosine_accept_rate")}
