"""A rendered drive in the DSEC layout: `prepare dsec` gives its events and frames, `inspect` its numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dsec_drives import BEGIN_US, SceneDrive, write_scene
from numpy.typing import NDArray
from pages import assert_has_words, assert_light_and_dark, assert_opens, assert_self_contained
from s3_process import S3

from ray_app.commands.inspect.command import run_inspect
from ray_app.commands.inspect.statistics import NIGHT_BELOW
from ray_app.commands.prepare.command import run_prepare
from ray_app.config.prepare import InspectConfig, PrepareDsec
from ray_app.events.recording import Events
from ray_app.events.render import equal_counts, event_image
from ray_app.sources.dsec.events_file import DsecEvents
from ray_app.sources.images import resized
from ray_app.store.pair_store import PairStore

pytestmark = pytest.mark.usefixtures("ray_cluster")
STARTS_US = {100_000: (0, 50_000, 100_000, 150_000), 150_000: (0, 75_000)}
"""Of the windows of both lengths, from the first frame on, in 250 ms of frames."""


@pytest.fixture(scope="module")
def scene_drive(tmp_path_factory: pytest.TempPathFactory) -> SceneDrive:
    """0.3 s of simulated events, and 6 frames."""
    return write_scene(tmp_path_factory.mktemp("scene"), "scene_00", seed=3, num_frames=6)


@pytest.fixture(scope="module")
def prepared(scene_drive: SceneDrive, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("store") / "s"
    return run_prepare(PrepareDsec(out=out, root=scene_drive.files.root, durations=("100ms", "150ms")))


def windows(drive: SceneDrive) -> list[tuple[int, int, Events, int]]:
    """(start, end, events, number of the middle frame) of each window in the store's order, worked out again."""
    found = []
    for start_us, length_us in sorted((s, d) for d, starts in STARTS_US.items() for s in starts):
        start_us += BEGIN_US
        inside = (drive.events.t_us >= start_us) & (drive.events.t_us < start_us + length_us)
        first, last = np.flatnonzero(inside)[[0, -1]].tolist()
        frames = [i for i, t_us in enumerate(drive.times_us) if start_us <= t_us < start_us + length_us]
        found.append((start_us, start_us + length_us, drive.events[first : last + 1], frames[len(frames) // 2]))
    return found


def test_the_layout_gives_the_simulated_events_back(scene_drive: SceneDrive) -> None:
    assert len(scene_drive.events) > 500_000
    with DsecEvents(scene_drive.files.events) as file:
        parts = list(file.parts(0, len(file)))
    for name in ("x", "y", "t_us", "p"):
        read = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(read, getattr(scene_drive.events, name))


def test_its_pairs_are_its_events_and_frames(scene_drive: SceneDrive, prepared: dict[str, Any]) -> None:
    store = PairStore.open(prepared["store"])
    crop = prepared["source"]["sequences"][0]["crop"]
    assert (crop["top"], crop["bottom"], crop["right"]) == (0, 480, 640)
    assert crop["left"] <= 1  # the map holds float32, which may be a hair outside

    def stored(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resized(image[:, crop["left"] :], 224, 224).reshape(-1)

    event_ND, target_ND = store.read_rows(np.arange(6))
    found = {key: row for row, key in enumerate(zip(store.index.t_start_us, store.index.t_end_us, strict=True))}
    for start_us, end_us, events, number in windows(scene_drive):
        row = found.pop((start_us, end_us))
        assert np.array_equal(event_ND[row], stored(event_image(equal_counts(events, 5)[2])))
        assert np.array_equal(target_ND[row], stored(scene_drive.frames[number]))
    assert not found


def test_inspect_gives_the_numbers_that_numpy_gives(
    scene_drive: SceneDrive, prepared: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "store.html"
    result = run_inspect(InspectConfig(store=prepared["store"], html=page))
    worked = windows(scene_drive)
    output = result["windows"]
    for name, values in (
        ("events_per_window", [len(events) for _, _, events, _ in worked]),
        (
            "frame_minus_window_centre_ms",
            [(scene_drive.times_us[i] - (start + end) / 2) / 1000 for start, end, _, i in worked],
        ),
        ("positive_share_of_events_drawn", [equal_counts(events, 5)[2].p.mean() for _, _, events, _ in worked]),
        ("overlap_with_previous", [0.5] * 4),
    ):
        want = {"min": min(values), "median": np.median(values), "max": max(values), "mean": np.mean(values)}
        assert output[name]["known"] == len(values)
        assert {key: output[name][key] for key in want} == pytest.approx(want), name
    target_ND = PairStore.open(prepared["store"]).read_rows(np.arange(6))[1]
    grey = np.einsum("nchw,c->nhw", target_ND.reshape(-1, 3, 224, 224), [0.299, 0.587, 0.114])
    cells = grey.reshape(-1, 16, 14, 16, 14).mean(axis=(2, 4)).reshape(-1, 256)
    bright = float(np.median(np.quantile(cells, 0.9, axis=1)))
    (line,) = result["by_sequence"]
    assert line["brightness"] == pytest.approx(bright, abs=0.5)
    assert line["daytime"] == ("night" if bright < NIGHT_BELOW else "day")
    text = page.read_text()
    for check in (assert_self_contained, assert_has_words, assert_light_and_dark):
        check(text)
    assert "Share of each window that the one before it covers: median 50 %" in text
    assert_opens(page)


def test_a_bucket_gets_the_same_store(scene_drive: SceneDrive, prepared: dict[str, Any], s3: S3) -> None:
    where = s3.uri("bucket/dsec")
    flags = PrepareDsec(out=where, root=scene_drive.files.root, durations=("100ms", "150ms"), num_workers=2)
    assert run_prepare(flags)["fingerprint"] == prepared["fingerprint"]
    PairStore.open(where).verify()
