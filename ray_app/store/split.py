"""Division into training, validation and test pairs: a pure function of the index, computed by each reader.

Shapes: N = pairs of the index. Rows are positions in its canonical order.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ray_app.config.base import SplitConfig
from ray_app.store.pair_store import PairIndex

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """The three parts. Rows in none of them are in the gap next to a block."""

    by: Literal["sequence", "window", "block"]
    """Unit that was divided; `block` replaces `sequence` where there is one sequence."""
    train: Rows
    """Sorted rows to fit on."""
    val: Rows
    """Sorted rows for early stopping and the choice of checkpoint; taken from the training part."""
    test: Rows
    """Sorted rows for `evaluate` alone."""
    test_windows_overlapping_train: float
    """Share of test windows that overlap a window of the training part, validation included."""
    label: str
    """The division in words, for reports."""

    def without_validation(self) -> "Split":
        """Return the same test part; the validation part trains too."""
        both = np.union1d(self.train, self.val)
        return replace(self, train=both, val=self.val[:0], label=f"{self.label}; the validation part trains too")


def split_pairs(index: PairIndex, config: SplitConfig) -> Split:
    """Divides the pairs of `index`.

    `window` equals torch's random_split of N pairs into int((1 − test)·N) and the rest, and again for the
    validation part. `sequence` comes as close to the shares as whole sequences allow and leaves no part
    empty; with two sequences the validation part is a block of the training sequence, with one the test part
    is a block too. A handful of pairs may leave parts empty.
    """
    everything = np.arange(len(index))
    by: Literal["sequence", "window", "block"]
    if config.by == "window":
        training, test = _random_windows(everything, config.test, config.seed)
        train, val = _random_windows(training, config.val, config.seed)
        by, label = "window", "single windows at random"
    else:
        by, label, train, val, test = _whole_sequences(index, everything, config)
    leak = overlapping_share(index, test, np.union1d(train, val))
    if leak > 0:
        label += f"; leaks: {leak:.1%} of test windows overlap a training window"
    return Split(by, train, val, test, leak, label)


def test_fingerprint(index: PairIndex, rows: Rows) -> str:
    """SHA-256 over the sorted identities of these pairs: equal for two evaluations of the same pairs."""
    return hashlib.sha256("".join(sorted(index.sample_id[rows].tolist())).encode()).hexdigest()


def overlapping_share(index: PairIndex, rows: Rows, others: Rows) -> float:
    """Share of `rows` whose window overlaps, in the same sequence, a window of `others`; 0.0 without rows."""
    return float(np.mean(overlapping_row(index, rows, others) >= 0)) if len(rows) else 0.0


def overlapping_row(index: PairIndex, rows: Rows, others: Rows) -> Rows:
    """Return for each of `rows` one of `others` whose window overlaps it in the same sequence, or −1.

    Of several, one that ends latest among those that start before its own window ends.
    """
    found = np.full(len(rows), -1, np.int64)
    for sequence in np.unique(index.sequence[rows]):
        mine = np.flatnonzero(index.sequence[rows] == sequence)
        theirs = others[index.sequence[others] == sequence]
        if not len(theirs):
            continue
        theirs = theirs[np.argsort(index.t_start_us[theirs], kind="stable")]
        ends_us = index.t_end_us[theirs]
        # Of the windows that start before mine ends, the latest end decides.
        latest_us = np.maximum.accumulate(ends_us)
        latest = np.maximum.accumulate(np.where(ends_us == latest_us, np.arange(len(theirs)), 0))
        before = np.searchsorted(index.t_start_us[theirs], index.t_end_us[rows[mine]], side="left") - 1
        overlaps = (before >= 0) & (latest_us[before] > index.t_start_us[rows[mine]])
        found[mine[overlaps]] = theirs[latest[before[overlaps]]]
    return found


def closest_subset(sizes: list[int], goal: float, leave: int) -> list[int]:
    """Positions of items whose sizes add up closest to `goal`, at least one, with `leave` or more left out.

    Exact: for each item, the sums reachable with 0, 1, … `leave` or more items left out so far, as the bits
    of integers. Of two sums equally close the smaller is taken; of several subsets, the one of earlier items.
    """
    layers = [[1] + [0] * leave]
    for size in sizes:
        old = layers[-1]
        skipped = [0, *old[:-1]]
        skipped[leave] |= old[leave]
        layers.append([(taken << size) | without for taken, without in zip(old, skipped, strict=True)])
    reachable = layers[-1][leave]
    sums = [s for s, bit in enumerate(bin(reachable)[:1:-1]) if bit == "1" and s > 0]
    total = min(sums, key=lambda s: (abs(s - goal), s))
    chosen: list[int] = []
    left = leave
    for i in range(len(sizes) - 1, -1, -1):
        old = layers[i]
        if left == leave and old[leave] >> total & 1:
            continue
        if left > 0 and old[left - 1] >> total & 1:
            left -= 1
            continue
        chosen.append(i)
        total -= sizes[i]
    return sorted(chosen)


def _random_windows(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(rows), generator=generator).numpy()
    first = int((1 - share) * len(rows))
    return rows[np.sort(shuffled[:first])], rows[np.sort(shuffled[first:])]


def _whole_sequences(
    index: PairIndex, everything: Rows, config: SplitConfig
) -> tuple[Literal["sequence", "block"], str, Rows, Rows, Rows]:
    num_sequences = len(np.unique(index.sequence))
    if num_sequences <= 1:
        training, test = _last_block(index, everything, config.test)
        train, val = _last_block(index, training, config.val)
        label = "one sequence: its last block tests, the block before validates, each after a gap of one window"
        return "block", label, train, val, test
    if num_sequences == 2:
        training, test = _choose_sequences(index, everything, config.test, config.seed, leave=1)
        train, val = _last_block(index, training, config.val)
        label = "one sequence tests; the last block of the other validates, after a gap of one window"
        return "sequence", label, train, val, test
    training, test = _choose_sequences(index, everything, config.test, config.seed, leave=2)
    train, val = _choose_sequences(index, training, config.val, config.seed, leave=1)
    return "sequence", "whole sequences", train, val, test


def _choose_sequences(index: PairIndex, rows: Rows, share: float, seed: int, leave: int) -> tuple[Rows, Rows]:
    """(rows that stay, rows of the chosen sequences)."""
    names, counts = np.unique(index.sequence[rows], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = closest_subset(counts[order].tolist(), share * len(rows), leave)
    out = np.isin(index.sequence[rows], names[order[chosen]])
    return rows[~out], rows[out]


def _last_block(index: PairIndex, rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(rows that end one window's length or more before the block, the last block in time); one sequence."""
    by_time = rows[np.argsort(index.t_start_us[rows], kind="stable")]
    size = min(max(round(share * len(rows)), 1), max(len(rows) - 1, 0))
    block = by_time[len(rows) - size :]
    if not size:
        return rows, block
    gap = int((index.t_end_us[rows] - index.t_start_us[rows]).max())
    before = by_time[index.t_end_us[by_time] + gap <= index.t_start_us[block[0]]]
    return np.sort(before), np.sort(block)
