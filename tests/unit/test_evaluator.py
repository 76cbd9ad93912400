"""The evaluator and its intervals against an independent computation in float64, on cases where a shortcut shows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.bootstrap import BLOCKS, interval95, resampled_means, resampled_units
from ray_app.core.evaluation import BASELINES, AlignmentEvaluation, AlignmentEvaluator, derangement
from ray_app.core.metrics import THETAS, rate_key

WIDTH, PAIRS = 48, 300
"""More pairs than `RETRIEVAL_CHUNK`, not a multiple of it."""


class Identity(Adapter):
    """Returns the event feature."""

    def forward(self, event_BE: Tensor, noise: Any = None) -> Tensor:  # noqa: ARG002
        return event_BE


def unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def evaluate(event: np.ndarray, target: np.ndarray, mean: np.ndarray, seed: int = 0, **options: Any) -> Any:
    """Evaluate the event features as they are; the pairs come in uneven batches."""
    adapter = Identity(AdapterConfig("linear", event.shape[1], target.shape[1])).eval()
    evaluator = AlignmentEvaluator(adapter, torch.from_numpy(mean).float(), 1.0, 1.0, **options)
    for rows in np.array_split(np.arange(len(event)), 7):
        evaluator.add(torch.from_numpy(event[rows]).float(), torch.from_numpy(target[rows]).float())
    names = [f"drive{n % 5}" for n in range(len(event))]
    return evaluator.result(names, np.full(len(event), -1), seed)


def related(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Event features that know a part of their target, and the training mean, all with a large common part."""
    rng = np.random.default_rng(seed)
    common = 5 + rng.random(WIDTH)
    target = common + rng.standard_normal((PAIRS, WIDTH))
    event = 1.1 * common + 0.4 * (target - common) + 0.8 * rng.standard_normal((PAIRS, WIDTH))
    return event, target, common


def test_retrieval_is_by_the_cosine_of_both_sides_less_the_mean_training_target() -> None:
    event, target, mean = related()
    kept = torch.from_numpy(event).bfloat16().double().numpy()  # the evaluator keeps aligned features so
    similarity = unit(kept - mean) @ unit(target - mean).T
    own = np.diagonal(similarity)[:, None]
    ahead = (similarity >= own).sum(axis=1) - 1
    found = evaluate(event, target, mean).retrieval
    for k in (1, 5, 10):
        assert found[f"R@{k}"] == pytest.approx((ahead < k).mean(), abs=1.5 / PAIRS), k  # one near tie may turn
    assert 0.1 < found["R@1"] < 0.9
    assert found["chance_R@1"] == 1 / PAIRS
    for raw in (unit(kept) @ unit(target - mean).T, unit(kept - mean) @ unit(target).T):
        wrong = ((raw >= np.diagonal(raw)[:, None]).sum(axis=1) - 1 < 1).mean()
        assert abs(wrong - found["R@1"]) > 0.02  # the data can tell


def test_another_seed_pairs_with_other_targets_and_the_same_seed_with_the_same() -> None:
    names = [f"drive{n % 4}" for n in range(40)]
    others = [derangement(names, seed).tolist() for seed in (1, 1, 2)]
    assert others[0] == others[1]
    assert others[0] != others[2]
    event, target, mean = related()
    first, again, second = (evaluate(event, target, mean, seed).baselines["shuffled"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def bare(after: np.ndarray, baselines: dict[str, np.ndarray], names: tuple[str, ...], **other: Any) -> Any:
    others = {name: baselines.get(name, np.zeros(len(after))) for name in BASELINES}
    previous = other.pop("previous", np.full(len(after), np.nan))
    return AlignmentEvaluation(names, after, others, previous, {"after": 0.0, "before": 0.0}, {}, 0, **other)


def test_the_best_baseline_is_the_one_that_accepts_most_and_not_the_one_of_the_highest_mean() -> None:
    white = np.array([0.79] * 9 + [0.81])  # the higher mean
    before = np.array([0.81] * 4 + [0.1] * 6)  # accepts more at 0.80
    found = bare(np.full(10, 0.85), {"white": white, "before": before}, ("a",) * 10)
    assert white.mean() > before.mean()
    assert found.best_baseline() == "before"
    assert found.lift() == pytest.approx(0.6)
    assert found.best_baseline(0.70) == "white"
    assert found.lift(0.70) == pytest.approx(0.0)


def test_the_interval_of_lift_is_over_the_best_baseline_of_each_resample() -> None:
    """One baseline accepts the one half of the drives, a second the other: in every resample one is ahead by luck."""
    rng = np.random.default_rng(3)
    drives, windows = 12, 10
    first = np.repeat(np.arange(drives) % 2 == 0, windows)
    after = np.where(rng.random(drives * windows) < 0.7, 0.9, 0.1)
    baselines = {"before": np.where(first, 0.9, 0.1), "white": np.where(first, 0.1, 0.9)}
    names = tuple(f"d{n // windows:02d}" for n in range(drives * windows))
    found = bare(after, baselines, names).intervals()

    draw = np.random.default_rng(99)
    lifts, fixed = [], []
    for _ in range(4000):
        rows = np.concatenate([np.arange(windows) + windows * d for d in draw.integers(0, drives, drives)])
        accepted = (after[rows] > 0.8).mean()
        rates = [(baselines[name][rows] > 0.8).mean() for name in ("before", "white")]
        lifts.append(accepted - max(rates))
        fixed.append(accepted - rates[0])
    expected, wrong = np.quantile(lifts, (0.025, 0.975)), np.quantile(fixed, (0.025, 0.975))
    assert found["lift"] == pytest.approx(list(expected), abs=0.04)
    assert abs(wrong[1] - expected[1]) > 0.1  # a baseline that is chosen once would have another interval
    assert found["lift_by_theta"]["0.80"] == found["lift"]
    assert set(found["lift_by_theta"]) == {rate_key(theta) for theta in THETAS}


def test_the_previous_window_is_ahead_by_the_pairs_that_have_one() -> None:
    """On all pairs the adapter accepts 5 of 10, the previous window 3 of 5; on those 5 the adapter accepts 4."""
    after = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1])
    previous = np.array([0.9, 0.9, 0.9, 0.1, 0.1, *[np.nan] * 5])
    metrics = bare(after, {}, ("a",) * 10, previous=previous).metrics()
    assert metrics["previous_window_better"] is False
    assert metrics["baselines"]["previous_window"]["pairs"] == 5
    assert metrics["baselines"]["previous_window"]["cosine_accept_rate"]["0.80"] == pytest.approx(0.6)
    # The other way round: behind on all pairs (3 of 5 to 7 of 10), ahead where both are known (3 to 2).
    after = np.array([0.9, 0.9, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9])
    assert bare(after, {}, ("a",) * 10, previous=previous).metrics()["previous_window_better"] is True


def test_night_is_a_target_of_less_than_half_of_the_mean_training_target_s_brightness() -> None:
    mean = np.zeros(WIDTH)
    mean[: WIDTH // 4] = 0.8  # its mean is 0.2, its largest value 0.8
    brightness = np.array([0.05, 0.099, 0.101, 0.19, 0.21, 0.6])
    target = np.full((6, WIDTH), 1.0) * brightness[:, None]
    event = np.full((6, WIDTH), 1.0) * brightness[::-1, None]  # the other way round
    assert evaluate(event, target, mean, images=True).light == ("night", "night", "day", "day", "day", "day")
    assert evaluate(event, target, mean).light == ()


def test_bf16_is_the_precision_of_the_evaluator_s_forward_pass() -> None:
    config = AdapterConfig("lightweight", WIDTH, WIDTH, 64)
    event, target, mean = related()
    event, target = event / 20, target / 20
    adapter = build_adapter(config, seed=0).eval()
    cosines = {}
    for precision in ("fp32", "bf16"):
        evaluator = AlignmentEvaluator(adapter, torch.from_numpy(mean).float(), 1.0, 1.0, precision=precision)
        cosines[precision] = evaluator.add(torch.from_numpy(event).float(), torch.from_numpy(target).float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        aligned = adapter(torch.from_numpy(event).float()).double().numpy()
    expected = (unit(aligned) * unit(target)).sum(axis=1)
    np.testing.assert_allclose(cosines["bf16"]["after"], expected, atol=1e-6)
    assert not torch.equal(cosines["bf16"]["after"], cosines["fp32"]["after"])
    assert torch.equal(cosines["bf16"]["before"], cosines["fp32"]["before"])


@pytest.mark.parametrize(
    ("drives", "unit_name", "count"), [(1, "block", BLOCKS), (2, "block", BLOCKS), (3, "sequence", 3)]
)
def test_fewer_than_three_sequences_are_resampled_as_blocks(drives: int, unit_name: str, count: int) -> None:
    names = [f"d{n * drives // 60}" for n in range(60)]
    unit, units = resampled_units(names)
    assert (unit, units.max() + 1) == (unit_name, count)
    if unit == "block":
        assert np.array_equal(units, np.repeat(np.arange(BLOCKS), 60 // BLOCKS))


def test_a_resample_s_mean_is_over_its_own_pairs() -> None:
    """Two units of 1 and 9 pairs, in which the value is 1 and 0: a resample draws the first 0, 1 or 2 times."""
    units = np.array([0] + [1] * 9)
    values = np.array([1.0] + [0.0] * 9)
    means = resampled_means(units, [values], seed=0)[:, 0]
    assert set(np.round(means, 12)) == {0.0, 0.1, 1.0}  # 0 of 18, 1 of 10, 2 of 2
    assert (means == 0.0).mean() == pytest.approx(0.25, abs=0.04)
    assert interval95(np.arange(1001.0)) == [25.0, 975.0]
