"""Windows of videos for models that look at them: the frames that are shown, and no video costs another."""

from pathlib import Path

import pytest
from videos import number_of, write_video

from ray_app.errors import InputError
from ray_app.sources.base import RejectedPair
from ray_app.sources.clips import Clip, ClipWindow, clip_windows, clips

CASES = Path(__file__).resolve().parents[1] / "data"


def windows_of(*files: Path, length_us: int = 200_000) -> list[ClipWindow]:
    return clip_windows(files, duration_us=length_us, step_us=length_us, num_frames=4, fps=None)


def test_a_window_in_a_pause_shows_the_frame_before_it(tmp_path: Path) -> None:
    times = [*range(0, 400, 40), *range(2000, 2400, 40)]
    path = write_video(tmp_path / "a.mkv", "mpeg4", count=20, times_ms=times)
    found = list(clips(windows_of(path)))
    assert all(isinstance(clip, Clip) for clip in found)
    shown = [sorted({number_of(frame) for frame in clip.frames_THWC}) for clip in found]
    assert shown[:2] == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert shown[2:10] == [[9]] * 8
    assert shown[10] == [10, 11, 12, 13]


def test_a_bad_video_is_one_rejected_row_and_costs_no_other(tmp_path: Path) -> None:
    bad, short = tmp_path / "bad.mp4", write_video(tmp_path / "short.mp4", "mpeg4", count=3)
    bad.write_text("no video")
    windows = windows_of(bad, CASES / "edit_list.mp4", short)
    assert [window.row for window in windows] == list(range(len(windows)))
    by_sequence = {window.sequence: [w for w in windows if w.sequence == window.sequence] for window in windows}
    assert [len(mine) for mine in by_sequence.values()] == [1, 3, 1]
    flaws = [item for name in ("bad", "short") for item in clips(by_sequence[name])]
    assert [(type(item), item.position) for item in flaws] == [(RejectedPair, "the whole video")] * 2
    assert "no readable video" in flaws[0].reason
    assert "too short for a window of 200ms" in flaws[1].reason
    assert all(isinstance(item, Clip) for item in clips(by_sequence["edit_list"]))
    with pytest.raises(InputError, match="no readable video"):
        windows_of(bad, short)


def test_a_damaged_packet_costs_the_windows_that_show_it() -> None:
    found = list(clips(windows_of(CASES / "bad_packet.mp4", length_us=400_000)))
    assert [isinstance(item, RejectedPair) for item in found] == [5 <= i <= 7 for i in range(15)]


def test_portrait_clips_are_upright() -> None:
    found = [clip for clip in clips(windows_of(CASES / "rot90.mp4")) if isinstance(clip, Clip)]
    assert {clip.frames_THWC.shape[1:] for clip in found} == {(320, 240, 3)}
