"""Readers of real formats, on true-format files: what is read, what is refused, and that no foreign code runs."""

import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from recordings import read_events

from ray_app.errors import InputError
from ray_app.events.simulator import EventSimulator, SimulatorConfig
from ray_app.sources.base import RawPair, RejectedPair, Source
from ray_app.sources.npy import events_of, read_npy
from ray_app.sources.video import SUBSTEP_US, VideoSource, _Footage
from ray_app.store.manifest import RejectedLine, rejected_lines


def recording(n: int = 200, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "p": rng.integers(0, 2, n).astype(np.uint8),
        "t": np.sort(rng.integers(0, 50_000, n)),
        "x": rng.integers(0, 640, n).astype(np.uint16),
        "y": rng.integers(0, 480, n).astype(np.uint16),
    }


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content)
    return path


def everything(source: Source) -> list[RawPair | RejectedPair]:
    return [item for task in source.tasks() for item in source.pairs(task)]


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = recording()
    events = read_events(saved(tmp_path / "a.npy", content))
    for mine, theirs in ((events.x, "x"), (events.y, "y"), (events.t_us, "t"), (events.p, "p")):
        assert np.array_equal(mine, content[theirs])


@pytest.mark.parametrize(("name", "count"), [("000069.npy", 293_355), ("sample1_uint16_time.npy", 132_268)])
def test_real_recordings_are_read(shared_data: Path, name: str, count: int) -> None:
    events = read_events(shared_data / "events" / name)
    assert len(events) == count
    assert 49_000 < events.t_us[-1] - events.t_us[0] < 50_000


def test_a_real_empty_file_is_named(shared_data: Path) -> None:
    with pytest.raises(InputError, match=r"corrupt_zero_bytes.npy is empty"):
        read_npy(shared_data / "events" / "corrupt_zero_bytes.npy")


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1 + 1",))


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"x": bad}, lambda bad: [bad, np.zeros(1)]])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path: Path, wrap: Any) -> None:
    marker = tmp_path / "ran"
    array = np.empty((), object)
    array[()] = wrap(Exploit(marker))
    path = saved(tmp_path / "bad.npy", array)
    with pytest.raises(InputError, match=r"asks for .*can run any code"):
        read_npy(path)
    assert not marker.exists()
    array[()] = wrap(Evaluated())
    with pytest.raises(InputError, match=r"builtins.eval"):
        read_npy(saved(tmp_path / "bad.npy", array))


def test_every_truncation_of_a_recording_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.npy", recording(20)).read_bytes()
    cut = tmp_path / "cut.npy"
    for size in range(0, len(whole), 7):
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.npy"):
            read_events(cut)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    missing = {key: value for key, value in recording().items() if key != "t"}
    with pytest.raises(InputError, match="no column t; it has p, x, y"):
        read_events(saved(tmp_path / "a.npy", missing))
    with pytest.raises(InputError, match="type float64 and shape"):
        read_npy(saved(tmp_path / "b.npy", np.zeros((3, 4))))
    array = np.empty((), object)
    array[()] = [1, 2]
    with pytest.raises(InputError, match="holds a list"):
        read_npy(saved(tmp_path / "c.npy", array))
    with pytest.raises(InputError, match="cannot be read"):
        read_npy(tmp_path / "nothing.npy")


def test_a_16_bit_clock_that_starts_again_continues() -> None:
    content = recording(4) | {"t": np.array([65_000, 65_500, 100, 200], np.uint16)}
    assert events_of(content, 640, 480, "it").t_us.tolist() == [65_000, 65_500, 65_636, 65_736]


# --- video ---

FRAMES = 30


def moving(i: int) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    bar = 120 + 100 * np.sin((x + i) / 5) * np.cos(y / 7)
    return np.repeat(bar[..., None], 3, 2).astype(np.uint8)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "drive one.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = 10
        for i in range(FRAMES):
            for packet in stream.encode(av.VideoFrame.from_ndarray(moving(i), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(FRAMES):
        Image.fromarray(moving(i)).save(folder / f"frame_{i:04d}.png")
    return folder


def source_of(*files: Path, fps: float | None = None, frame_stride: int = 1) -> VideoSource:
    return VideoSource(files, fps, seed=0, width=64, height=48, frame_stride=frame_stride)


def test_each_frame_of_a_video_is_the_target_of_the_events_around_it(video: Path) -> None:
    found = everything(source_of(video))
    assert all(isinstance(item, RawPair) for item in found)
    pairs = [item for item in found if isinstance(item, RawPair)]
    assert [p.t_start_us for p in pairs] == [i * 40_000 - 25_000 for i in range(1, FRAMES - 1)]
    for i, pair in enumerate(pairs, start=1):
        assert pair.sequence == "drive_one"
        far = [np.abs(pair.target_HWC.astype(int) - moving(k)).mean() for k in range(FRAMES)]
        assert int(np.argmin(far)) == i  # the codec is lossy, but no other frame is nearer
        assert (pair.event_HWC != 255).any(axis=2).mean() > 0.02


def test_a_task_is_the_same_whichever_others_are_done(video: Path) -> None:
    source = source_of(video)
    (task,) = source.tasks()
    one, two = list(source.pairs(task)), list(source.pairs(task))
    assert all(np.array_equal(a.event_HWC, b.event_HWC) for a, b in zip(one, two, strict=True))


def test_a_folder_of_frames_is_read_like_a_video_at_the_rate_it_is_given(frames: Path) -> None:
    found = everything(source_of(frames, fps=25.0, frame_stride=2))
    assert [p.t_start_us for p in found] == [i * 40_000 - 25_000 for i in range(2, FRAMES - 1, 2)]
    assert np.array_equal(found[0].target_HWC, moving(2))
    with pytest.raises(InputError, match="--fps"):
        source_of(frames).tasks()


def test_a_missing_frame_costs_the_windows_that_touch_it(frames: Path) -> None:
    (frames / "frame_0010.png").unlink()
    found = everything(source_of(frames, fps=25.0))
    rejected = [item for item in found if isinstance(item, RejectedPair)]
    assert [item.position for item in rejected] == ["frame 9", "frame 10", "frame 11"]
    assert all("frame 10 is missing" in item.reason for item in rejected)
    assert len(found) == FRAMES - 2


def test_a_frame_that_is_cut_costs_the_windows_that_touch_it(frames: Path) -> None:
    cut = frames / "frame_0020.png"
    cut.write_bytes(cut.read_bytes()[:100])
    rejected = [item for item in everything(source_of(frames, fps=25.0)) if isinstance(item, RejectedPair)]
    assert [item.position for item in rejected] == ["frame 19", "frame 20", "frame 21"]


def test_a_video_that_ends_early_costs_the_pairs_after_its_end(video: Path, tmp_path: Path) -> None:
    data = video.read_bytes()
    # Half of the coded pictures are overwritten: the index still promises all of them.
    start = data.index(b"mdat")
    half = start + (data.index(b"moov") - start) // 2
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data[:half] + bytes(data.index(b"moov") - half - 4) + data[data.index(b"moov") - 4 :])
    found = everything(source_of(broken))
    assert len(found) == FRAMES - 2
    rejected = [item for item in found if isinstance(item, RejectedPair)]
    assert found[-len(rejected) :] == rejected
    assert 5 <= len(rejected) < len(found)
    assert all("is damaged" in item.reason for item in rejected)
    assert "frame 20 is damaged: Invalid data found when processing input" in rejected[-1].reason


def test_one_bad_video_costs_no_other(video: Path, frames: Path, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_text("this is no video")
    (tmp_path / "one").mkdir()
    Image.fromarray(moving(0)).save(tmp_path / "one" / "1.png")
    (tmp_path / "Thumbs.db").write_bytes(b"no data")
    source = source_of(frames, tmp_path / "b.mp4", video, tmp_path / "one", tmp_path / "Thumbs.db", fps=25.0)
    names = [task.name for task in source.tasks()]
    assert names == sorted(set(names)), "in whatever order the files are named"
    found = everything(source)
    assert sum(isinstance(item, RawPair) for item in found) == 2 * (FRAMES - 2)
    flaws = {item.position: item.reason for item in found if isinstance(item, RejectedPair)}
    assert list(flaws) == ["the whole video"]
    reasons = [item.reason for item in found if isinstance(item, RejectedPair)]
    assert len(reasons) == 2
    assert "no readable video" in reasons[0]
    assert "has 1 frames in 0.000 s, too short" in reasons[1]
    with pytest.raises(InputError, match="no readable video"):
        source_of(tmp_path / "b.mp4", tmp_path / "one", fps=25.0).tasks()
    with pytest.raises(InputError, match="no video is named"):
        source_of(tmp_path / "Thumbs.db").tasks()


def test_a_name_that_no_manifest_can_hold_is_refused_at_once(video: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    odd.write_bytes(video.read_bytes())
    with pytest.raises(InputError, match=r"caf\\udce9\.mp4 is no valid text \(UTF-8\); rename it"):
        source_of(video, odd).tasks()
    line = RejectedLine(input=str(odd), position="frame 1", reason=f"{odd} is missing")
    assert b"caf\\\\udce9.mp4 is missing" in rejected_lines([line])


def test_a_frame_holds_until_the_next_where_a_video_pauses() -> None:
    # Frames 0 to 9 and 20 to 29 of 25 a second: between them the video pauses for 440 ms.
    times = [40_000 * i for i in range(FRAMES) if not 10 <= i < 20]
    light = np.linspace(40, 220, len(times))

    def play(times_us: list[int]) -> tuple[np.ndarray, int]:
        simulator = EventSimulator(
            SimulatorConfig(sigma=0.0, leak_rate_hz=0.0, shot_noise_hz=0.0), 8, 8, np.random.default_rng(0)
        )
        footage = _Footage(simulator, times_us, 50_000)
        for i, level in enumerate(light):
            footage.add(i, np.full((8, 8, 3), level, np.uint8))
        steps = len(footage._chunks)
        return footage.take(0, times_us[-1] + 1, 8, 8).t_us, steps

    paused, steps = play(times)
    before, after = times[9], times[10]
    assert not ((paused > before) & (paused <= after - SUBSTEP_US)).any(), "nothing moves while the picture holds"
    assert ((paused > after - SUBSTEP_US) & (paused <= after)).any(), "and then the next one is there"
    even = [120_000 * i for i in range(len(times))]
    assert np.diff(play(even)[0]).max() < 120_000, "a low rate is no pause: pictures are blended"
    hours = [*times[:10], *(t + 3_600_000_000 for t in times[10:])]
    assert play(hours)[1] < 2 * steps, "an hour's pause costs no more than a short one"


def test_numbers_that_are_times_are_refused(tmp_path: Path) -> None:
    for t_us in (1_700_000_000_000_000, 1_700_000_000_040_000):
        Image.fromarray(moving(0)).save(tmp_path / f"{t_us}.png")
    with pytest.raises(InputError, match=r"holds 2 images with numbers from 1700000000000000 to 1700000000040000"):
        source_of(tmp_path, fps=25.0).tasks()


def test_what_is_no_video_is_refused(tmp_path: Path, video: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("this is no video")
    with pytest.raises(InputError, match="no readable video"):
        source_of(text).tasks()
    with pytest.raises(InputError, match="no readable video"):
        source_of(tmp_path / "nothing.mp4").tasks()
    whole = video.read_bytes()
    text.write_bytes(whole[: len(whole) // 2])  # the index is at the end of the file
    with pytest.raises(InputError, match="no readable video"):
        source_of(text).tasks()


def test_a_video_shorter_than_a_window_is_refused(frames: Path) -> None:
    source = VideoSource((frames,), 25.0, 0, 64, 48, duration_us=2_000_000)
    with pytest.raises(InputError, match="too short for a window of 2s"):
        source.tasks()


def test_two_videos_of_one_name_are_two_sequences(video: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / video.name
    other.parent.mkdir()
    shutil.copy(video, other)
    names = {item.sequence for item in everything(source_of(video, other)) if isinstance(item, RawPair)}
    assert names == {"drive_one", "drive_one-2"}


def test_real_footage_gives_a_pair_for_each_frame_with_room(shared_data: Path) -> None:
    source = VideoSource((shared_data / "video" / "solidWhiteRight.mp4",), None, seed=0)
    tasks = source.tasks()
    assert sum(task.num_pairs for task in tasks) == 219
    last = list(source.pairs(tasks[-1]))
    assert all(isinstance(item, RawPair) for item in last)
    assert last[0].target_HWC.shape == (540, 960, 3)
