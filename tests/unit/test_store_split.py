"""The split is a pure function of the index: the reference's, leak-free by sequence, exact in its shares."""

from itertools import combinations

import numpy as np
import pytest
import torch

from ray_app.config.base import SplitConfig
from ray_app.store import split as split_module
from ray_app.store.pair_store import PairIndex, previous_window
from ray_app.store.split import closest_subset, overlapping_share, split_pairs


def index_of(windows: list[tuple[str, int, int]]) -> PairIndex:
    """(sequence, start, end), sorted as a store sorts them."""
    windows = sorted(windows)
    count = len(windows)
    sequences, starts, ends = zip(*windows, strict=True)
    return PairIndex(
        sample_id=np.array([f"{i:032x}" for i in range(count)]),
        sequence=np.array(sequences),
        t_start_us=np.array(starts, np.int64),
        t_end_us=np.array(ends, np.int64),
        duration=np.array([f"{end - start}us" for _, start, end in windows]),
        file=np.zeros(count, np.int64),
        row=np.arange(count),
    )


def drives(*lengths: int, step: int = 500, duration: int = 1000) -> PairIndex:
    """One sequence of half-overlapping windows for each length."""
    return index_of(
        [(f"drive_{s:03d}", i * step, i * step + duration) for s, n in enumerate(lengths) for i in range(n)]
    )


def overlaps(index: PairIndex, a: int, b: int) -> bool:
    return bool(
        index.sequence[a] == index.sequence[b]
        and index.t_start_us[a] < index.t_end_us[b]
        and index.t_start_us[b] < index.t_end_us[a]
    )


def test_window_split_is_torch_random_split_index_for_index() -> None:
    index = drives(*[84] * 62)
    assert len(index) == 5208
    split = split_pairs(index, SplitConfig(by="window", seed=42, test=0.2))
    generator = torch.Generator().manual_seed(42)
    train, test = torch.utils.data.random_split(range(5208), [4166, 1042], generator=generator)  # type: ignore[arg-type]
    assert split.test.tolist() == sorted(test.indices)
    assert sorted([*split.train, *split.val]) == sorted(train.indices)
    # Validation is taken from the training part by the same rule.
    generator = torch.Generator().manual_seed(42)
    _, val = torch.utils.data.random_split(sorted(train.indices), [3749, 417], generator=generator)  # type: ignore[arg-type]
    assert split.val.tolist() == sorted(val)
    assert 0.94 < split.test_windows_overlapping_train < 0.97
    assert "leaks: 9" in split.label


def test_sequence_split_cuts_no_sequence_and_leaves_no_pair_out() -> None:
    index = drives(*np.random.default_rng(0).integers(1, 40, 25).tolist())
    split = split_pairs(index, SplitConfig())
    parts = (split.train, split.val, split.test)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(index)))
    names = [set(index.sequence[rows]) for rows in parts]
    assert all(a.isdisjoint(b) for a, b in combinations(names, 2))
    assert all(np.array_equal(rows, np.sort(rows)) for rows in parts)
    assert (split.by, split.test_windows_overlapping_train, split.label) == (
        "sequence",
        0.0,
        "whole sequences",
    )


def test_sequence_split_depends_on_the_seed_alone() -> None:
    index = drives(*[10] * 30)
    first, again, other = (split_pairs(index, SplitConfig(seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_equal_sequences_give_the_shares_exactly() -> None:
    split = split_pairs(drives(*[12] * 50), SplitConfig(test=0.2, val=0.1))
    assert (len(split.train), len(split.val), len(split.test)) == (432, 48, 120)


@pytest.mark.parametrize("seed", range(40))
def test_closest_subset_is_as_good_as_trying_them_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    leave = int(rng.integers(1, 3))
    sizes = rng.integers(1, 30, rng.integers(leave + 1, 9)).tolist()
    goal = float(rng.uniform(0, sum(sizes)))
    tries = [c for n in range(1, len(sizes) - leave + 1) for c in combinations(range(len(sizes)), n)]
    best = min(abs(sum(sizes[i] for i in c) - goal) for c in tries)
    chosen = closest_subset(sizes, goal, leave)
    assert tuple(chosen) in tries
    assert abs(sum(sizes[i] for i in chosen) - goal) == best


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 1, 100), (100, 1, 1), (50, 1, 100, 2)])
def test_three_sequences_or_more_leave_no_part_empty(lengths: tuple[int, ...]) -> None:
    for seed in range(5):
        split = split_pairs(drives(*lengths), SplitConfig(seed=seed))
        assert min(len(split.train), len(split.val), len(split.test)) > 0


def test_two_sequences_validate_on_a_block_of_the_training_one() -> None:
    index = drives(60, 20)
    split = split_pairs(index, SplitConfig())
    assert set(index.sequence[split.test]) == {"drive_001"}
    assert len(split.test) == 20
    assert len(split.val) == 6
    assert index.t_start_us[split.val].min() - index.t_end_us[split.train].max() == 1000
    assert split.by == "sequence"
    assert "block" in split.label


def test_one_sequence_is_cut_into_blocks_with_a_gap_of_one_window() -> None:
    index = drives(100)
    split = split_pairs(index, SplitConfig(by="sequence", test=0.2, val=0.1))
    assert split.by == "block"
    assert split.test.tolist() == list(range(80, 100))
    # The block starts at 40,000; what ends after 39,000 is left out: 77 of 80 remain, 8 of them validate.
    assert split.val.tolist() == list(range(69, 77))
    assert split.train.tolist() == list(range(66))
    assert split.test_windows_overlapping_train == 0.0
    assert "one sequence" in split.label


@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize("by", ["sequence", "window"])
def test_a_handful_of_pairs_is_divided_without_error(pairs: int, by: str) -> None:
    split = split_pairs(drives(pairs), SplitConfig.model_validate({"by": by}))
    rows = np.concatenate([split.train, split.val, split.test])
    assert len(set(rows.tolist())) == len(rows) <= pairs


def test_overlapping_share_equals_comparing_every_two_windows() -> None:
    rng = np.random.default_rng(3)
    starts, lengths = rng.integers(0, 4000, 200), rng.integers(1, 300, 200)
    index = index_of([(f"s{rng.integers(3)}", int(s), int(s + d)) for s, d in zip(starts, lengths, strict=True)])
    shuffled = rng.permutation(200)
    rows, others = shuffled[:70], shuffled[70:160]
    expected = np.mean([any(overlaps(index, a, b) for b in others) for a in rows])
    assert overlapping_share(index, rows, others) == expected
    assert overlapping_share(index, rows, others[:0]) == 0.0
    assert overlapping_share(index, rows[:0], others) == 0.0


def test_windows_that_touch_do_not_overlap() -> None:
    index = index_of([("s", 0, 100), ("s", 100, 200)])
    assert overlapping_share(index, np.array([0]), np.array([1])) == 0.0
    assert overlapping_share(index, np.array([1]), np.array([0])) == 0.0


def test_the_fingerprint_of_rows_ignores_their_order_and_distinguishes_sets() -> None:
    index = drives(10)
    fingerprint = split_module.test_fingerprint
    assert fingerprint(index, np.array([1, 5, 3])) == fingerprint(index, np.array([3, 1, 5]))
    assert fingerprint(index, np.array([1, 5, 3])) != fingerprint(index, np.array([1, 5]))


def test_previous_window_is_the_nearest_earlier_start_of_the_same_kind() -> None:
    rng = np.random.default_rng(5)
    index = index_of(
        [
            (f"s{rng.integers(3)}", start, start + int(rng.choice([100, 200])))
            for start in rng.integers(0, 60, 120).tolist()
        ]
    )
    rows = rng.permutation(len(index))[:80]
    found = previous_window(index, rows)
    for i, row in enumerate(rows):
        earlier = [
            index.t_start_us[other]
            for other in rows
            if index.sequence[other] == index.sequence[row]
            and index.duration[other] == index.duration[row]
            and index.t_start_us[other] < index.t_start_us[row]
        ]
        if not earlier:
            assert found[i] == -1
        else:
            other = rows[found[i]]
            assert index.t_start_us[other] == max(earlier)
            assert (index.sequence[other], index.duration[other]) == (
                index.sequence[row],
                index.duration[row],
            )


def test_previous_window_of_no_rows_is_nothing() -> None:
    assert len(previous_window(drives(3), np.arange(0))) == 0


@pytest.mark.parametrize("count", [7, 12, 13, 19, 5208])
def test_single_windows_are_divided_as_torch_s_random_split_with_the_smaller_whole_number(count: int) -> None:
    first = int(0.8 * count)
    generator = torch.Generator().manual_seed(42)
    theirs = torch.utils.data.random_split(range(count), [first, count - first], generator=generator)
    ours = split_module._random_windows(np.arange(count), 0.2, 42)
    assert [part.tolist() for part in ours] == [sorted(part.indices) for part in theirs]
