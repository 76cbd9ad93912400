"""Windows that cannot be built: each costs itself alone, and says why."""

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
from dsec_drives import BEGIN_US, OFFSET_US, SECOND, dsec, events_until, everything, rejected, write_small
from dsec_writer import (
    HEIGHT,
    WIDTH,
    DsecFiles,
    frame,
    write_events,
)
from PIL import Image

from ray_app.events.recording import Events
from ray_app.sources.base import RejectedPair


def test_windows_without_a_frame_with_few_events_or_with_a_gap_are_rejected_with_the_reason(tmp_path: Path) -> None:
    whole = events_until(1_000_000, count=40_000)
    t = whole.t_us - BEGIN_US
    sparse = (t >= 400_000) & (t < 500_000)
    keep = (~sparse | (np.cumsum(sparse) <= 4)) & ~((t >= 600_000) & (t < 660_000))
    events = Events(whole.x[keep], whole.y[keep], whole.t_us[keep], whole.p[keep], WIDTH, HEIGHT)
    files = write_small(tmp_path, frames=11, constants=None, events=events)
    times = [BEGIN_US + ms * 1000 for ms in (0, 50, 100, 210, 250, 300, 450, 550, 700, 850, 1000)]
    files.timestamps.write_text("".join(f"{time}\n" for time in times))
    source = dsec(tmp_path, (100_000,), step_us=100_000, max_gap_us=110_000)
    found = {item.position: item.reason for item in rejected(source)}

    def window(ms: int) -> str:
        return f"window [{BEGIN_US + ms * 1000}, {BEGIN_US + ms * 1000 + 100_000})"

    assert set(found) == {window(400), window(600), window(900)}
    assert "4 events cannot be drawn as 5 images" in found[window(400)]
    assert found[window(600)] == found[window(900)] == "no frame was taken in the window"
    assert len(everything(source)) == 10
    strict = dsec(tmp_path, (200_000,), step_us=200_000, max_gap_us=55_000)
    reasons = [item.reason for item in rejected(strict)]
    assert any(
        re.match(r"no event for (6\d|5[5-9])\.\d{3} ms from \d+ µs on; --max-gap allows 55ms", r) for r in reasons
    )
    loose = dsec(tmp_path, (200_000,), step_us=200_000, max_gap_us=100_000)
    frames = [item for item in rejected(loose) if item.reason.startswith("no frame for 150.000 ms")]
    assert [item.position for item in frames] == [f"window [{BEGIN_US + 800_000}, {BEGIN_US + 1_000_000})"]


def test_a_recording_that_ends_before_the_window_is_a_gap(tmp_path: Path) -> None:
    write_small(tmp_path, constants=None, events=events_until(1_200_000))
    (line,) = [item for item in rejected(dsec(tmp_path, SECOND)) if "no event for" in item.reason][-1:]
    assert line.position == f"window [{BEGIN_US + 1_000_000}, {BEGIN_US + 2_000_000})"


def test_a_missing_or_unreadable_frame_costs_its_windows_alone(own: DsecFiles) -> None:
    (own.images / "000010.png").write_bytes(b"")
    data = (own.images / "000020.png").read_bytes()
    (own.images / "000020.png").write_bytes(data[: len(data) // 2])
    found = everything(dsec(own.root, SECOND))
    assert [type(item).__name__ for item in found] == ["RejectedPair", "RejectedPair", "RawPair"]
    assert "000010.png is empty" in found[0].reason
    assert "000020.png is no readable image" in found[1].reason
    every = everything(dsec(own.root, SECOND, pairs_per_window="all"))
    assert len(every) == 15
    assert all("image " in item.position for item in every if isinstance(item, RejectedPair))


def test_a_frame_of_another_size_is_named(own: DsecFiles) -> None:
    shutil.copy(own.images / "000000.png", own.images / "000010.png")
    Image.fromarray(frame(1, 100, 80)).save(own.images / "000010.png")
    reasons = [item.reason for item in rejected(dsec(own.root, SECOND))]
    assert reasons == ["the frame has 100 x 80 pixels, but its calibration is for 180 x 135"]


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
    found = everything(dsec(tmp_path, SECOND))
    damaged = [
        start
        for start in range(BEGIN_US, BEGIN_US + 1_000_001, 500_000)
        if touched(events, start, start + 1_000_000, hit, hit + 512)
    ]
    assert 1 <= len(damaged) < len(found) == 3
    bad = [item for item in found if isinstance(item, RejectedPair)]
    assert [item.position for item in bad] == [f"window [{start}, {start + 1_000_000})" for start in damaged]
    assert all("events.h5 is damaged: 'events/x' cannot be read" in item.reason for item in bad)


def touched(events: Events, start_us: int, end_us: int, first: int, stop: int) -> bool:
    """Whether the middle fifth of a window's events meets the events [first, stop)."""
    low, high = np.searchsorted(events.t_us, (start_us, end_us))
    count = (high - low) // 5
    return bool(low + 2 * count < stop and low + 3 * count > first)
