"""With any drafter, the output is the target's: token for token where greedy, in distribution where sampled."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ray_app.core.speculative.metrics import (
    DraftCounts,
    block_bootstrap,
    break_even_alpha,
    expected_improvement,
    expected_tokens,
)
from ray_app.core.speculative.product import likeliest, product
from ray_app.core.speculative.verification import (
    DraftTree,
    Verified,
    accepted_prefix,
    verify_greedy,
    verify_sampled,
    verify_tree_greedy,
    verify_tree_sampled,
)
from ray_app.errors import InputError

DRAWS = 800
CHI2_999 = {2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}
"""0.999 quantiles of χ² by degrees of freedom, from tables."""


def greedy_next(context: list[int], seed: int) -> int:
    """A made-up greedy model over 5 tokens."""
    return int(np.random.default_rng([seed, *context]).integers(5))


def distribution(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Random, sometimes with tokens that have no probability."""
    weights = rng.exponential(size=size) * (rng.random(size) < 0.8)
    weights[rng.integers(size)] += 0.05
    return weights / weights.sum()


def chi2(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> tuple[float, int]:
    """χ² and its degrees of freedom; cells of no probability must be empty, rare ones are put together."""
    assert not counts[expected == 0].any()
    common = expected * counts.sum() >= 5
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * counts.sum()
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float(((seen - wanted) ** 2 / wanted).sum()), len(wanted) - 1


@pytest.mark.parametrize("seed", range(30))
def test_greedy_decoding_with_any_drafter_gives_the_targets_own_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alone: list[int] = []
    while len(alone) < 40:
        alone.append(greedy_next(alone, seed))
    text: list[int] = []
    while len(text) < 40:
        right = rng.random() < 0.5
        draft: list[int] = []
        for _ in range(rng.integers(0, 6)):
            draft.append(greedy_next(text + draft, seed) if right else int(rng.integers(5)))
        target = [greedy_next(text + draft[:i], seed) for i in range(len(draft) + 1)]
        text += verify_greedy(draft, target).tokens
    assert text[:40] == alone


@pytest.mark.parametrize("seed", range(30))
def test_greedy_decoding_with_any_tree_gives_the_targets_own_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alone: list[int] = []
    while len(alone) < 30:
        alone.append(greedy_next(alone, seed))
    text: list[int] = []
    while len(text) < 30:
        tokens, parents, paths = [0], [0], [list(text)]
        for node in range(1, int(rng.integers(1, 12))):
            parent = int(rng.integers(node))
            tokens.append(greedy_next(paths[parent], seed) if rng.random() < 0.4 else int(rng.integers(5)))
            parents.append(parent)
            paths.append([*paths[parent], tokens[-1]])
        tree = DraftTree(tuple(tokens), tuple(parents))
        text += verify_tree_greedy(tree, [greedy_next(path, seed) for path in paths]).tokens
    assert text[:30] == alone


@pytest.mark.parametrize("seed", range(40))
def test_the_first_token_of_rejection_sampling_has_the_targets_distribution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 9))
    q, p = distribution(rng, size), distribution(rng, size)
    counts = np.zeros(size, np.int64)
    target = np.stack([p, p])
    for token in rng.choice(size, size=DRAWS, p=q).tolist():
        counts[verify_sampled([token], q[None], target, rng).tokens[0]] += 1
    found, freedom = chi2(counts, p)
    assert freedom < 1 or found < CHI2_999.get(freedom, 10.83)


@pytest.mark.parametrize("seed", range(40))
def test_pairs_of_sampled_tokens_have_the_targets_joint_distribution(seed: int) -> None:
    """Models whose second token depends on the first: the accepted path must not bend the joint distribution."""
    rng = np.random.default_rng(100 + seed)
    q_first, p_first = distribution(rng, 3), distribution(rng, 3)
    q_behind, p_behind = (np.stack([distribution(rng, 3) for _ in range(3)]) for _ in range(2))
    counts = np.zeros((3, 3), np.int64)
    for _ in range(DRAWS):
        first = int(rng.choice(3, p=q_first))
        second = int(rng.choice(3, p=q_behind[first]))
        target = np.stack([p_first, p_behind[first], np.full(3, 1 / 3)])
        tokens = verify_sampled([first, second], np.stack([q_first, q_behind[first]]), target, rng).tokens
        if len(tokens) == 1:  # the next pass would begin behind it
            tokens = (*tokens, int(rng.choice(3, p=p_behind[tokens[0]])))
        counts[tokens[0], tokens[1]] += 1
    found, freedom = chi2(counts.ravel(), (p_first[:, None] * p_behind).ravel())
    assert freedom < 1 or found < CHI2_999.get(freedom, 10.83)


@pytest.mark.parametrize("seed", range(40))
def test_a_sampled_tree_has_the_targets_distribution(seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    size, width = 4, int(rng.integers(1, 4))
    q, p = distribution(rng, size), distribution(rng, size)
    counts = np.zeros(size, np.int64)
    rows_q, rows_p = np.tile(q, (width + 1, 1)), np.tile(p, (width + 1, 1))
    for children in rng.choice(size, size=(DRAWS, width), p=q).tolist():
        tree = DraftTree((0, *children), (0,) * (width + 1))
        counts[verify_tree_sampled(tree, rows_q, rows_p, rng).tokens[0]] += 1
    found, freedom = chi2(counts, p)
    assert freedom < 1 or found < CHI2_999.get(freedom, 10.83)


@pytest.mark.parametrize("seed", range(40))
def test_a_sampled_tree_of_two_levels_has_the_targets_joint_distribution(seed: int) -> None:
    """Two children of the root, two of each of them, and models whose second token depends on the first."""
    rng = np.random.default_rng(300 + seed)
    q_first, p_first = distribution(rng, 3), distribution(rng, 3)
    q_behind, p_behind = (np.stack([distribution(rng, 3) for _ in range(3)]) for _ in range(2))
    firsts = rng.choice(3, size=(DRAWS, 2), p=q_first)
    seconds = np.stack([rng.choice(3, size=(DRAWS, 2, 2), p=q) for q in q_behind])
    nothing = np.full(3, 1 / 3)
    counts = np.zeros((3, 3), np.int64)
    for draw, (a, b) in enumerate(firsts.tolist()):
        tokens = (0, a, b, *seconds[a, draw, 0].tolist(), *seconds[b, draw, 1].tolist())
        q_NV = np.stack([q_first, q_behind[a], q_behind[b], *[nothing] * 4])
        p_NV = np.stack([p_first, p_behind[a], p_behind[b], *[nothing] * 4])
        found = verify_tree_sampled(DraftTree(tokens, (0, 0, 0, 1, 1, 2, 2)), q_NV, p_NV, rng).tokens
        if len(found) == 1:  # the next pass would begin behind it
            found = (*found, int(rng.choice(3, p=p_behind[found[0]])))
        counts[found[0], found[1]] += 1
    found_chi2, freedom = chi2(counts.ravel(), (p_first[:, None] * p_behind).ravel())
    assert freedom < 1 or found_chi2 < CHI2_999.get(freedom, 10.83)


def test_the_share_of_kept_tokens_is_the_overlap_of_both_distributions() -> None:
    rng = np.random.default_rng(3)
    q, p = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    drafts, target = rng.choice(3, size=DRAWS, p=q).tolist(), np.stack([p, p])
    kept = sum(verify_sampled([token], q[None], target, rng).num_accepted for token in drafts)
    overlap = 0.1 + 0.2 + 0.1  # Σ min(p, q), by hand
    assert abs(kept / DRAWS - overlap) < 4 * (overlap * (1 - overlap) / DRAWS) ** 0.5


def test_equal_models_accept_everything_and_add_one_token() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.25])
    found = verify_sampled([0, 1, 2], np.tile(p, (3, 1)), np.tile(p, (4, 1)), rng)
    assert found.num_accepted == 3
    assert found.tokens[:3] == (0, 1, 2)
    assert len(found.tokens) == 4


def test_hand_worked_greedy_cases() -> None:
    assert verify_greedy([7, 8, 9], [7, 8, 1, 2]) == Verified((7, 8, 1), 2)
    assert verify_greedy([7, 8], [7, 8, 5]) == Verified((7, 8, 5), 2)
    assert verify_greedy([], [4]) == Verified((4,), 0)
    assert accepted_prefix([3, 4, 5], [1, 3, 4, 6], 1) == 2
    assert accepted_prefix([3, 4, 5], [1, 3], 1) == 1


def test_a_hand_worked_tree() -> None:
    #        0 ── 1:a ── 3:c
    #        └─── 2:b ── 4:c ── 5:d
    tree = DraftTree((0, 10, 11, 12, 12, 13), (0, 0, 0, 1, 2, 4))
    assert verify_tree_greedy(tree, [11, 0, 12, 0, 99, 0]) == Verified((11, 12, 99), 2)
    assert verify_tree_greedy(tree, [10, 5, 0, 0, 0, 0]) == Verified((10, 5), 1)
    assert verify_tree_greedy(tree, [77, 0, 0, 0, 0, 0]) == Verified((77,), 0)


@pytest.mark.parametrize(
    ("draft", "q", "p", "words"),
    [
        ([3], [[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0]] * 2, "outside the vocabulary of 3"),
        ([-1], [[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0]] * 2, "token -1"),
        ([0], [[0.5, 0.4, 0.0]], [[0.5, 0.5, 0.0]] * 2, "sum 0.9"),
        ([0], [[0.5, 0.5, 0.0]], [[1.5, -0.5, 0.0]] * 2, "least -0.5"),
        ([0], [[np.nan, 0.5, 0.5]], [[0.5, 0.5, 0.0]] * 2, "no distribution"),
        ([0], [[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0]], "the shapes are"),
    ],
)
def test_what_is_no_distribution_or_no_token_is_refused(
    draft: list[int], q: list[list[float]], p: list[list[float]], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        verify_sampled(draft, np.array(q), np.array(p), np.random.default_rng(0))


def test_wrong_sizes_and_wrong_parents_are_refused() -> None:
    with pytest.raises(InputError, match="2 drafted tokens need 3"):
        verify_greedy([1, 2], [1, 2])
    with pytest.raises(InputError, match="parent"):
        DraftTree((0, 1, 2), (0, 2, 0))
    with pytest.raises(InputError, match="as many parents"):
        DraftTree((0, 1), (0,))


def test_counts_by_hand_and_merged() -> None:
    first = DraftCounts.of([3, 3, 1], [3, 1, 0], gamma=3)
    assert (first.num_drafts, first.num_draft_tokens, first.num_accepted_tokens) == (3, 7, 4)
    assert first.num_accepted_tokens_per_pos == (2, 1, 1)
    assert first.num_rejections == 2
    assert first.draft_acceptance_rate == pytest.approx(4 / 7)
    assert first.mean_acceptance_length == pytest.approx(1 + 4 / 3)
    assert first.alpha == pytest.approx(4 / 6)
    both = first + DraftCounts.of([2], [2], gamma=3)
    assert both == DraftCounts.of([3, 3, 1, 2], [3, 1, 0, 2], gamma=3)
    assert both + DraftCounts() == both


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 5), (0.3, 1), (0.8, 7), (0.99, 24), (1.0, 4)])
def test_expected_tokens_is_the_sum_of_chances(alpha: float, gamma: int) -> None:
    chances = sum(alpha**k for k in range(gamma + 1))  # the chance that token k + 1 of a pass comes out
    assert expected_tokens(alpha, gamma) == pytest.approx(chances, rel=1e-12)
    assert expected_improvement(alpha, gamma, 0.25) == pytest.approx(chances / (0.25 * gamma + 1), rel=1e-12)


def test_expected_tokens_agrees_with_coins() -> None:
    rng = np.random.default_rng(1)
    heads = rng.random((20_000, 6)) < 0.7
    tokens = 1 + np.cumprod(heads, axis=1).sum(axis=1)
    assert abs(tokens.mean() - expected_tokens(0.7, 6)) < 4 * tokens.std() / len(tokens) ** 0.5


def test_break_even_is_where_a_pass_pays_for_itself() -> None:
    least = break_even_alpha(8, 2.5)
    assert least is not None
    assert expected_tokens(least, 8) == pytest.approx(2.5, abs=1e-9)
    assert break_even_alpha(8, 0.9) == 0.0
    assert break_even_alpha(3, 4.5) is None


def test_the_bootstrap_draws_whole_blocks() -> None:
    """Ten blocks of equal ratios leave no doubt; one block that is different opens the interval."""
    sums = np.tile([3.0, 10.0], (10, 1))
    low, high = block_bootstrap(sums, lambda total: total[:, 0] / total[:, 1], np.random.default_rng(0))
    assert (float(low), float(high)) == pytest.approx((0.3, 0.3))
    sums[0] = [10.0, 10.0]
    low, high = block_bootstrap(sums, lambda total: total[:, 0] / total[:, 1], np.random.default_rng(0))
    assert float(low) == pytest.approx(0.3)
    assert 0.4 < float(high) < 0.7
    with pytest.raises(InputError, match="at least two"):
        block_bootstrap(sums[:1], lambda total: total[:, 0], np.random.default_rng(0))


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        sums = np.stack([rng.normal(1.0, 0.3, 40), np.ones(40)], axis=1)
        low, high = block_bootstrap(sums, lambda total: total[:, 0] / total[:, 1], rng, num_samples=300)
        covered += int(low <= 1.0 <= high)
    assert 0.86 < covered / 100 <= 1.0


def test_behind_a_draft_that_is_kept_whole_comes_a_token_of_the_last_distribution() -> None:
    target_G1V = np.eye(5)[[1, 2, 3]]
    verified = verify_sampled((1, 2), np.eye(5)[[1, 2]], target_G1V, np.random.default_rng(0))
    assert (verified.tokens, verified.num_accepted) == ((1, 2, 3), 2)
    verified = verify_sampled((1, 4), np.eye(5)[[1, 4]], target_G1V, np.random.default_rng(0))
    assert (verified.tokens, verified.num_accepted) == ((1, 2), 1)


def test_a_product_of_distributions_is_worked_by_hand_and_its_drafter_is_asked_only_where_it_matters() -> None:
    def q() -> dict[int, float]:
        return {5: 0.6, 6: 0.399, 7: 0.001}

    scores = product({7: 0.9, 6: 0.1}, q)
    assert scores == pytest.approx({7: 0.9 * 0.01, 6: 0.1 * 0.399, 5: 0.01 * 0.6})
    assert likeliest(scores) == 6
    assert product({}, q) == q(), "without a memory the drafter alone decides"

    def unasked() -> dict[int, float]:
        raise AssertionError("one token is sure enough")

    assert likeliest(product({7: 0.901, 6: 0.099}, unasked)) == 7
    assert product({7: 0.899, 6: 0.101}, q) != {7: 0.899, 6: 0.101}
    assert likeliest({9: 0.5, 8: 0.5, 10: 0.1}) == 8
