"""Counts add up to the whole; baselines, lift and intervals against NumPy and hand-worked cases."""

import numpy as np
import pytest
import torch

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.evaluation import BASELINES, AlignmentEvaluation, AlignmentEvaluator, TrainingMeans, derangement
from ray_app.core.metrics import BIN_WIDTH, PERCENTILES, THETAS, AlignmentCounts, cos_sim, rate_key, retrieval
from ray_app.core.promotion_policy import accept, promotion_verdict
from ray_app.errors import InputError


def cosines(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.3, 1.0, n).astype(np.float32)


def test_cos_sim_agrees_with_float64_at_full_width() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 150_528)), rng.random((3, 150_528))
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = cos_sim(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_zero_vector_has_no_cosine() -> None:
    with pytest.raises(InputError, match="pair 1"):
        cos_sim(torch.ones(2, 4), torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_counts_of_two_shards_add_up_to_the_whole() -> None:
    cos = cosines(1001)
    whole = AlignmentCounts.of(cos).means()
    parts = (AlignmentCounts.of(cos[:400]) + AlignmentCounts.of(cos[400:]) + AlignmentCounts()).means()
    assert parts.pop("cos_sim_mean") == pytest.approx(whole.pop("cos_sim_mean"), abs=1e-12)
    assert parts.pop("cos_sim_std") == pytest.approx(whole.pop("cos_sim_std"), abs=1e-9)
    assert parts == whole


def test_counts_survive_the_way_through_an_all_reduce() -> None:
    a, b = AlignmentCounts.of(cosines(100)), AlignmentCounts.of(cosines(33, seed=1))
    (sums_a, maxima_a), (sums_b, maxima_b) = a.pack(), b.pack()
    back = AlignmentCounts.unpack(sums_a + sums_b, torch.maximum(maxima_a, maxima_b))
    assert back.means() == (a + b).means()


def test_means_agree_with_numpy_and_percentiles_within_a_bin() -> None:
    cos = cosines(5000)
    means = AlignmentCounts.of(torch.from_numpy(cos)).means()
    assert means["cos_sim_mean"] == pytest.approx(cos.astype(float).mean())
    assert means["cos_sim_std"] == pytest.approx(cos.astype(float).std())
    assert (means["cos_sim_min"], means["cos_sim_max"]) == (float(cos.min()), float(cos.max()))
    for theta in THETAS:
        assert means["cosine_accept_rate"][rate_key(theta)] == (cos > np.float32(theta)).mean()
    for percent in PERCENTILES:
        exact = np.percentile(cos, percent, method="lower")
        assert abs(means["percentiles"][f"P{percent}"] - exact) <= BIN_WIDTH


def test_acceptance_is_strict() -> None:
    on_the_line = torch.tensor([0.8, 0.81])
    assert accept(on_the_line, 0.8).tolist() == [False, True]
    assert AlignmentCounts.of(on_the_line).means()["cosine_accept_rate"]["0.80"] == 0.5


def test_cosines_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="1 of 2"):
        AlignmentCounts.of(np.array([0.5, np.nan]))


def test_retrieval_of_a_hand_worked_matrix() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.5, 0.5, 0.5]])
    found = retrieval(similarity, (1, 2, 3))
    assert found == {
        "R@1": pytest.approx(1 / 3),
        "R@2": pytest.approx(2 / 3),
        "R@3": 1.0,
        "chance_R@1": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize("sizes", [[1], [5], [3, 3], [4, 2, 2], [1, 1, 1, 1], [7, 2, 1]])
def test_a_derangement_is_a_permutation_without_fixed_points(sizes: list[int]) -> None:
    sequences = [f"drive{i}" for i, size in enumerate(sizes) for _ in range(size)]
    others = derangement(sequences, seed=1)
    assert sorted(others.tolist()) == list(range(len(sequences)))
    if len(sequences) > 1:
        assert not (others == np.arange(len(sequences))).any()
    if 2 * max(sizes) <= len(sequences):
        assert all(sequences[i] != sequences[j] for i, j in enumerate(others))


def evaluated(
    strategy: str = "lightweight", n: int = 24
) -> tuple[AlignmentEvaluation, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    event, target = (rng.integers(1, 256, (n, 30)).astype(np.uint8) for _ in range(2))
    adapter = build_adapter(AdapterConfig(strategy, 30, 30, 8), seed=0).eval()
    means = TrainingMeans.of(target[: n // 2]) + TrainingMeans.of(target[n // 2 :])
    evaluator = AlignmentEvaluator(adapter, means.mean_target(1 / 255), 1 / 255, 1 / 255, images=True)
    for start in range(0, n, 5):
        evaluator.add(torch.from_numpy(event[start : start + 5]), torch.from_numpy(target[start : start + 5]))
    previous = np.array([i - 1 if i % 4 else -1 for i in range(n)])
    aligned = adapter(torch.from_numpy(event / 255).float()).detach().double().numpy()
    return evaluator.result([f"drive{i // 4}" for i in range(n)], previous), event / 255, target / 255, aligned


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_every_baseline_is_what_its_name_says() -> None:
    found, event, target, aligned = evaluated()
    np.testing.assert_allclose(found.after, cosine(aligned, target), atol=1e-5)
    np.testing.assert_allclose(found.baselines["before"], cosine(event, target), atol=1e-5)
    np.testing.assert_allclose(found.baselines["white"], cosine(np.ones_like(target), target), atol=1e-5)
    np.testing.assert_allclose(found.baselines["mean_target"], cosine(target.mean(0)[None], target), atol=1e-5)
    others = derangement(found.sequences, 0)
    # The aligned features are kept in bfloat16 for this one: 8 bits of mantissa.
    np.testing.assert_allclose(found.baselines["shuffled"], cosine(aligned, target[others]), atol=3e-3)
    there = np.array([i % 4 > 0 for i in range(len(target))])
    assert np.isnan(found.previous_window[~there]).all()
    np.testing.assert_allclose(found.previous_window[there], cosine(target[1:], target[:-1])[there[1:]], atol=1e-5)
    mean = target.mean(0)
    assert found.centered["after"] == pytest.approx(cosine(aligned - mean, target - mean).mean(), abs=1e-4)


def test_lift_is_taken_over_the_best_baseline_and_not_over_the_previous_window() -> None:
    low, high = np.full(10, 0.5), np.full(10, 0.9)
    half = np.where(np.arange(10) < 5, 0.9, 0.5)
    baselines = {"before": low, "white": half, "mean_target": low, "shuffled": low}
    found = AlignmentEvaluation(("d",) * 10, high, baselines, high, {"after": 0.1, "before": 0.0}, {}, 0)
    metrics = found.metrics()
    assert (metrics["best_baseline"], metrics["lift"]) == ("white", 0.5)
    assert metrics["interval95"]["unit"] == "block"
    assert metrics["baselines"]["previous_window"]["pairs"] == 10
    assert not metrics["previous_window_better"]


def test_intervals_resample_whole_sequences() -> None:
    rng = np.random.default_rng(0)
    rates = rng.random(40)
    after = np.concatenate([np.where(rng.random(25) < rate, 0.9, 0.5) for rate in rates])
    names = tuple(f"drive{i // 25:02d}" for i in range(1000))
    zero = {name: np.full(1000, 0.1) for name in BASELINES}
    found = AlignmentEvaluation(names, after, zero, np.full(1000, np.nan), {"after": 0, "before": 0}, {}, 0)
    interval = found.intervals()
    low, high = interval["cosine_accept_rate_0.80"]
    per_drive = (after.reshape(40, 25) > 0.8).mean(1)
    standard_error = per_drive.std(ddof=1) / np.sqrt(40)  # five times that of 1,000 independent windows
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.12)
    assert (interval["unit"], interval["units"]) == ("sequence", 40)
    assert interval["lift"] == interval["cosine_accept_rate_0.80"]


def grouped(names: tuple[str, ...], light: tuple[str, ...], accepted: np.ndarray) -> AlignmentEvaluation:
    """Pairs that are accepted or not, of which no baseline accepts one."""
    none = {name: np.full(len(names), 0.1) for name in BASELINES}
    after, no_window = np.where(accepted, 0.9, 0.5), np.full(len(names), np.nan)
    return AlignmentEvaluation(names, after, none, no_window, {"after": 0, "before": 0}, {}, 0, light)


def test_an_interval_within_a_light_is_over_its_sequences_and_within_a_sequence_over_its_blocks() -> None:
    """Worked by hand.

    Every day drive has a lift of one half, in every resample; each pair by itself would have ± 0.1. Of 20 night pairs
    of one drive the first half is accepted: 10 blocks, so B(10, 1/2) / 10, whose quantiles are 2 and 8
    (P(B ≤ 1) = 0.011, P(B ≤ 2) = 0.055).
    """
    names = tuple(f"day{n // 20}" for n in range(80)) + ("night",) * 20 + ("lone",)
    light = ("day",) * 80 + ("night",) * 20 + ("dusk",)
    accepted = np.concatenate([np.arange(80) % 2 == 0, np.arange(20) < 10, [True]])
    metrics = grouped(names, light, accepted).metrics()
    by_lighting, by_sequence = metrics["by_lighting"], metrics["by_sequence"]
    day, night = by_lighting["day"], by_lighting["night"]
    assert (day["lift"], day["lift_interval95"], day["unit"], day["units"]) == (0.5, [0.5, 0.5], "sequence", 4)
    assert (night["lift"], night["unit"], night["units"]) == (0.5, "block", 10)
    assert night["lift_interval95"] == pytest.approx([0.2, 0.8])
    assert by_sequence["night"] == night
    assert by_sequence["day0"]["lift_interval95"] == [0.5, 0.5]
    assert by_lighting["dusk"] == {**by_sequence["lone"], "lift": 1.0, "lift_interval95": None, "units": 1}


def test_the_lift_of_a_light_is_over_the_best_baseline_of_all_pairs_pair_by_pair() -> None:
    found = grouped(("a",) * 4, ("day", "day", "night", "night"), np.array([True, True, True, False]))
    found.baselines["white"][:] = [0.9, 0.5, 0.9, 0.9]
    day, night = (found.groups(found.light)[name] for name in ("day", "night"))
    assert (day["lift"], night["lift"]) == (0.5, -0.5)
    assert (day["lift_interval95"], night["lift_interval95"]) == ([0.0, 1.0], [-1.0, 0.0])


def test_vectors_of_other_width_have_neither_before_nor_white() -> None:
    adapter = build_adapter(AdapterConfig("linear", 6, 4), seed=0).eval()
    evaluator = AlignmentEvaluator(adapter, torch.full((4,), 0.5), 1.0, 1.0)
    rng = torch.Generator().manual_seed(0)
    evaluator.add(torch.rand(3, 6, generator=rng), torch.rand(3, 4, generator=rng))
    found = evaluator.result(["a", "b", "c"], np.full(3, -1))
    assert list(found.baselines) == ["mean_target", "shuffled"]
    assert found.metrics()["centered_cos_sim_mean_before"] is None


def metrics_of(rate: float, lift: float, fingerprint: str = "f") -> dict[str, object]:
    return {
        "cosine_accept_rate": {"0.80": rate},
        "lift": lift,
        "best_baseline": "mean_target",
        "test_fingerprint": fingerprint,
    }


def test_the_first_version_is_champion_in_any_case_and_labelled() -> None:
    verdict = promotion_verdict(metrics_of(0.1, -0.3), None)
    assert verdict.promoted
    assert "-0.3" in verdict.reason
    assert "does not beat" in verdict.reason


@pytest.mark.parametrize(
    ("challenger", "champion", "gain", "promoted", "word"),
    [
        (metrics_of(0.9, 0.1), metrics_of(0.8, 0.05), 0.0, True, "0.9000 against the champion's 0.8000"),
        (metrics_of(0.8, 0.1), metrics_of(0.8, 0.05), 0.0, False, "not better"),
        (metrics_of(0.82, 0.1), metrics_of(0.8, 0.05), 0.05, False, "0.0500"),
        (
            metrics_of(0.9, 0.0),
            metrics_of(0.8, 0.05),
            0.0,
            False,
            "does not beat the best baseline, and the champion",
        ),
        (metrics_of(0.9, -0.1), metrics_of(0.8, -0.2), 0.0, True, "and neither does the champion"),
        (metrics_of(0.9, 0.1), metrics_of(0.8, -0.2), 0.0, True, "0.9000 against the champion's 0.8000"),
        (metrics_of(0.7, -0.3), metrics_of(0.8, -0.2), 0.0, False, "not better than the champion"),
        (metrics_of(0.9, 0.1, "g"), metrics_of(0.8, 0.05), 0.0, False, "other test pairs"),
    ],
)
def test_the_alias_moves_only_for_a_reason(
    challenger: dict, champion: dict, gain: float, promoted: bool, word: str
) -> None:
    verdict = promotion_verdict(challenger, champion, min_gain=gain)
    assert (verdict.promoted, verdict.forced) == (promoted, False)
    assert word in verdict.reason
    forced = promotion_verdict(challenger, champion, min_gain=gain, force=True)
    assert forced.promoted
    assert forced.forced is not promoted
