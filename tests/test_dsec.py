"""DSEC recordings as pairs, on true-format files: what is read and what is not, what is cut, what is refused."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from dsec_writer import (
    BLOSC,
    HEIGHT,
    MADE_UP,
    WIDTH,
    DsecFiles,
    frame,
    ms_to_idx,
    random_events,
    rectify_map,
    write_events,
    write_sequence,
)
from numpy_source import SMALL
from PIL import Image

from ray_app import cli
from ray_app.config import PrepareDsec
from ray_app.errors import ConfigError, InputError
from ray_app.events.recording import Events
from ray_app.events.render import equal_counts, event_image
from ray_app.events.views import event_view
from ray_app.jobs.building import build_task, claim, finish
from ray_app.jobs.prepare import run_prepare, source_of
from ray_app.sources import dsec_events
from ray_app.sources.base import RawPair, Rejected, SourceTask
from ray_app.sources.dsec import DsecSource, painted
from ray_app.sources.dsec_events import DsecEvents
from ray_app.sources.dsec_files import find_sequences, read_rig
from ray_app.sources.npy import read_events
from ray_app.store.manifest import Features
from ray_app.store.pair_store import PairStore

OFFSET_US = 49_599_300_776
"""Start of the file's clock, as large and as odd as real ones."""
BEGIN_US = OFFSET_US + 2_300
RGB = (180, 135)
NARROW = MADE_UP | {"camRect1": [value / 8 for value in MADE_UP["camRect1"]]}
"""The made-up cameras with frames of an eighth of the size, which are written and read quickly."""
SECOND = (1_000_000,)


def image_times(count: int, first_us: int = BEGIN_US) -> list[int]:
    return [first_us + i * 50_000 for i in range(count)]


def events_until(length_us: int, count: int = 20_000, seed: int = 0) -> Events:
    """From the start of the file's clock to `length_us` after the first image, and a little longer."""
    return random_events(count, OFFSET_US, BEGIN_US + length_us + 5_000, seed)


def write_small(root: Path, name: str = "zurich_city_00_a", frames: int = 41, **settings: Any) -> DsecFiles:
    """A drive with an image every 50 ms."""
    files = DsecFiles(root, name, settings.pop("layout", "tree"), settings.pop("part", "train"))
    events = settings.pop("events", None) or events_until(50_000 * frames, seed=len(name))
    constants = settings.pop("constants", NARROW)
    return write_sequence(
        files, events, image_times(frames), constants, t_offset_us=OFFSET_US, rgb_size=RGB, **settings
    )


@pytest.fixture(scope="module")
def two_seconds(tmp_path_factory: pytest.TempPathFactory) -> DsecFiles:
    """41 images over 2 s. Shared: copy it before changing it."""
    return write_small(tmp_path_factory.mktemp("dsec"))


@pytest.fixture
def own(two_seconds: DsecFiles, tmp_path: Path) -> DsecFiles:
    """A copy of it to damage."""
    shutil.copytree(two_seconds.root, tmp_path / "dsec")
    return replace(two_seconds, root=tmp_path / "dsec")


def everything(source: DsecSource) -> list[RawPair | Rejected]:
    return [item for task in source.tasks() for item in source.pairs(task)]


def pairs_of(source: DsecSource) -> list[RawPair]:
    found = everything(source)
    assert [item for item in found if isinstance(item, Rejected)] == []
    return [item for item in found if isinstance(item, RawPair)]


def rejected(source: DsecSource) -> list[Rejected]:
    return [item for item in everything(source) if isinstance(item, Rejected)]


def same(one: RawPair, other: RawPair) -> bool:
    return (
        (one.sequence, one.t_start_us, one.t_end_us) == (other.sequence, other.t_start_us, other.t_end_us)
        and np.array_equal(one.event_HWC, other.event_HWC)
        and np.array_equal(one.target_HWC, other.target_HWC)
    )


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def put(name: str, value: Any, **options: Any) -> Callable[[h5py.File], None]:
    """Replaces a dataset."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=value, **options)

    return change


# --- events.h5 ---


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
            assert np.array_equal(painted(file.parts(first, 9_000)), event_image(crowd[first:9_000]))
    assert np.array_equal(painted(file.parts(3, 3)), np.full((HEIGHT, WIDTH, 3), 255))
    backwards = painted([crowd[4_500:], crowd[:4_500]])
    assert not np.array_equal(backwards, whole)  # order matters, so the law above says something


def test_memory_does_not_grow_with_the_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsec_events, "EVENTS_AT_A_TIME", 2**16)
    write_events(tmp_path / "events.h5", random_events(1_000_000, OFFSET_US, OFFSET_US + 1_000_000), OFFSET_US)
    peaks = []
    with DsecEvents(tmp_path / "events.h5") as file:
        for stop in (2**17, 1_000_000):
            tracemalloc.start()
            painted(file.parts(0, stop))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 12e6  # a million events are 13 MB, and checked as int64 far more


def test_nothing_outside_the_drawn_slice_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_small(tmp_path, constants=None)
    reads: list[tuple[str, int, int]] = []
    real_read = DsecEvents._read

    def spied(self: DsecEvents, name: str, first: int, stop: int) -> Any:
        reads.append((name, first, stop))
        return real_read(self, name, first, stop)

    monkeypatch.setattr(DsecEvents, "_read", spied)
    source = DsecSource(tmp_path, SECOND)
    (task,) = source.tasks()
    assert all(name == "t" and stop - first == 1 for name, first, stop in reads)
    reads.clear()
    window = next(item for item in source.pairs(task) if isinstance(item, RawPair))
    with h5py.File(files.events) as file:
        t = file["events/t"][()].astype(np.int64) + OFFSET_US
    first, stop = np.searchsorted(t, (window.t_start_us, window.t_end_us))
    count = (stop - first) // 5
    slice_ = (first + 2 * count, first + 3 * count)
    assert {(a, b) for name, a, b in reads if name != "t"} == {slice_}
    elsewhere = [(a, b) for name, a, b in reads if name == "t" and (a, b) != slice_ and b - a > 1]
    assert len(elsewhere) == 2  # the milliseconds at both ends of the window
    assert all(b - a < 40 for a, b in elsewhere)


def test_a_damaged_chunk_costs_the_windows_that_draw_it_alone(tmp_path: Path) -> None:
    events = events_until(2_000_000)
    files = write_small(tmp_path, constants=None, events=events)
    write_events(files.events, events, OFFSET_US, chunks=512)
    with h5py.File(files.events) as file:
        chunk = file["events/x"].id.get_chunk_info(len(events) // 512 // 4)
        hit = chunk.chunk_offset[0]
    data = bytearray(files.events.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    files.events.write_bytes(data)
    found = everything(DsecSource(tmp_path, SECOND))
    damaged = [
        start
        for start in range(BEGIN_US, BEGIN_US + 1_000_001, 500_000)
        if touched(events, start, start + 1_000_000, hit, hit + 512)
    ]
    assert 1 <= len(damaged) < len(found) == 3
    bad = [item for item in found if isinstance(item, Rejected)]
    assert [item.position for item in bad] == [f"window [{start}, {start + 1_000_000})" for start in damaged]
    assert all("events.h5 is damaged: 'events/x' cannot be read" in item.reason for item in bad)


def touched(events: Events, start_us: int, end_us: int, first: int, stop: int) -> bool:
    """Whether the middle fifth of a window's events meets the events [first, stop)."""
    low, high = np.searchsorted(events.t_us, (start_us, end_us))
    count = (high - low) // 5
    return bool(low + 2 * count < stop and low + 3 * count > first)


# --- windows ---


def test_a_pair_is_the_middle_fifth_of_the_windows_events_with_its_middle_frame(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    found = pairs_of(DsecSource(two_seconds.root, SECOND, align="none"))
    assert [pair.t_start_us for pair in found] == [BEGIN_US, BEGIN_US + 500_000, BEGIN_US + 1_000_000]
    for pair in found:
        assert pair.sequence == "zurich_city_00_a"
        assert pair.t_end_us - pair.t_start_us == 1_000_000
        mine = events.between(pair.t_start_us, pair.t_end_us)
        assert np.array_equal(pair.event_HWC, event_image(equal_counts(mine, 5)[2]))
        first = (pair.t_start_us - BEGIN_US) // 50_000
        assert np.array_equal(pair.target_HWC, frame(first + 10, *RGB))  # 20 frames, the eleventh is the middle


def test_all_images_of_a_window_come_with_the_frames_nearest_to_their_middles(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    found = pairs_of(DsecSource(two_seconds.root, SECOND, align="none", pick="all"))
    middle = pairs_of(DsecSource(two_seconds.root, SECOND, align="none"))
    assert len(found) == 15
    for number, pair in enumerate(found):
        part = equal_counts(events.between(pair.t_start_us, pair.t_end_us), 5)[number % 5]
        assert np.array_equal(pair.event_HWC, event_image(part))
        first = (pair.t_start_us - BEGIN_US) // 50_000
        centre = (int(part.t_us[0]) + int(part.t_us[-1])) / 2
        nearest = min(range(first, first + 20), key=lambda i: abs(BEGIN_US + 50_000 * i - centre))
        assert np.array_equal(pair.target_HWC, frame(nearest, *RGB))
        assert (pair.t_start_us, pair.t_end_us) == (middle[number // 5].t_start_us, middle[number // 5].t_end_us)
    assert all(np.array_equal(a.event_HWC, b.event_HWC) for a, b in zip(found[2::5], middle, strict=True))


def test_the_event_side_may_come_from_the_windows_middle_alone(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    source = DsecSource(two_seconds.root, SECOND, align="none", event_slice_us=50_000, num_images=3)
    for pair in pairs_of(source):
        mine = events.between(pair.t_start_us + 475_000, pair.t_start_us + 525_000)
        assert np.array_equal(pair.event_HWC, event_image(equal_counts(mine, 3)[1]))
        assert pair.t_end_us - pair.t_start_us == 1_000_000


def test_floored_windows_start_and_end_at_whole_milliseconds_of_the_files_clock(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    found = pairs_of(DsecSource(two_seconds.root, (200_000,), align="none", boundaries="ms_floor"))
    exact = pairs_of(DsecSource(two_seconds.root, (200_000,), align="none"))
    assert len(found) == len(exact) == 19
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.t_start_us % 1000 == OFFSET_US % 1000 == 776
        assert mine.t_start_us == theirs.t_start_us - 300
        assert mine.t_end_us - mine.t_start_us == 200_000
        inside = events.between(mine.t_start_us, mine.t_end_us)
        assert np.array_equal(mine.event_HWC, event_image(equal_counts(inside, 5)[2]))


def test_a_window_holds_its_first_microsecond_and_not_its_last(tmp_path: Path) -> None:
    start, end = BEGIN_US, BEGIN_US + 50_000
    times = np.array([start - 1, start, start + 10, end - 1, end])
    events = replace(random_events(5, 0, 1), x=np.arange(5, dtype=np.uint16), t_us=times, p=np.ones(5, np.uint8))
    write_small(tmp_path, frames=2, constants=None, events=events)
    drawn = []
    for num_images in (1, 3):
        (pair,) = pairs_of(DsecSource(tmp_path, (50_000,), pick="all", num_images=num_images))[:1]
        drawn.append(np.flatnonzero((pair.event_HWC != 255).any(axis=(0, 2))).tolist())
    assert drawn == [[1, 2, 3], [1]]


def test_both_layouts_and_a_folder_for_each_sequence_give_the_same_pairs(
    two_seconds: DsecFiles, tmp_path: Path
) -> None:
    name = two_seconds.name
    flat = write_small(tmp_path / "flat", layout="flat")
    own = tmp_path / "own" / name
    own.mkdir(parents=True)
    for part in flat.root.iterdir():
        (shutil.copytree if part.is_dir() else shutil.copy)(part, own / part.name.removeprefix(f"{name}_"))
    tree = pairs_of(DsecSource(two_seconds.root, SECOND))
    for root in (two_seconds.root / "train", flat.root, own.parent, own):
        other = pairs_of(DsecSource(root, SECOND))
        assert all(same(a, b) for a, b in zip(tree, other, strict=True))


def test_both_parts_of_the_dataset_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name, part in (("zurich", "train"), ("interlaken", "test"), ("thun", "train")):
        write_small(tmp_path, name, frames=3, part=part, constants=None)
    assert [name for _, name in find_sequences(tmp_path)] == ["interlaken", "thun", "zurich"]
    assert [pair.sequence for pair in pairs_of(DsecSource(tmp_path, (100_000,)))] == ["interlaken", "thun", "zurich"]


def test_aligned_pairs_are_the_frame_in_the_event_view_and_both_sides_are_cut_alike(two_seconds: DsecFiles) -> None:
    view = event_view(read_rig(two_seconds.calibration), rectify_map(NARROW))
    plain = pairs_of(DsecSource(two_seconds.root, SECOND, align="none"))
    for default, asked, whole in zip(
        pairs_of(DsecSource(two_seconds.root, SECOND)),
        pairs_of(DsecSource(two_seconds.root, SECOND, align="infinite")),
        plain,
        strict=True,
    ):
        assert same(default, asked)
        assert np.array_equal(asked.event_HWC, view.crop.of(whole.event_HWC))
        assert np.array_equal(asked.target_HWC, view.target(whole.target_HWC))
        assert asked.event_HWC.shape == asked.target_HWC.shape
        assert asked.event_HWC.shape[0] < HEIGHT
    assert plain[0].event_HWC.shape == (HEIGHT, WIDTH, 3)
    assert plain[0].target_HWC.shape == (*RGB[::-1], 3)


def test_the_real_cameras_give_a_pair_of_full_size(shared_data: Path, tmp_path: Path) -> None:
    constants = json.loads((shared_data / "dsec_calibration.json").read_text())
    files = DsecFiles(tmp_path, "thun_00_a")
    write_sequence(files, events_until(100_000), image_times(3), constants, t_offset_us=OFFSET_US)
    (pair,) = pairs_of(DsecSource(tmp_path, (100_000,)))
    assert pair.event_HWC.shape == pair.target_HWC.shape
    assert 440 <= pair.target_HWC.shape[0] <= 452
    assert pair.target_HWC.shape[1] == WIDTH
    assert (pair.target_HWC[..., 2] == 11).all()  # the second of two frames


def test_without_calibration_sides_stay_whole_and_a_mixture_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, "a", frames=3, constants=None)
    source = DsecSource(tmp_path, (100_000,))
    assert source.describe()["align"] == "none"
    with pytest.raises(InputError, match=r"1 of 1 sequences have no calibration.*'a' for instance.*--align none"):
        DsecSource(tmp_path, (100_000,), align="infinite").tasks()
    files = write_small(tmp_path, "b", frames=3)
    with pytest.raises(InputError, match=r"1 of 2 sequences have no calibration.*'a' for instance.*--align none"):
        source.tasks()
    assert len(pairs_of(DsecSource(tmp_path, (100_000,), align="none"))) == 2
    shutil.rmtree(tmp_path / "train" / "a")
    assert source.describe()["align"] == "infinite"
    files.rectify_map.unlink()
    with pytest.raises(InputError, match=r"rectify_map\.h5 is missing; add it, or take --align none"):
        source.tasks()


# --- tasks ---


def test_tasks_are_bounded_json_and_independent_of_each_other(tmp_path: Path) -> None:
    for name in ("a b", "a_b", "-x", "ünï", "new\nline", "a" * 120, "a" * 119 + "b"):
        write_small(tmp_path, name, frames=21, constants=None)
    for durations, pick in (((50_000, 1_000_000), "middle"), ((50_000,), "all")):
        source = DsecSource(tmp_path, durations, pick=pick)
        tasks = source.tasks()
        names = [task.name for task in tasks]
        assert names == sorted(set(names))
        assert all(re.fullmatch(r"\w[\w.-]*", name, re.ASCII) and len(name) < 150 for name in names)
        assert all(0 < task.num_pairs <= 64 for task in tasks)
        assert all(json.loads(json.dumps(task.spec)) == task.spec for task in tasks)
        claim(tmp_path / f"store-{pick}", source, tasks, Features(event=SMALL, target=SMALL))
    (first, *_), again = tasks, source.tasks()
    assert [task.num_pairs for task in tasks if task.spec["sequence"] == "a b"] == [60, 60, 60, 15]
    one = list(source.pairs(first))
    other = list(DsecSource(tmp_path, (50_000,), pick="all").pairs(again[0]))
    assert len(one) == first.num_pairs
    assert all(
        same(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, RawPair) and isinstance(b, RawPair)
    )


def test_long_windows_are_few_to_a_task(tmp_path: Path) -> None:
    files = write_small(tmp_path, frames=3, constants=None)
    times = [BEGIN_US, BEGIN_US + 10, BEGIN_US + 120_000_000]
    files.timestamps.write_text("".join(f"{t}\n" for t in times))
    tasks = DsecSource(tmp_path, (20_000_000,)).tasks()
    assert [task.num_pairs for task in tasks] == [3, 3, 3, 2]
    assert [start for task in tasks for start in task.spec["starts_us"]] == [
        BEGIN_US + i * 10_000_000 for i in range(11)
    ]


def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    for settings, message in (
        ({"durations_us": (49_999,)}, r"--durations \(49999us\) must lie between 50ms and 20s"),
        ({"durations_us": (20_000_001,)}, "between 50ms and 20s"),
        ({"durations_us": ()}, "names no window length"),
        ({"durations_us": (1_000_000, 1_000_000)}, "names 1s twice"),
        ({"durations_us": (50_500,), "boundaries": "ms_floor"}, "whole milliseconds with --boundaries ms_floor"),
        ({"event_slice_us": 2_000_000}, r"--event-slice \(2s\) is longer than the window \(1s\)"),
        ({"max_gap_us": 1_999}, r"--max-gap \(1999us\) must be 2ms or more"),
        ({"step_us": 999}, r"--step \(999us\) must be 1ms or more"),
        ({"num_images": 0}, r"--num-images \(0\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            DsecSource(tmp_path, **({"durations_us": SECOND} | settings))


# --- windows that cannot be built ---


def test_windows_without_a_frame_with_few_events_or_with_a_gap_are_rejected_with_the_reason(tmp_path: Path) -> None:
    whole = events_until(1_000_000, count=40_000)
    t = whole.t_us - BEGIN_US
    sparse = (t >= 400_000) & (t < 500_000)
    keep = (~sparse | (np.cumsum(sparse) <= 4)) & ~((t >= 600_000) & (t < 660_000))
    events = Events(whole.x[keep], whole.y[keep], whole.t_us[keep], whole.p[keep], WIDTH, HEIGHT)
    files = write_small(tmp_path, frames=11, constants=None, events=events)
    times = [BEGIN_US + ms * 1000 for ms in (0, 50, 100, 210, 250, 300, 450, 550, 700, 850, 1000)]
    files.timestamps.write_text("".join(f"{time}\n" for time in times))
    source = DsecSource(tmp_path, (100_000,), step_us=100_000, max_gap_us=110_000)
    found = {item.position: item.reason for item in rejected(source)}

    def window(ms: int) -> str:
        return f"window [{BEGIN_US + ms * 1000}, {BEGIN_US + ms * 1000 + 100_000})"

    assert set(found) == {window(400), window(600), window(900)}
    assert "4 events cannot be drawn as 5 images" in found[window(400)]
    assert found[window(600)] == found[window(900)] == "no frame was taken in the window"
    assert len(everything(source)) == 10
    strict = DsecSource(tmp_path, (200_000,), step_us=200_000, max_gap_us=55_000)
    reasons = [item.reason for item in rejected(strict)]
    assert any(
        re.match(r"no event for (6\d|5[5-9])\.\d{3} ms from \d+ µs on; --max-gap allows 55ms", r) for r in reasons
    )
    loose = DsecSource(tmp_path, (200_000,), step_us=200_000, max_gap_us=100_000)
    frames = [item for item in rejected(loose) if item.reason.startswith("no frame for 150.000 ms")]
    assert [item.position for item in frames] == [f"window [{BEGIN_US + 800_000}, {BEGIN_US + 1_000_000})"]


def test_a_recording_that_ends_before_the_window_is_a_gap(tmp_path: Path) -> None:
    write_small(tmp_path, constants=None, events=events_until(1_200_000))
    (line,) = [item for item in rejected(DsecSource(tmp_path, SECOND)) if "no event for" in item.reason][-1:]
    assert line.position == f"window [{BEGIN_US + 1_000_000}, {BEGIN_US + 2_000_000})"


def test_a_missing_or_unreadable_frame_costs_its_windows_alone(own: DsecFiles) -> None:
    (own.images / "000010.png").write_bytes(b"")
    data = (own.images / "000020.png").read_bytes()
    (own.images / "000020.png").write_bytes(data[: len(data) // 2])
    found = everything(DsecSource(own.root, SECOND))
    assert [type(item).__name__ for item in found] == ["Rejected", "Rejected", "RawPair"]
    assert "000010.png is empty" in found[0].reason
    assert "000020.png is no readable image" in found[1].reason
    every = everything(DsecSource(own.root, SECOND, pick="all"))
    assert len(every) == 15
    assert all("image " in item.position for item in every if isinstance(item, Rejected))


def test_a_frame_of_another_size_is_named(own: DsecFiles) -> None:
    shutil.copy(own.images / "000000.png", own.images / "000010.png")
    Image.fromarray(frame(1, 100, 80)).save(own.images / "000010.png")
    reasons = [item.reason for item in rejected(DsecSource(own.root, SECOND))]
    assert reasons == ["the frame has 100 x 80 pixels, but its calibration is for 180 x 135"]


# --- damaged and foreign files ---


def refuses(own: DsecFiles, message: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=message):
        DsecSource(own.root, SECOND, **settings).tasks()


def test_every_truncation_of_the_recording_is_refused(own: DsecFiles) -> None:
    whole = own.events.read_bytes()
    for size in [0, 1, 8, 100, *range(500, len(whole), len(whole) // 40), len(whole) - 1]:
        own.events.write_bytes(whole[:size])
        refuses(own, r"events\.h5 is truncated, damaged or no HDF5 file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.__delitem__("ms_to_idx"), "has no 'ms_to_idx'"),
        (lambda f: f.__delitem__("events/t"), "has no 'events/t'"),
        (put("events/x", np.zeros(20_000, np.float32)), "'events/x' must be one column of whole numbers.*float32"),
        (put("events/p", np.zeros((20_000, 1), np.uint8)), r"'events/p' must be one column.*shape \(20000, 1\)"),
        (put("events/y", np.zeros(19_999, np.uint16)), "the columns differ in length"),
        (put("ms_to_idx", np.zeros(2_100, np.float64)), "'ms_to_idx' must be one column of whole numbers"),
        (put("ms_to_idx", np.arange(100, dtype=np.uint64)), "ms_to_idx covers 100 ms, but the last event is at"),
        (put("ms_to_idx", np.full(3_000, 10**9, np.uint64)), "ms_to_idx is damaged: it holds 1000000000"),
        (put("ms_to_idx", np.arange(3_000, 0, -1).astype(np.uint64)), "ms_to_idx is damaged: its values fall"),
        (put("t_offset", np.float64(3.5)), "t_offset must be one whole number"),
        (put("t_offset", np.array([1, 2])), "t_offset must be one whole number"),
        (put("t_offset", np.int64(-(10**9))), "with a t_offset of -1000000000 µs its times would go from -"),
        (put("t_offset", np.int64(2**63 - 5)), "with a t_offset of 9223372036854775803 µs"),
    ],
)
def test_what_is_no_recording_of_this_format_is_refused_before_any_work(
    own: DsecFiles, change: Callable[[h5py.File], None], message: str
) -> None:
    edit(own.events, change)
    refuses(own, message)


def test_a_recording_without_an_event_is_refused(own: DsecFiles) -> None:
    def empty(file: h5py.File) -> None:
        for name in ("x", "y", "p", "t"):
            put(f"events/{name}", np.zeros(0, np.uint16))(file)

    edit(own.events, empty)
    refuses(own, "holds no event")


def test_times_that_run_backwards_are_refused_where_they_are_read(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        t = file["events/t"][()]
    low, high = np.searchsorted(t, (2_300, 1_002_300))
    i = int(low + (high - low) // 2)
    t[i], t[i + 1] = t[i + 1] + 1, t[i]
    edit(own.events, put("events/t", t, **BLOSC))
    reasons = {item.position: item.reason for item in rejected(DsecSource(own.root, SECOND))}
    assert list(reasons) == [f"window [{BEGIN_US}, {BEGIN_US + 1_000_000})"]
    assert f"times run backwards at event {i + 1}" in next(iter(reasons.values()))


def test_an_index_that_belongs_to_other_times_is_refused(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        index = file["ms_to_idx"][()]
    edit(own.events, put("ms_to_idx", np.maximum(index.astype(np.int64) - 60, 0).astype(np.uint64)))
    assert {item.reason.split(":")[1].strip()[:36] for item in rejected(DsecSource(own.root, SECOND))} == {
        "ms_to_idx does not fit the times"
    }


def test_coordinates_outside_the_sensor_are_refused(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        x = file["events/x"][()]
    x[:] = 640
    edit(own.events, put("events/x", x))
    assert all("x = 640 at event 0 lies outside" in item.reason for item in rejected(DsecSource(own.root, SECOND)))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (("intrinsics", "camRect0"), "has no intrinsics.camRect0"),
        (("intrinsics", "camRect1"), "has no intrinsics.camRect1"),
        (("extrinsics", "T_10"), "has no extrinsics.T_10"),
        (("extrinsics",), "has no extrinsics"),
    ],
)
def test_a_calibration_that_lacks_a_camera_is_refused(own: DsecFiles, drop: tuple[str, ...], message: str) -> None:
    content = yaml.safe_load(own.calibration.read_text().replace("%YAML:1.0", ""))
    here = content
    for key in drop[:-1]:
        here = here[key]
    del here[drop[-1]]
    own.calibration.write_text(yaml.safe_dump(content))
    refuses(own, message)
    assert len(pairs_of(DsecSource(own.root, SECOND, align="none"))) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("%YAML:1.0\n---", "{", "cannot be read as YAML"),
        ("camera_matrix: [570.0", "camera_matrix: [abc", "holds something that is no number"),
        ("camera_matrix: [570.0", "camera_matrix: [-1.0", "focal lengths -1.0"),
        ("camera_matrix: [570.0, ", "camera_matrix: [", r"camRect0.camera_matrix has shape \(3,\)"),
        ("resolution: [180, 135]", "resolution: [1, 1]", "resolution of 1 x 1 pixels"),
    ],
)
def test_a_damaged_calibration_is_refused(own: DsecFiles, old: str, new: str, message: str) -> None:
    text = own.calibration.read_text()
    assert old in text
    own.calibration.write_text(text.replace(old, new))
    refuses(own, message)


def test_a_rectify_map_of_another_shape_or_a_truncated_one_is_refused(own: DsecFiles) -> None:
    edit(own.rectify_map, put("rectify_map", np.zeros((480, 640), np.float32)))
    refuses(own, r"'rectify_map' has shape \(480, 640\)")
    own.rectify_map.write_bytes(own.rectify_map.read_bytes()[:1000])
    refuses(own, "rectify_map.h5 is truncated or damaged")
    own.rectify_map.unlink()
    with h5py.File(own.rectify_map.with_name("rectify_maps.h5"), "w") as file:  # as the format's page names it
        file["rectify_map"] = rectify_map(NARROW)
    assert len(pairs_of(DsecSource(own.root, SECOND))) == 3


def test_image_times_must_be_whole_rising_and_as_many_as_frames(own: DsecFiles) -> None:
    whole = own.timestamps.read_text()
    for text, message in (
        (whole + f"{BEGIN_US + 10**9}\n", r"holds 41 frames, but .*timestamps\.txt 42 times"),
        ("", "holds no time"),
        (f"{BEGIN_US}\n{BEGIN_US}\n", "line 2: .* does not come after"),
        (f"# time\n{BEGIN_US}.5\n", r"line 2: '.*\.5' is no time in whole microseconds"),
        (f"{'9' * 30}\n", "is no time in whole microseconds"),
    ):
        own.timestamps.write_text(text)
        refuses(own, message)
    own.timestamps.write_text("# microseconds\n" + whole.replace("\n", "  \r\n"))
    assert len(pairs_of(DsecSource(own.root, SECOND))) == 3


def test_no_window_of_a_duration_anywhere_is_refused(two_seconds: DsecFiles) -> None:
    with pytest.raises(InputError, match=r"no sequence of .* is long enough for a window of 5s"):
        DsecSource(two_seconds.root, (1_000_000, 5_000_000)).tasks()


def test_folders_that_hold_no_dataset_are_refused(own: DsecFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        DsecSource(tmp_path / "nothing", SECOND).tasks()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no DSEC sequence"):
        DsecSource(empty, SECOND).tasks()
    shutil.rmtree(own.images)
    refuses(own, r"has no frames: .*rectified is missing; add it, or move the sequence")


def test_links_that_lead_nowhere_in_a_circle_or_to_the_same_drive_are_refused(own: DsecFiles, tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(InputError, match="circle is a symbolic link that leads nowhere, or back to itself"):
        DsecSource(circle, SECOND).tasks()
    link = own.root / "train" / "loop"
    link.symlink_to(link)
    refuses(own, "loop is a symbolic link that leads nowhere")
    link.unlink()
    link.symlink_to(own.root)  # a folder within itself is looked into no further
    assert len(DsecSource(own.root, SECOND).tasks()) == 1
    link.unlink()
    link.symlink_to(own.root / "train" / own.name)
    refuses(own, "'loop' and 'zurich_city_00_a' are the same file")
    link.unlink()
    shutil.copytree(own.root / "train", own.root / "test")
    refuses(own, "'zurich_city_00_a' is there twice")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, "good", frames=3, constants=None)
    os.rename(os.fsencode(tmp_path / "train" / "good"), os.fsencode(tmp_path / "train") + b"/b\xffd")
    with pytest.raises(InputError, match="is no valid text"):
        DsecSource(tmp_path, (100_000,)).tasks()


def test_a_machine_without_the_filter_is_told_what_to_install(two_seconds: DsecFiles) -> None:
    script = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        "from pathlib import Path\n"
        "from ray_app.errors import InputError\n"
        "from ray_app.sources.dsec_events import DsecEvents\n"
        "try:\n    DsecEvents(Path(sys.argv[1]))\n"
        "except InputError as error:\n    print(error)\n"
    )
    words = [sys.executable, "-c", script, str(two_seconds.events)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "filter 32001, which is not installed; `pip install hdf5plugin` brings it" in said


# --- real recordings ---


@pytest.mark.parametrize("name", ["000069.npy", "000079.npy", "000099.npy"])
def test_a_real_window_written_in_this_layout_is_read_back_event_for_event(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    events = read_events(shared_data / "events" / name)
    start_us = int(events.t_us[0])
    offset_us = start_us - start_us % 1000 + 776 - 1000 * 40
    files = DsecFiles(tmp_path, "interlaken_00_d")
    times = [start_us, start_us + 50_000]
    write_sequence(files, events, times, None, t_offset_us=offset_us, rgb_size=(16, 12))
    with DsecEvents(files.events) as file:
        first, stop = file.index(start_us), file.index(start_us + 50_000)
        assert (first, stop) == (0, len(events))
        (part,) = file.parts(first, stop)
    for column in ("x", "y", "t_us", "p"):
        assert np.array_equal(getattr(part, column), getattr(events, column))
    (middle,) = pairs_of(DsecSource(tmp_path, (50_000,)))
    assert np.array_equal(middle.event_HWC, event_image(equal_counts(events, 5)[2]))
    each = pairs_of(DsecSource(tmp_path, (50_000,), pick="all"))
    assert [
        np.array_equal(p.event_HWC, event_image(e)) for p, e in zip(each, equal_counts(events, 5), strict=True)
    ] == [True] * 5


# --- prepare ---


def built(source: DsecSource, folder: Path, tasks: list[SourceTask]) -> PairStore:
    both = Features(event=SMALL, target=SMALL)
    claim(folder, source, source.tasks(), both)
    finish(folder, source, [build_task(source, task, folder, both) for task in tasks], both, 0.0)
    return PairStore.open(folder)


def test_several_durations_stand_in_one_store(two_seconds: DsecFiles, tmp_path: Path) -> None:
    source = DsecSource(two_seconds.root, (200_000, 1_000_000, 2_000_000))
    store = built(source, tmp_path / "s", source.tasks())
    assert store.manifest.durations == {"200ms": 200_000, "1s": 1_000_000, "2s": 2_000_000}
    counts = {name: len(PairStore.open(tmp_path / "s", (name,)).index) for name in store.manifest.durations}
    assert counts == {"200ms": 19, "1s": 3, "2s": 1}
    assert store.manifest.source["steps"] == ["100ms", "500ms", "1s"]
    assert store.manifest.source["align"] == "infinite"
    assert store.manifest.source["events"] == "recorded"
    assert store.manifest.source["sequences"][0]["events"] == 20_000
    one_step = DsecSource(two_seconds.root, (50_000, 1_000_000), step_us=100_000)
    assert sum(task.num_pairs for task in one_step.tasks()) == 20 + 11


def test_all_images_of_a_window_stand_in_one_store(two_seconds: DsecFiles, tmp_path: Path) -> None:
    source = DsecSource(two_seconds.root, SECOND, pick="all")
    store = built(source, tmp_path / "s", source.tasks())
    assert len(store.index) == len(set(store.index.sample_id)) == 15
    assert sorted(set(store.index.t_start_us.tolist())) == [BEGIN_US + i * 500_000 for i in range(3)]


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_one_and_two_workers_prepare_the_same_store(tmp_path: Path) -> None:
    for name in ("interlaken_00_a", "zurich_city_00_a"):
        write_small(tmp_path / "dsec", name, frames=21)
    results = []
    for num_workers in (1, 2):
        flags = PrepareDsec(
            out=tmp_path / str(num_workers),
            root=tmp_path / "dsec",
            durations=("200ms", "1s"),
            step="200ms",
            num_workers=num_workers,
        )
        results.append(run_prepare(flags))
    one, two = results
    assert one["fingerprint"] == two["fingerprint"]
    assert (one["pairs"], one["sequences"], one["quarantined"]) == (12, 2, 0)
    assert one["durations"] == ["200ms", "1s"]
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_flags_make_the_source_that_they_name(tmp_path: Path) -> None:
    assert source_of(PrepareDsec(out=tmp_path, root=Path("dsec"))) == DsecSource(Path.cwd() / "dsec", SECOND)
    words = "dsec --out s --durations 50ms 1s --step 100ms --boundaries ms_floor --pick all --align none"
    words += " --num-images 3 --max-gap 1s --event-slice 50ms"
    flags = cli.parse("prepare dsec", cli.COMMANDS["prepare dsec"], None, words.split())
    assert isinstance(flags, PrepareDsec)
    assert source_of(flags) == DsecSource(
        root=Path.cwd() / "dsec",
        durations_us=(50_000, 1_000_000),
        step_us=100_000,
        boundaries="ms_floor",
        pick="all",
        align="none",
        num_images=3,
        max_gap_us=1_000_000,
        event_slice_us=50_000,
    )
