"""Windows of DSEC recordings as pairs: what is read, what is drawn, which frame belongs, what is cut away."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from dsec_drives import (
    BEGIN_US,
    NARROW,
    OFFSET_US,
    RGB,
    SECOND,
    dsec,
    edit,
    events_until,
    image_times,
    pairs_of,
    same,
    write_small,
)
from dsec_writer import (
    HEIGHT,
    WIDTH,
    DsecFiles,
    frame,
    random_events,
    rectify_map,
    write_sequence,
)
from numpy_source import SMALL
from recordings import read_events

from ray_app.commands.prepare.store_builder import claim_store
from ray_app.errors import InputError, StoreError
from ray_app.events.camera_view import event_view
from ray_app.events.render import equal_counts, event_image
from ray_app.sources.base import RawPair
from ray_app.sources.dsec.events_file import DsecEvents
from ray_app.sources.dsec.layout import find_sequences, read_rig
from ray_app.store.manifest import Features


def test_a_pair_is_the_middle_fifth_of_the_windows_events_with_its_middle_frame(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    found = pairs_of(dsec(two_seconds.root, SECOND, align="none"))
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
    found = pairs_of(dsec(two_seconds.root, SECOND, align="none", pairs_per_window="all"))
    middle = pairs_of(dsec(two_seconds.root, SECOND, align="none"))
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
    source = dsec(two_seconds.root, SECOND, align="none", event_window_us=50_000, event_bins=3)
    for pair in pairs_of(source):
        mine = events.between(pair.t_start_us + 475_000, pair.t_start_us + 525_000)
        assert np.array_equal(pair.event_HWC, event_image(equal_counts(mine, 3)[1]))
        assert pair.num_events == len(events.between(pair.t_start_us, pair.t_end_us)) > len(mine)
        assert pair.num_drawn == len(equal_counts(mine, 3)[1])
        assert pair.t_end_us - pair.t_start_us == 1_000_000


def test_floored_windows_start_and_end_at_whole_milliseconds_of_the_files_clock(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    found = pairs_of(dsec(two_seconds.root, (200_000,), align="none", window_rounding="ms"))
    exact = pairs_of(dsec(two_seconds.root, (200_000,), align="none"))
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
    for event_bins in (1, 3):
        (pair,) = pairs_of(dsec(tmp_path, (50_000,), pairs_per_window="all", event_bins=event_bins))[:1]
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
    tree = pairs_of(dsec(two_seconds.root, SECOND))
    for root in (two_seconds.root / "train", flat.root, own.parent, own):
        other = pairs_of(dsec(root, SECOND))
        assert all(same(a, b) for a, b in zip(tree, other, strict=True))


def test_both_parts_of_the_dataset_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name, part in (("zurich", "train"), ("interlaken", "test"), ("thun", "train")):
        write_small(tmp_path, name, frames=3, part=part, constants=None)
    assert [name for _, name in find_sequences(tmp_path)] == ["interlaken", "thun", "zurich"]
    assert [pair.sequence for pair in pairs_of(dsec(tmp_path, (100_000,)))] == ["interlaken", "thun", "zurich"]


def test_aligned_pairs_are_the_frame_in_the_event_view_and_both_sides_are_cut_alike(two_seconds: DsecFiles) -> None:
    view = event_view(read_rig(two_seconds.calibration), rectify_map(NARROW))
    plain = pairs_of(dsec(two_seconds.root, SECOND, align="none"))
    for default, asked, whole in zip(
        pairs_of(dsec(two_seconds.root, SECOND)),
        pairs_of(dsec(two_seconds.root, SECOND, align="far-field")),
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


def test_the_manifest_says_what_alignment_cut_away(own: DsecFiles) -> None:
    about = dsec(own.root, SECOND).describe()
    (sequence,) = about["sequences"]
    crop, (height, width) = sequence["crop"], pairs_of(dsec(own.root, SECOND))[0].event_HWC.shape[:2]
    assert (crop["bottom"] - crop["top"], crop["right"] - crop["left"]) == (height, width)
    assert 0 <= crop["top"] < crop["bottom"] < HEIGHT
    assert 0 < sequence["event_view_without_frame"] <= 1 - height * width / (HEIGHT * WIDTH)
    for name, path in (("rectify_map", own.rectify_map), ("calibration", own.calibration)):
        assert sequence[f"{name}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["event_image"].endswith("cut to the crop of its sequence, which both cameras see")
    assert about["target"].endswith("as the event camera sees it, cut alike")
    plain = dsec(own.root, SECOND, align="none").describe()
    assert "crop" not in plain["sequences"][0]
    assert "cut" not in plain["event_image"] + plain["target"]


def test_a_start_over_another_rectify_map_is_refused(own: DsecFiles, tmp_path: Path) -> None:
    source, both = dsec(own.root, SECOND), Features(event=SMALL, target=SMALL)
    claim_store(tmp_path / "s", source, source.tasks(), both)
    claim_store(tmp_path / "s", source, source.tasks(), both)
    edit(own.rectify_map, lambda file: file["rectify_map"].write_direct(file["rectify_map"][()] + np.float32(1e-3)))
    with pytest.raises(StoreError, match="of other settings or inputs"):
        claim_store(tmp_path / "s", source, source.tasks(), both)


def test_the_real_cameras_give_a_pair_of_full_size(shared_data: Path, tmp_path: Path) -> None:
    constants = json.loads((shared_data / "dsec_calibration.json").read_text())
    files = DsecFiles(tmp_path, "thun_00_a")
    write_sequence(files, events_until(100_000), image_times(3), constants, t_offset_us=OFFSET_US)
    (pair,) = pairs_of(dsec(tmp_path, (100_000,)))
    (about,) = dsec(tmp_path, (100_000,)).describe()["sequences"]
    assert about["event_view_without_frame"] == pytest.approx(0.058, abs=0.002)  # and averages need a whole box
    assert pair.event_HWC.shape == pair.target_HWC.shape
    assert 440 <= pair.target_HWC.shape[0] <= 452
    assert pair.target_HWC.shape[1] == WIDTH
    assert (pair.target_HWC[..., 2] == 11).all()  # the second of two frames


def test_without_calibration_sides_stay_whole_and_a_mixture_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, "a", frames=3, constants=None)
    source = dsec(tmp_path, (100_000,))
    assert source.describe()["align"] == "none"
    with pytest.raises(InputError, match=r"1 of 1 sequences have no calibration.*'a' for instance.*--align none"):
        dsec(tmp_path, (100_000,), align="far-field").tasks()
    files = write_small(tmp_path, "b", frames=3)
    with pytest.raises(InputError, match=r"1 of 2 sequences have no calibration.*'a' for instance.*--align none"):
        source.tasks()
    assert len(pairs_of(dsec(tmp_path, (100_000,), align="none"))) == 2
    shutil.rmtree(tmp_path / "train" / "a")
    assert source.describe()["align"] == "far-field"
    files.rectify_map.unlink()
    with pytest.raises(InputError, match=r"rectify_map\.h5 is missing; add it, or take --align none"):
        source.tasks()


def test_nothing_outside_the_drawn_slice_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_small(tmp_path, constants=None)
    reads: list[tuple[str, int, int]] = []
    real_read = DsecEvents._read

    def spied(self: DsecEvents, name: str, first: int, stop: int) -> Any:
        reads.append((name, first, stop))
        return real_read(self, name, first, stop)

    monkeypatch.setattr(DsecEvents, "_read", spied)
    source = dsec(tmp_path, SECOND)
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
    assert len(elsewhere) == 2 * 3  # the milliseconds at both ends of each window of the task
    assert all(b - a < 40 for a, b in elsewhere)


@pytest.mark.parametrize("name", ["000069.npy", "000079.npy", "000099.npy", "sample1_uint16_time.npy"])
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
        parts = list(file.parts(first, stop))
    for column in ("x", "y", "t_us", "p"):
        read = np.concatenate([getattr(part, column) for part in parts])
        assert np.array_equal(read, getattr(events, column))
    (middle,) = pairs_of(dsec(tmp_path, (50_000,)))
    assert np.array_equal(middle.event_HWC, event_image(equal_counts(events, 5)[2]))
    each = pairs_of(dsec(tmp_path, (50_000,), pairs_per_window="all"))
    assert [
        np.array_equal(p.event_HWC, event_image(e)) for p, e in zip(each, equal_counts(events, 5), strict=True)
    ] == [True] * 5
