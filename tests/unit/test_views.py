"""Several event images and frames of a window, for models that see several, from every source."""

from pathlib import Path

import numpy as np
import pytest
from dsec_drives import BEGIN_US, RGB, SECOND, dsec, events_until, pairs_of
from dsec_writer import DsecFiles, frame
from PIL import Image
from recordings import read_events
from test_eventgpt import dataset
from test_sources import FRAMES, everything, frames, moving

from ray_app.errors import ConfigError
from ray_app.events.render import drawn_parts, equal_counts, event_image
from ray_app.sources.base import RawPair, Views, spread
from ray_app.sources.eventgpt.source import EventGptSource
from ray_app.sources.scenes import ScenesSource
from ray_app.sources.video import VideoSource

__all__ = ["dataset", "frames"]  # fixtures
SEVERAL = Views(num_event_images=5, num_frames=4)


def test_places_are_spread_evenly_and_one_is_the_middle() -> None:
    assert spread(range(10, 17), 1) == [13]
    assert spread(range(8), 4) == [1, 3, 5, 7]
    assert spread(range(3, 5), 4) == [3, 3, 4, 4]


def test_windows_of_recordings_give_all_their_event_images_and_frames_over_them(two_seconds: DsecFiles) -> None:
    events = events_until(50_000 * 41, seed=len(two_seconds.name))
    one = pairs_of(dsec(two_seconds.root, SECOND, align="none"))
    found = pairs_of(dsec(two_seconds.root, SECOND, align="none", views=SEVERAL))
    assert len(found) == len(one) == 3
    for pair, middle in zip(found, one, strict=True):
        assert np.array_equal(pair.event_HWC, middle.event_HWC)
        assert np.array_equal(pair.target_HWC, middle.target_HWC)
        parts = equal_counts(events.between(pair.t_start_us, pair.t_end_us), 5)
        assert all(np.array_equal(a, event_image(b)) for a, b in zip(pair.event_images, parts, strict=True))
        first = (pair.t_start_us - BEGIN_US) // 50_000
        wanted = [frame(first + i, *RGB) for i in (2, 7, 12, 17)]
        assert all(np.array_equal(a, b) for a, b in zip(pair.frames, wanted, strict=True))
        assert pair.num_drawn == pair.num_events


def test_a_pair_of_each_event_image_and_several_for_one_pair_exclude_each_other(two_seconds: DsecFiles) -> None:
    with pytest.raises(ConfigError, match="this encoder takes 5 event images and 4 frames; leave it out"):
        dsec(two_seconds.root, SECOND, align="none", pairs_per_window="all", views=SEVERAL)


def test_clips_of_the_references_dataset_give_their_five_images(dataset: Path) -> None:
    found = everything(EventGptSource(dataset, 1_000_000, 500_000, views=Views(5, 2)))
    pairs = {(p.sequence, p.t_start_us): p for p in found if isinstance(p, RawPair)}
    assert len(pairs) == 8
    one = pairs["zurich", 5_000_000]
    files = [dataset / f"event_image/zurich/000010_{i}.png" for i in range(5)]
    assert all(np.array_equal(a, Image.open(b)) for a, b in zip(one.event_images, files, strict=True))
    files = [dataset / f"video/zurich/000010/{i:06d}.png" for i in (1, 3)]
    assert all(np.array_equal(a, Image.open(b)) for a, b in zip(one.frames, files, strict=True))
    drawn = pairs["interlaken", 7_000_000]
    parts = equal_counts(read_events(dataset / "event_npy/interlaken/000000.npy"), 5)
    assert all(np.array_equal(a, event_image(b)) for a, b in zip(drawn.event_images, parts, strict=True))
    assert np.array_equal(*drawn.frames), "there is one frame"


def test_an_image_of_five_that_is_missing_has_its_clip_drawn_or_rejected(dataset: Path) -> None:
    (dataset / "event_image/zurich/000010_4.png").unlink()
    found = everything(EventGptSource(dataset, 1_000_000, 500_000, views=Views(5, 1)))
    assert [item.reason for item in found if not isinstance(item, RawPair)] == [
        f"{dataset}/event_image/zurich/000010_4.png is missing, and so is {dataset}/event_npy/zurich/000010.npy"
    ]


def test_clips_have_the_number_of_images_that_they_have(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"--num-event-images \(3\): a clip has 5 event images; take 1"):
        EventGptSource.of_folder(dataset, views=Views(3, 1))


def test_scenes_render_frames_over_the_window_and_divide_its_events() -> None:
    settings = {"num_pairs": 2, "num_sequences": 1, "seed": 0, "width": 64, "height": 48}
    one, several = ScenesSource(**settings), ScenesSource(**settings, views=Views(2, 3))  # type: ignore[arg-type]
    assert one.describe() == several.describe()
    for pair, found in zip(everything(one), everything(several), strict=True):
        assert isinstance(pair, RawPair)
        assert isinstance(found, RawPair)
        assert np.array_equal(found.event_HWC, pair.event_HWC)
        assert np.array_equal(found.frames[1], pair.target_HWC)
        scene = several.scene(0)
        assert np.array_equal(found.frames[2], scene.rgb((found.t_start_us + 833_333) * 1e-6))
        events = several.events(scene, 0, found.t_start_us // 500_000)
        expected = [event_image(part) for part in drawn_parts(events, 2)]
        assert all(np.array_equal(a, b) for a, b in zip(found.event_images, expected, strict=True))


def test_a_video_gives_frames_of_its_windows(frames: Path) -> None:
    source = VideoSource((frames,), 25.0, 0, 64, 48, duration_us=200_000, frame_stride=7, views=Views(2, 5))
    found = everything(source)
    assert len(found) > 1
    for pair in found:
        assert isinstance(pair, RawPair)
        middle = (pair.t_start_us + 100_000) // 40_000
        assert middle < FRAMES
        wanted = [moving(middle + offset) for offset in (-2, -1, 0, 1, 2)]
        assert all(np.array_equal(a, b) for a, b in zip(pair.frames, wanted, strict=True))
        assert len(pair.event_images) == 2
        assert np.array_equal(pair.target_HWC, moving(middle))
