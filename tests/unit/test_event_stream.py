"""Many images from one sweep: those that each slice alone gives, with no event read twice."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from dsec_drives import BEGIN_US, OFFSET_US, dsec, events_until, pairs_of, same, write_small
from dsec_writer import random_events, write_events

from ray_app.events.render import event_image
from ray_app.sources import event_stream as sweep
from ray_app.sources.dsec.events_file import DsecEvents
from ray_app.sources.event_stream import Slice, iter_blocks, render_slices
from ray_app.sources.recorded import PAIRS_PER_TASK, SECONDS_PER_TASK_US, WindowingConfig, by_middle, by_start

FOUR = (200_000, 500_000, 1_000_000, 2_000_000)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Slice]:
    """Every slice of `events/x` that is read."""
    found: list[Slice] = []
    real_read = DsecEvents._read

    def spied(self: DsecEvents, name: str, first: int, stop: int) -> Any:
        if name == "x":
            found.append((first, stop))
        return real_read(self, name, first, stop)

    monkeypatch.setattr(DsecEvents, "_read", spied)
    return found


def covered(slices: list[Slice]) -> int:
    """How many places lie in any of them."""
    return len({place for first, stop in slices for place in range(first, stop)})


@pytest.mark.parametrize("pairs_per_window", ["middle", "all"])
def test_four_durations_read_the_union_of_their_slices_once(
    pairs_per_window: Any, tmp_path: Path, reads: list[Slice]
) -> None:
    write_small(tmp_path, constants=None)
    cut = {"pairs_per_window": pairs_per_window, "event_bins": 2}
    alone, each = [], []
    for duration_us in FOUR:
        alone += pairs_of(dsec(tmp_path, (duration_us,), **cut))
        each += reads
        reads.clear()
    source = dsec(tmp_path, FOUR, **cut)
    assert len(source.tasks()) == 1
    together = pairs_of(source)
    assert sum(stop - first for first, stop in reads) == covered(reads) == covered(each)
    assert covered(each) < 0.7 * sum(stop - first for first, stop in each)  # so one sweep does save something
    assert len(together) == len(alone)
    for pair in alone:
        mine = [
            p
            for p in together
            if (p.t_start_us, p.t_end_us, p.target_t_us) == (pair.t_start_us, pair.t_end_us, pair.target_t_us)
        ]
        assert any(same(pair, other) and pair.num_drawn == other.num_drawn for other in mine)


def test_a_frame_that_several_windows_share_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_app.sources.dsec import layout as dsec_files

    write_small(tmp_path, constants=None)
    opened: list[str] = []
    real_read = dsec_files.read_image
    monkeypatch.setattr(dsec_files, "read_image", lambda path: opened.append(path.name) or real_read(path))
    pairs = pairs_of(dsec(tmp_path, FOUR))
    assert len(opened) == len(set(opened)) < len(pairs)


def test_overlapping_slices_give_the_images_of_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "EVENTS_PER_BLOCK", 700)
    events = random_events(9_000, OFFSET_US, OFFSET_US + 50_000)
    write_events(tmp_path / "events.h5", events, OFFSET_US)
    rng = np.random.default_rng(1)
    slices = [tuple(sorted(rng.integers(0, 9_001, 2).tolist())) for _ in range(40)]
    with DsecEvents(tmp_path / "events.h5") as file:
        for (first, stop), sketch in zip(slices, render_slices(file, slices), strict=True):
            mine = events[first:stop]
            assert (sketch.first, sketch.stop) == (first, stop)
            assert np.array_equal(sketch.image(), event_image(mine))
            assert sketch.num_positive == mine.p.sum()
            if len(mine):
                assert (sketch.first_us, sketch.last_us) == (mine.t_us[0], mine.t_us[-1])


def test_blocks_are_the_union_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "EVENTS_PER_BLOCK", 10)
    assert list(iter_blocks([(30, 34), (0, 25), (5, 8), (20, 31)])) == [
        (0, 10),
        (10, 20),
        (20, 25),
        (25, 31),
        (31, 34),
    ]


def test_a_damaged_place_costs_the_slices_alone_that_it_is_in(tmp_path: Path) -> None:
    events = events_until(1_000_000)
    path = tmp_path / "events.h5"
    write_events(path, events, OFFSET_US, chunks=512)
    with h5py.File(path) as file:
        chunk = file["events/x"].id.get_chunk_info(8)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(data)
    slices = [(0, 4_096), (1_000, 4_097), (4_607, 6_000), (4_608, 9_000), (0, 9_000)]
    with DsecEvents(path) as file:
        flaws = [sketch.flaw is not None for sketch in render_slices(file, slices)]
    assert flaws == [False, True, True, False, True]


@pytest.mark.parametrize("order", [by_middle, by_start])
def test_every_window_is_in_one_portion_and_portions_are_bounded(order: Any) -> None:
    cut = WindowingConfig((50_000, 1_000_000, 20_000_000), pairs_per_window="all", event_bins=3)
    portions = cut.portions(BEGIN_US, BEGIN_US + 60_000_000, order)
    windows = [window for portion in portions for window in portion]
    assert len(windows) == len(set(windows)) == 2399 + 119 + 5
    assert [order(window) for window in windows] == sorted(order(window) for window in windows)
    for portion in portions:
        assert len(portion) * 3 <= PAIRS_PER_TASK
        assert sum(window.t_end_us - window.t_start_us for window in portion) <= SECONDS_PER_TASK_US
