"""events.h5 of DSEC, on true-format files: index, slices, silences, memory, and real windows read back."""

import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from dsec_drives import (
    OFFSET_US,
)
from dsec_writer import (
    HEIGHT,
    WIDTH,
    DsecFiles,
    ms_to_idx,
    random_events,
    write_events,
)

from ray_app.errors import InputError
from ray_app.events.render import EventCanvas, event_image
from ray_app.sources.dsec import events_file as dsec_events
from ray_app.sources.dsec.events_file import DsecEvents
from ray_app.sources.event_stream import render_slices


def test_the_index_of_the_formats_own_example() -> None:
    t = np.array([0, 500, 2100, 5000, 5000, 7100, 7200, 7200, 8100, 9000], np.uint32)
    assert ms_to_idx(t).tolist() == [0, 2, 2, 3, 3, 3, 5, 5, 8, 9]


def test_the_writer_writes_the_format(two_seconds: DsecFiles) -> None:
    with h5py.File(two_seconds.events) as file:
        types = {name: file[name].dtype.str for name in ("events/x", "events/y", "events/p", "events/t", "ms_to_idx")}
        assert list(types.values()) == ["<u2", "<u2", "|u1", "<u4", "<u8"]
        for name in types:
            number, _, options, _ = file[name].id.get_create_plist().get_filter(0)
            assert number == 32001
            assert options[4:7] == (1, 2, 5)  # level, bitshuffle, zstd
        assert (file["t_offset"].shape, file["t_offset"].dtype.str, file["t_offset"][()]) == ((), "<i8", OFFSET_US)
        assert file["t_offset"].chunks is None
    with h5py.File(two_seconds.rectify_map) as file:
        table = file["rectify_map"]
        assert (table.shape, table.dtype.str) == ((480, 640, 2), "<f4")
        assert table[0, 0, 0] < 0
        assert table[-1, -1, 1] > 479
    assert two_seconds.calibration.read_text().startswith("%YAML:1.0")


@pytest.mark.parametrize("form", ["scalar", "one", "absent"])
def test_every_time_finds_the_place_of_its_first_event(tmp_path: Path, form: Any) -> None:
    offset_us = 0 if form == "absent" else OFFSET_US
    rng = np.random.default_rng(3)
    clock = np.concatenate(
        [[0, 500, 2100, 5000, 5000, 7100, 7200, 7200, 8100, 9000], rng.integers(9000, 40_000, 900)]
    )
    events = random_events(len(clock), 0, 1)
    events = replace(events, t_us=np.sort(clock) + offset_us)
    write_events(tmp_path / "events.h5", events, offset_us, form, chunks=64)
    with DsecEvents(tmp_path / "events.h5") as file:
        assert (len(file), file.t_offset_us) == (len(clock), offset_us)
        for t_us in [*range(-2, 9100), *range(9100, 41_000, 37), 39_999, 40_000, 10**9]:
            assert file.index(t_us + offset_us) == np.searchsorted(events.t_us, t_us + offset_us), t_us
        for first, stop in ((0, 10), (3, 4), (0, len(clock)), (500, 501), (7, 7)):
            (part,) = file.parts(first, stop) if first < stop else (events[0:0],)
            for name in ("x", "y", "p", "t_us"):
                assert np.array_equal(getattr(part, name), getattr(events, name)[first:stop])


def test_silences_are_those_that_looking_at_every_event_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    clock = np.sort(np.concatenate([rng.integers(a, a + 4_000, 30) for a in (1_500, 9_000, 30_000, 33_500, 60_100)]))
    events = replace(random_events(len(clock), 0, 1), t_us=clock + OFFSET_US)
    write_events(tmp_path / "events.h5", events, OFFSET_US)

    def looked_for(start_us: int, end_us: int, longest_us: int) -> tuple[int, int] | None:
        inside = events.t_us[(events.t_us >= start_us) & (events.t_us < end_us)].tolist()
        ends = itertools.pairwise([start_us, *inside, end_us])
        return next(((a, b) for a, b in ends if b - a > longest_us), None)

    with DsecEvents(tmp_path / "events.h5") as file:
        answers = set()
        for _ in range(400):
            start_us, length_us = OFFSET_US + int(rng.integers(-5_000, 70_000)), int(rng.integers(1, 60_000))
            longest_us = int(rng.integers(2_000, 25_000))
            want = looked_for(start_us, start_us + length_us, longest_us)
            assert file.silence(start_us, start_us + length_us, longest_us) == want
            answers.add(want)
        for a, b in itertools.pairwise(events.t_us.tolist()):
            if b - a > 2_000:  # to the microsecond
                assert file.silence(a, b, b - a) is None
                assert file.silence(a, b, b - a - 1) == (a, b)
    assert len(answers) > 50


def test_parts_painted_one_over_the_other_are_the_image_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = random_events(9_000, OFFSET_US, OFFSET_US + 50_000)
    crowd = replace(crowd, x=crowd.x % 20, y=crowd.y % 20)  # 22 events at each pixel
    write_events(tmp_path / "events.h5", crowd, OFFSET_US)
    whole = event_image(crowd)
    with DsecEvents(tmp_path / "events.h5") as file:
        for size in (1, 7, 1000, 4096, 9_000):
            monkeypatch.setattr(dsec_events, "EVENTS_AT_A_TIME", size)
            first = max(9_000 - 30 * size, 0)
            (sketch,) = render_slices(file, [(first, 9_000)])
            assert np.array_equal(sketch.image(), event_image(crowd[first:9_000]))
        (nothing,) = render_slices(file, [(3, 3)])
        assert np.array_equal(nothing.image(), np.full((HEIGHT, WIDTH, 3), 255))
    backwards = EventCanvas(WIDTH, HEIGHT)
    for part in (crowd[4_500:], crowd[:4_500]):
        backwards.add(part)
    assert not np.array_equal(backwards.image(), whole)  # order matters, so the law above says something


def test_memory_does_not_grow_with_the_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsec_events, "EVENTS_AT_A_TIME", 2**16)
    write_events(tmp_path / "events.h5", random_events(1_000_000, OFFSET_US, OFFSET_US + 1_000_000), OFFSET_US)
    peaks = []
    with DsecEvents(tmp_path / "events.h5") as file:
        for stop in (2**17, 1_000_000):
            tracemalloc.start()
            (_,) = render_slices(file, [(0, stop)])
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 12e6  # a million events are 13 MB, and checked as int64 far more


@pytest.mark.parametrize("gap_us", [2001, 2002, 2500, 2998, 2999, 3000, 3001, 3999, 4001])
def test_a_silence_just_above_the_limit_is_found_wherever_it_begins_within_a_millisecond(
    tmp_path: Path, gap_us: int
) -> None:
    """A gap of little more than 2 ms holds one or two empty milliseconds, by where in a millisecond it begins."""
    for first in (10_000, 10_001, 10_499, 10_998, 10_999):
        clock = np.array([*range(9_000, first, 100), first, first + gap_us, first + gap_us + 50])
        events = replace(random_events(len(clock), 0, 1), t_us=clock + OFFSET_US)
        write_events(tmp_path / f"{first}.h5", events, OFFSET_US)
        whole = OFFSET_US + 9_000, OFFSET_US + first + gap_us + 50
        gap = OFFSET_US + first, OFFSET_US + first + gap_us
        with DsecEvents(tmp_path / f"{first}.h5") as file:
            for longest_us in (2000, gap_us - 1):
                assert file.silence(*whole, longest_us) == gap, (first, longest_us)
            assert file.silence(*whole, gap_us) is None, first


@pytest.mark.parametrize("step_us", [1, 3, 24, 400, 999])
@pytest.mark.parametrize("place", [400, 401, 420, 439])
def test_a_small_step_back_in_time_is_refused_by_the_index(tmp_path: Path, step_us: int, place: int) -> None:
    """Within one millisecond and across its edge: the index by milliseconds alone does not show it."""
    clock = np.arange(0, 20_000, 25)
    before = int(clock[place - 1])
    clock[place] = before - step_us
    events = replace(random_events(len(clock), 0, 1), t_us=clock + OFFSET_US)
    write_events(tmp_path / "events.h5", events, OFFSET_US)
    with DsecEvents(tmp_path / "events.h5") as file:

        def ask_around() -> None:
            for t_us in (before - step_us, before, before + 25):
                file.index(OFFSET_US + t_us)

        with pytest.raises(InputError, match=r"backwards|does not fit"):
            ask_around()
