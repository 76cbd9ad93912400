"""The scenes source: its contract with `prepare`, and statistics near those of real recordings on a small sample."""

import json
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_app.errors import ConfigError
from ray_app.events.windows import parse_duration
from ray_app.sources.base import RawPair, Source
from ray_app.sources.scenes import FRAME_US, ScenesSource

SMALL: dict[str, Any] = {"width": 64, "height": 48}


def pairs_of(source: ScenesSource) -> list[RawPair]:
    return [pair for task in source.tasks() for pair in source.pairs(task)]


@pytest.fixture(scope="module")
def source() -> ScenesSource:
    return ScenesSource(num_pairs=11, num_sequences=3, seed=7, **SMALL)


@pytest.fixture(scope="module")
def pairs(source: ScenesSource) -> list[RawPair]:
    return pairs_of(source)


def test_it_is_a_source(source: ScenesSource) -> None:
    held: Source = source
    assert held.name == "scenes"
    assert pickle.loads(pickle.dumps(source)) == source  # as Ray ships it


def test_pairs_are_spread_evenly_and_in_order_of_time(source: ScenesSource, pairs: list[RawPair]) -> None:
    names = [pair.sequence for pair in pairs]
    assert [names.count(f"scene_000{i}") for i in range(3)] == [4, 4, 3]
    assert names == sorted(names)
    for before, after in pairwise(pairs):
        if before.sequence == after.sequence:
            assert after.t_start_us - before.t_start_us == 500_000
        else:
            assert after.t_start_us == 0
    assert {pair.t_end_us - pair.t_start_us for pair in pairs} == {parse_duration(source.durations()[0])}


def test_pictures_have_the_sensors_size_and_the_event_palette(pairs: list[RawPair]) -> None:
    palette = {(255, 255, 255), (255, 0, 0), (0, 0, 255)}
    for pair in pairs:
        assert pair.event_HWC.shape == pair.target_HWC.shape == (48, 64, 3)
        assert pair.event_HWC.dtype == pair.target_HWC.dtype == np.uint8
        assert set(map(tuple, pair.event_HWC.reshape(-1, 3).tolist())) <= palette


@pytest.mark.parametrize(("num_pairs", "num_sequences"), [(5208, 84), (1000, 60), (480, 40), (100, 1), (7, 7)])
def test_tasks_are_small_named_in_order_and_hold_every_pair(num_pairs: int, num_sequences: int) -> None:
    tasks = ScenesSource(num_pairs, num_sequences, 0).tasks()
    assert sum(task.num_pairs for task in tasks) == num_pairs
    assert max(task.num_pairs for task in tasks) <= 24
    names = [task.name for task in tasks]
    assert names == sorted(set(names))
    assert len({task.spec["drive"] for task in tasks}) == num_sequences
    json.dumps([task.spec for task in tasks])


def test_a_pair_does_not_depend_on_the_task_it_is_in(pairs: list[RawPair]) -> None:
    """The same drive in a source that cuts it elsewhere, read backwards."""
    longer = ScenesSource(num_pairs=30, num_sequences=1, seed=7, **SMALL)
    first, second = longer.tasks()
    later = list(longer.pairs(second))
    earlier = list(longer.pairs(first))
    assert later[0].t_start_us == earlier[-1].t_start_us + 500_000
    for mine, theirs in zip(pairs[:4], earlier, strict=False):
        np.testing.assert_array_equal(mine.event_HWC, theirs.event_HWC)
        np.testing.assert_array_equal(mine.target_HWC, theirs.target_HWC)


def test_another_seed_gives_other_pairs(pairs: list[RawPair]) -> None:
    other = ScenesSource(num_pairs=3, num_sequences=3, seed=8, **SMALL)
    assert not np.array_equal(next(other.pairs(other.tasks()[0])).target_HWC, pairs[0].target_HWC)


def test_events_come_from_the_middle_of_the_window_at_true_motion(source: ScenesSource) -> None:
    class Watched:
        """Notes when pictures are asked for."""

        def __init__(self) -> None:
            self.scene, self.times_s = source.scene(1), []

        def grey(self, t_s: float) -> Any:
            self.times_s.append(t_s)
            return self.scene.grey(t_s)

    watched = Watched()
    events = source.events(watched, 1, 2)  # type: ignore[arg-type]
    times_us = np.rint(np.array(watched.times_s) * 1e6).astype(int)
    assert (times_us[0], times_us[-1]) == (1_475_000, 1_525_000)  # window 2 is [1 s, 2 s)
    assert np.diff(times_us).max() <= FRAME_US == 5000
    assert events.t_us.min() >= times_us[0]
    assert events.t_us.max() <= times_us[-1]
    assert (np.diff(events.t_us) >= 0).all()


def test_the_description_gives_every_setting_and_that_events_are_simulated(source: ScenesSource) -> None:
    output = json.loads(json.dumps(source.describe()))
    assert output["events"] == "simulated"
    assert output["simulator"]["theta_on"] < output["simulator"]["theta_off"]
    for name in ("num_pairs", "num_sequences", "seed", "width", "height", "duration_us", "step_us", "event_span_us"):
        assert output[name] == getattr(source, name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_pairs": 2, "num_sequences": 3}, r"--num-sequences \(3\) is more than --num-pairs \(2\)"),
        ({"seed": -1}, r"--seed \(-1\)"),
        ({"event_span_us": 2_000_000}, r"--event-span \(2s\) is longer than --duration \(1s\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScenesSource(**{"num_pairs": 4, "num_sequences": 2, "seed": 0, **wrong})


@pytest.mark.slow
def test_a_small_sample_is_near_real_recordings() -> None:
    """Fourteen drives, one window each, full size. The full measurement: benchmarks/data/scene_statistics.py."""
    source = ScenesSource(num_pairs=14, num_sequences=14, seed=0)
    cosines, active, counts, positive = [], [], [], []
    for task in source.tasks():
        drive = task.spec["drive"]
        scene, window = source.scene(drive), 5
        events = source.events(scene, drive, window)
        target = features(scene.rgb(window * 0.5 + 0.5))
        picture = np.full((480, 640, 3), 255, np.uint8)
        for polarity, colour in ((0, (0, 0, 255)), (1, (255, 0, 0))):
            picture[events.y[events.p == polarity], events.x[events.p == polarity]] = colour
        drawn = features(picture)
        cosines.append(drawn @ target / np.linalg.norm(drawn) / np.linalg.norm(target))
        active.append(len(np.unique(events.y.astype(np.int64) * 640 + events.x)) / (480 * 640))
        counts.append(len(events))
        positive.append(events.p.mean())
    assert 0.55 < np.mean(cosines) < 0.75
    assert 0.05 < np.std(cosines) < 0.16
    assert 0.1 < np.median(active) < 0.35
    assert 165_000 < np.median(counts) < 1_550_000
    assert 0.5 < np.mean(positive) < 0.65


def features(image_HWC: Any) -> Any:
    return np.asarray(Image.fromarray(image_HWC).resize((224, 224), Image.Resampling.BILINEAR), np.float64).ravel()
