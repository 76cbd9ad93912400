"""Damaged and foreign DSEC files: refused before any work, with the file and the way out."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from dsec_drives import BEGIN_US, NARROW, OFFSET_US, SECOND, dsec, edit, pairs_of, put, rejected, write_small
from dsec_writer import (
    BLOSC,
    DsecFiles,
    rectify_map,
)

from ray_app.errors import InputError
from ray_app.sources.dsec import events_file


def refuses(own: DsecFiles, message: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=message):
        dsec(own.root, SECOND, **settings).tasks()


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


def test_images_from_outside_the_recording_are_refused(own: DsecFiles) -> None:
    edit(own.events, put("t_offset", np.int64(0)))
    refuses(own, r"images are from 49599303076 to .* a t_offset of 0 µs\): no window has both")
    edit(own.events, put("t_offset", np.int64(OFFSET_US + 10**9)))
    refuses(own, "no window has both")


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
    reasons = {item.position: item.reason for item in rejected(dsec(own.root, SECOND))}
    assert list(reasons) == [f"window [{BEGIN_US}, {BEGIN_US + 1_000_000})"]
    first, place = map(int, re.findall(r"event (\d+)", next(iter(reasons.values()))))
    assert "times run backwards" in next(iter(reasons.values()))
    assert first + place == i + 1, "the first of the part that was read, and the place in it"


def test_an_index_that_belongs_to_other_times_is_refused(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        index = file["ms_to_idx"][()]
    edit(own.events, put("ms_to_idx", np.maximum(index.astype(np.int64) - 60, 0).astype(np.uint64)))
    assert {item.reason.split(":")[1].strip()[:36] for item in rejected(dsec(own.root, SECOND))} == {
        "ms_to_idx does not fit the times"
    }


def test_values_that_hdf5_would_fill_in_are_refused_by_name(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        x = file["events/x"][()]
    half, outside = len(x) // 2, own.events.with_name("x.h5")
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    layout[:half] = h5py.VirtualSource("x.h5", "first", (half,))
    layout[half:] = h5py.VirtualSource("x.h5", "rest", (len(x) - half,))

    def virtual(file: h5py.File) -> None:
        del file["events/x"]
        file.create_virtual_dataset("events/x", layout, fillvalue=3)

    edit(own.events, virtual)
    refuses(
        own, r"'/events/x' is a virtual dataset, of which \d+ values lie in 'first' of 'x\.h5', where they are not"
    )
    with h5py.File(outside, "w") as file:
        file["first"] = x[:half]
    refuses(own, r"values lie in 'rest' of 'x\.h5'")
    with h5py.File(outside, "a") as file:
        file["rest"] = x[half:]
    assert len(pairs_of(dsec(own.root, SECOND))) == 3, "with its sources it is read"
    with h5py.File(outside, "a") as file:
        del file["rest"]
        file.create_dataset("rest", (len(x) - half,), x.dtype, chunks=(100,))[:100] = 1
    refuses(own, r"values lie in 'rest' of 'x\.h5', where they are not")
    with h5py.File(outside, "a") as file:
        del file["rest"]
        file["rest"] = x[half:]
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    layout[half:] = h5py.VirtualSource("x.h5", "rest", (len(x) - half,))
    edit(own.events, virtual)
    refuses(own, rf"has a source for {len(x) - half} of {len(x)} values only")


def test_values_outside_the_file_and_blocks_that_were_never_written_are_refused(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        count = len(file["events/x"])

    def external(file: h5py.File) -> None:
        del file["events/x"]
        file.create_dataset("events/x", (count,), "u2", external=[("/etc/hostname", 0, 2 * count)])

    def unwritten(file: h5py.File) -> None:
        del file["events/x"]
        file.create_dataset("events/x", (count,), "u2", chunks=(100,))[:100] = 1

    edit(own.events, external)
    refuses(own, "'/events/x' keeps its values outside, in '/etc/hostname'")
    edit(own.events, unwritten)
    refuses(own, r"'/events/x' holds 1 of its \d+ blocks; was its writing cut off?")


def test_an_index_of_more_than_a_day_is_not_read(own: DsecFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_file, "MAX_MS", 100)
    refuses(own, r"ms_to_idx has \d+ entries, the limit is 100: a day")


def test_times_above_what_64_bits_hold_are_refused_with_the_number(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        t = file["events/t"][()].astype(np.uint64)
    edit(own.events, put("events/t", t + 2**63))
    refuses(own, f"'t' holds {2**63 + int(t[0])}, which is above 2\\^63")


def test_companions_of_macos_are_neither_frames_nor_sequences(own: DsecFiles) -> None:
    before = len(pairs_of(dsec(own.root, SECOND)))
    (own.images / "._000000.png").write_bytes(b"\0\5\x16\7")
    (own.root / "._drive_events_left").write_bytes(b"\0\5\x16\7")
    (own.root / ".DS_Store").write_bytes(b"")
    assert len(pairs_of(dsec(own.root, SECOND))) == before


def test_coordinates_outside_the_sensor_are_refused(own: DsecFiles) -> None:
    with h5py.File(own.events) as file:
        x = file["events/x"][()]
    x[:] = 640
    edit(own.events, put("events/x", x))
    reasons = [item.reason for item in rejected(dsec(own.root, SECOND))]
    assert reasons
    assert all("x = 640 at event 0 is outside" in reason for reason in reasons)


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
    assert len(pairs_of(dsec(own.root, SECOND, align="none"))) == 3


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
    assert len(pairs_of(dsec(own.root, SECOND))) == 3


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
    assert len(pairs_of(dsec(own.root, SECOND))) == 3


def test_no_window_of_a_duration_anywhere_is_refused(two_seconds: DsecFiles) -> None:
    with pytest.raises(InputError, match=r"no sequence of .* is long enough for a window of 5s"):
        dsec(two_seconds.root, (1_000_000, 5_000_000)).tasks()


def test_folders_that_hold_no_dataset_are_refused(own: DsecFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        dsec(tmp_path / "nothing", SECOND).tasks()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no DSEC sequence"):
        dsec(empty, SECOND).tasks()
    shutil.rmtree(own.images)
    refuses(own, r"has no frames: .*rectified is missing; add it, or move the sequence")


def test_links_that_lead_nowhere_in_a_circle_or_to_the_same_drive_are_refused(own: DsecFiles, tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(InputError, match="circle is a symbolic link that leads nowhere, or back to itself"):
        dsec(circle, SECOND).tasks()
    link = own.root / "train" / "loop"
    link.symlink_to(link)
    refuses(own, "loop is a symbolic link that leads nowhere")
    link.unlink()
    link.symlink_to(own.root)  # a folder within itself is looked into no further
    assert len(dsec(own.root, SECOND).tasks()) == 1
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
        dsec(tmp_path, (100_000,)).tasks()


def test_a_machine_without_the_filter_learns_what_to_install(two_seconds: DsecFiles) -> None:
    script = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        "from pathlib import Path\n"
        "from ray_app.errors import InputError\n"
        "from ray_app.sources.dsec.events_file import DsecEvents\n"
        "try:\n    DsecEvents(Path(sys.argv[1]))\n"
        "except InputError as error:\n    print(error)\n"
    )
    words = [sys.executable, "-c", script, str(two_seconds.events)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "filter 32001, which is not installed; `pip install hdf5plugin` brings it" in said
