"""Video files as cameras, phones and editors write them: a frame is the picture of its time, or has its reason."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from videos import HEIGHT, MIXED_GOPS, WIDTH, copied, number_of, picture, seen, write_video, zeroed

from ray_app.errors import InputError
from ray_app.sources.video_decoder import Frame, video_frames
from ray_app.sources.video_index import read_index

CASES = Path(__file__).resolve().parents[1] / "data"
QUIET = {"x265-params": "log-level=none:keyint=12:bframes=3"}
KINDS = {
    "h264.mp4": ("libx264", {"options": MIXED_GOPS}),
    "open.mp4": ("libx264", {"options": {"x264-params": "keyint=12:open-gop=1:bframes=3:b-adapt=0"}}),
    "refresh.mp4": ("libx264", {"options": {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}}),
    "h264.mov": ("libx264", {"options": MIXED_GOPS}),
    "h264.mkv": ("libx264", {"options": MIXED_GOPS}),
    "h264.ts": ("libx264", {"options": MIXED_GOPS}),
    "open.ts": ("libx264", {"options": {"x264-params": "keyint=12:open-gop=1:bframes=3:b-adapt=0"}}),
    "h264.avi": ("libx264", {"options": MIXED_GOPS}),
    "h264.flv": ("libx264", {"options": MIXED_GOPS}),
    "h264.mpg": ("libx264", {"container": "vob", "options": MIXED_GOPS}),
    "raw.h264": ("libx264", {"container": "h264", "options": MIXED_GOPS}),
    "hevc.mp4": ("libx265", {"options": QUIET}),
    "hevc.ts": ("libx265", {"options": QUIET}),
    "raw.hevc": ("libx265", {"container": "hevc", "options": QUIET}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4.mkv": ("mpeg4", {}),
    "mpeg2.mpg": ("mpeg2video", {"container": "vob"}),
    "mpeg2.ts": ("mpeg2video", {}),
    "mpeg2.mkv": ("mpeg2video", {}),
    "mpeg1.mpg": ("mpeg1video", {"container": "mpeg"}),
    "raw.m2v": ("mpeg2video", {"container": "mpeg2video"}),
    "vp8.webm": ("libvpx", {"options": {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8"}}),
    "vp9.webm": ("libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mjpeg.avi": ("mjpeg", {"pixels": "yuvj420p"}),
    "prores.mov": ("prores_ks", {"pixels": "yuv422p10le"}),
    "wmv.asf": ("wmv2", {}),
    "a.gif": ("gif", {"pixels": "rgb8"}),
}


def pictures(path: Path, first: int, stop: int) -> list[Frame | str]:
    return [frame for _, frame in video_frames(path, first, stop)]


def dots(path: Path) -> list[float]:
    """Column of the white dot in each frame."""
    frames = pictures(path, 0, len(read_index(path).times_us))
    return [float(np.nonzero((frame.min(axis=2) > 190).any(axis=0))[0].mean()) for frame in frames]


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_picture_of_its_time_wherever_reading_begins(name: str, tmp_path: Path) -> None:
    codec, how = KINDS[name]
    path = write_video(tmp_path / name, codec, **how)
    assert list(read_index(path).times_us) == [40_000 * i for i in range(40)]
    assert seen(path) == list(range(40))
    for first in (1, 11, 13, 22, 25, 39):
        (frame,) = pictures(path, first, first + 1)
        assert not isinstance(frame, str), frame
        assert number_of(frame) == first


@pytest.mark.parametrize("name", ["h264_bframes.avi", "h264_gop24.ts"])
def test_the_same_video_in_other_containers_gives_the_same_frames(name: str) -> None:
    plain, other = CASES / "plain_150_frames.mp4", CASES / name
    assert read_index(other).times_us == read_index(plain).times_us
    assert dots(other) == pytest.approx(dots(plain), abs=1.0)
    assert (np.diff(dots(other)) >= 0).all(), "the dot never steps back"


def test_times_of_decoding_are_not_taken_for_times_of_showing(tmp_path: Path) -> None:
    avi = write_video(tmp_path / "a.avi", options=MIXED_GOPS)
    for name in ("a.mp4", "a.mkv"):
        path = copied(avi, tmp_path / name, decoding_order=True)
        assert not read_index(path).trusted
        assert seen(path) == list(range(40))


def test_pauses_of_a_video_in_avi_keep_their_length(tmp_path: Path) -> None:
    times_ms = [0, 40, 80, 120, 400, 440, 480, 1000, 1040, 1080]
    path = write_video(tmp_path / "a.avi", count=10, options=MIXED_GOPS, times_ms=times_ms)
    assert not read_index(path).trusted
    assert seen(path) == list(range(10))
    assert read_index(path).times_us[-1] == 1_080_000, "not ten thousandths of a second, as its header says"


def test_recordings_that_were_put_one_behind_the_other_are_counted_through(tmp_path: Path) -> None:
    one = write_video(tmp_path / "one.ts", options=MIXED_GOPS).read_bytes()
    both = tmp_path / "both.ts"
    both.write_bytes(one + one)
    assert list(read_index(both).times_us) == [40_000 * i for i in range(80)]
    numbers = [number for number in seen(both) if not isinstance(number, str)]
    assert numbers[:30] == list(range(30))
    assert numbers[-40:] == list(range(40))


def test_a_recording_that_begins_amid_a_group_begins_with_its_first_key_frame(tmp_path: Path) -> None:
    for name in ("h264.ts", "open.ts", "mpeg2.ts"):
        codec, how = KINDS[name]
        path = write_video(tmp_path / name, codec, **how)
        path.write_bytes(path.read_bytes()[188 * 20 :])
        numbers = seen(path)
        assert len(numbers) < 40
        assert numbers == list(range(40 - len(numbers), 40))
        assert read_index(path).times_us[0] == 0


def test_an_edit_list_cuts_away_what_a_player_does_not_show() -> None:
    assert read_index(CASES / "edit_list.mp4").times_us == tuple(40_000 * i for i in range(17))
    assert all(step > 0 for step in np.diff(dots(CASES / "edit_list.mp4")))


def test_a_damaged_packet_costs_what_builds_on_it_and_no_more() -> None:
    path = CASES / "bad_packet.mp4"
    frames = pictures(path, 0, 150)
    assert [i for i, frame in enumerate(frames) if isinstance(frame, str)] == list(range(52, 72))
    assert {frame for frame in frames if isinstance(frame, str)} == {
        "frame 52 is damaged: Invalid data found when processing input; "
        "frames up to the next key frame may build on it"
    }
    inside = pictures(path, 60, 75)
    assert [isinstance(frame, str) for frame in inside] == [True] * 12 + [False] * 3


@pytest.mark.parametrize(
    ("name", "place", "lost"),
    [
        ("h264.mp4", 14, range(12, 24)),
        ("h264.avi", 14, range(12, 24)),
        ("mpeg4.mkv", 13, range(9, 24)),
        ("mpeg2.mkv", 13, range(9, 24)),  # its decoder says nothing: the picture is missing
        ("mpeg2.ts", 13, range(9, 24)),  # the packet is no packet any more: a time is missing
        ("h264.ts", 14, range(12, 24)),
        ("vp8.webm", 14, range(12, 24)),
        ("mjpeg.avi", 14, range(14, 15)),
    ],
)
def test_whatever_the_codec_no_frame_that_may_build_on_damage_is_taken_for_good(
    name: str, place: int, lost: range, tmp_path: Path
) -> None:
    codec, how = KINDS[name]
    good = write_video(tmp_path / name, codec, **how)
    bad = zeroed(good, tmp_path / f"bad_{name}", place)
    whole, places = pictures(good, 0, 40), [t // 40_000 for t in read_index(bad).times_us]
    frames = pictures(bad, 0, len(places))
    flawed = [places[i] for i, frame in enumerate(frames) if isinstance(frame, str)]
    assert flawed
    assert set(flawed) <= set(lost)
    for at, frame in zip(places, frames, strict=True):
        assert isinstance(frame, str) or np.array_equal(frame, whole[at])
    parts = [frame for i in range(0, len(places), 5) for frame in pictures(bad, i, min(i + 5, len(places)))]
    assert [places[i] for i, frame in enumerate(parts) if isinstance(frame, str)] == flawed


def test_a_lost_part_of_a_transport_stream_costs_the_frames_of_its_group(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", options=MIXED_GOPS)
    data = path.read_bytes()
    path.write_bytes(data[: 188 * 40] + data[188 * 43 :])
    numbers = seen(path)
    assert any("one is missing" in str(number) or "incomplete in the file" in str(number) for number in numbers)
    good = [number for number in numbers if not isinstance(number, str)]
    assert good == sorted(good)
    assert good[:5] == [0, 1, 2, 3, 4]
    assert good[-8:] == list(range(32, 40))


@pytest.mark.parametrize("name", ["h264.mkv", "h264.ts", "h264.flv", "mpeg2.mpg", "h264.avi"])
def test_a_file_that_breaks_off_is_used_up_to_there(name: str, tmp_path: Path) -> None:
    codec, how = KINDS[name]
    path = write_video(tmp_path / name, codec, **how)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 17 // 20])
    good = [number for number in seen(path) if not isinstance(number, str)]
    assert good[:4] == [0, 1, 2, 3]
    assert good == sorted(set(good))


@pytest.mark.parametrize("cover", [Disposition.attached_pic, Disposition(0)])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_cover_picture_as_first_track_is_not_taken_for_the_video(
    ending: str, cover: Disposition, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "a.mp4", options=MIXED_GOPS)
    assert seen(copied(video, tmp_path / f"with_cover.{ending}", cover=cover)) == list(range(40))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
def test_frames_stand_upright_as_a_player_shows_them(
    degrees: int, mirrored: tuple[bool, bool], tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", "mpeg4", count=3, rotation=(degrees, *mirrored))
    (frame,) = pictures(path, 2, 3)
    right = np.rot90(picture(2), degrees // 90)  # PyAV counts counter-clockwise, as NumPy does
    right = right[:, ::-1] if mirrored[0] else right
    right = right[::-1] if mirrored[1] else right
    assert frame.shape == right.shape
    assert np.abs(frame.astype(int) - right).mean() < 8


def test_a_portrait_clip_is_turned_by_its_display_matrix() -> None:
    path = CASES / "rot90.mp4"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        right = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    assert np.array_equal(pictures(path, 0, 1)[0], right)
    assert right.shape == (320, 240, 3)


def test_transparent_pixels_of_a_video_are_white(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgba"
        for _ in range(3):
            image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
            image[:, 32:] = (200, 100, 0, 128)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba")))
        out.mux(stream.encode())
    (frame,) = pictures(path, 1, 2)
    assert frame[0, 0].tolist() == [255, 255, 255]
    assert np.abs(frame[0, -1].astype(int) - (227, 177, 127)).max() <= 1


def test_first_times_below_zero_and_uneven_ones_are_kept_from_the_first_frame_on(tmp_path: Path) -> None:
    times = [0, 33, 66, 700, 733, 766]
    path = write_video(tmp_path / "a.mkv", "mpeg4", count=6, times_ms=times)
    assert [round(t / 1000) for t in read_index(path).times_us] == times
    late = copied(path, tmp_path / "late.mkv")
    assert seen(late) == list(range(6))


def test_lists_of_other_files_are_not_opened(tmp_path: Path) -> None:
    write_video(tmp_path / "a.ts")
    hls = tmp_path / "video.m3u8"
    hls.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\na.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "video.mp4").write_text("ffconcat version 1.0\nfile a.ts\n")
    for path in (hls, tmp_path / "video.mp4"):
        with pytest.raises(InputError, match="no readable video"):
            read_index(path)


def test_what_holds_no_video_is_refused_by_name(tmp_path: Path) -> None:
    sound = tmp_path / "sound.wav"
    with av.open(str(tmp_path / "sound.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
    sound.write_bytes((tmp_path / "sound.mkv").read_bytes())
    with pytest.raises(InputError, match=r"sound\.wav has no video stream"):
        read_index(sound)
    with pytest.raises(InputError, match="no readable video"):
        read_index(CASES / "exif6.jpg")
    with pytest.raises(InputError, match="No such file"):
        read_index(tmp_path / "nothing.mp4")


def test_whatever_is_damaged_a_file_is_refused_or_each_frame_has_a_picture_or_a_reason(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["h264.mp4", "h264.mkv", "open.ts", "h264.avi", "mpeg2.mpg", "vp9.webm", "mjpeg.avi", "raw.h264"]
    files = [write_video(tmp_path / name, KINDS[name][0], 20, **KINDS[name][1]).read_bytes() for name in names]
    refused = 0
    for i in range(160):
        data = bytearray(files[i % len(files)])
        for _ in range(int(rng.integers(1, 6))):
            at, size = int(rng.integers(0, len(data))), int(rng.integers(1, 200))
            data[at : at + size] = rng.bytes(size) if rng.random() < 0.5 else b""
        path = tmp_path / f"{i}.bin"
        path.write_bytes(data)
        try:
            times_us = read_index(path).times_us
        except InputError:
            refused += 1
            continue
        assert times_us[0] == 0
        assert (np.diff(times_us) > 0).all()
        stop = min(len(times_us), 60)
        for first in (0, stop // 2):
            assert [number for number, _ in video_frames(path, first, stop)] == list(range(first, stop))
    assert 0 < refused < 160
