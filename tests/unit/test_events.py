"""Recordings, windows, rendering and the simulator against hand-worked cases, real windows and v2e's own numbers."""

from pathlib import Path

import numpy as np
import pytest
from recordings import read_events

from ray_app.errors import ConfigError, InputError
from ray_app.events.recording import Events
from ray_app.events.render import equal_counts, event_image
from ray_app.events.simulator import EventSimulator, SimulatorConfig, log_intensity
from ray_app.events.windows import duration_suffix, format_duration, parse_duration, windows_between

REAL = ["000069.npy", "000079.npy", "000099.npy"]


def events_of(n: int, width: int = 40, height: int = 30, seed: int = 0) -> Events:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, width, n), rng.integers(0, height, n)
    return Events.checked(x, y, np.sort(rng.integers(0, 50_000, n)), rng.integers(0, 2, n), width, height)


def drawn_event_by_event(events: Events, height: int, width: int) -> np.ndarray:
    image = np.full((height, width, 3), 255, np.uint8)
    for x, y, p in zip(events.x, events.y, events.p, strict=True):
        image[y, x] = (0, 0, 255) if p == 0 else (255, 0, 0)
    return image


@pytest.mark.parametrize("name", REAL)
def test_rendering_equals_the_per_event_loop_on_real_windows(shared_data: Path, name: str) -> None:
    events = read_events(shared_data / "events" / name)
    assert np.array_equal(event_image(events), drawn_event_by_event(events, 480, 640))
    for part in equal_counts(events, 5):
        assert np.array_equal(event_image(part), drawn_event_by_event(part, 480, 640))


def test_rendering_equals_the_per_event_loop_where_pixels_fire_often() -> None:
    events = events_of(20_000)
    assert np.array_equal(event_image(events), drawn_event_by_event(events, 30, 40))


def test_the_bounding_box_canvas_is_as_large_as_the_events_need() -> None:
    events = Events.checked(np.array([3, 1]), np.array([0, 2]), np.array([0, 1]), np.array([1, 0]), 640, 480)
    image = event_image(events, "bbox")
    assert image.shape == (3, 4, 3)
    assert np.array_equal(image, drawn_event_by_event(events, 3, 4))
    with pytest.raises(InputError, match="bounding box"):
        event_image(events[0:0], "bbox")


def test_images_hold_equal_counts_and_the_last_one_the_remainder() -> None:
    assert [len(part) for part in equal_counts(events_of(23), 5)] == [4, 4, 4, 4, 7]
    with pytest.raises(InputError, match="4 events cannot be drawn as 5 images"):
        equal_counts(events_of(4), 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t": [5, 4, 6]}, "backwards at event 1: 5 µs, then 4"),
        ({"x": [0, 40, 1]}, "x = 40 at event 1 is outside the sensor of 40 x 30"),
        ({"y": [0, 0, -1]}, "y = -1 at event 2"),
        ({"p": [0, 1, 2]}, "polarity 2 at event 2"),
        ({"p": [-1, 0, 1]}, "polarity is 0 at event 1 and −1 at event 0; it must be 0 and 1, or −1 and 1"),
        ({"p": [0, 1]}, "differ in length"),
        ({"t": np.array([1, 2, 2**63 + 5], np.uint64)}, f"t = {2**63 + 5} at event 2 is no time in microseconds"),
        ({"t": np.array([2**63, 2**63 + 1, 2**63 + 2], np.uint64)}, f"t = {2**63} at event 0"),
        (
            {"t": [1_700_000_000_000_000_000 + i for i in range(3)]},
            "t = 1700000000000000000 at event 0 .* nanoseconds",
        ),
        ({"x": [0.5, 1.0, 2.0]}, "whole numbers"),
    ],
)
def test_a_bad_recording_is_refused_with_the_number_and_its_place(change: dict, words: str) -> None:
    columns = {"x": [0, 1, 2], "y": [0, 1, 2], "t": [1, 2, 3], "p": [0, 1, 1]} | change
    with pytest.raises(InputError, match=words):
        Events.checked(*(np.array(columns[key]) for key in "xytp"), 40, 30)


def test_polarity_of_minus_one_is_off() -> None:
    events = Events.checked(np.array([1, 2]), np.array([1, 2]), np.array([1, 2]), np.array([-1, 1]), 4, 4)
    assert events.p.tolist() == [0, 1]


def test_between_takes_the_start_and_leaves_the_end() -> None:
    n = np.arange(5)
    events = Events.checked(n, n, n * 10, n % 2, 8, 8)
    assert events.between(10, 30).t_us.tolist() == [10, 20]


def test_durations_are_read_and_written() -> None:
    assert [parse_duration(name) for name in ("1s", "0.5s", "50ms", "200us")] == [1_000_000, 500_000, 50_000, 200]
    assert [format_duration(us) for us in (1_000_000, 500_000, 200)] == ["1s", "500ms", "200us"]
    assert [duration_suffix(name) for name in ("1s", "1000ms", "50ms", "20s")] == ["S1", "S1", "S50ms", "S20"]
    for bad in ("1", "s", "-1s", "0s", "0.1us", "1 s", ""):
        with pytest.raises(ConfigError, match="is no duration"):
            parse_duration(bad)


def test_windows_are_the_reference_s() -> None:
    found = windows_between(100, 1100, 400, 200)
    assert [(w.t_start_us, w.t_end_us) for w in found] == [(100, 500), (300, 700), (500, 900), (700, 1100)]
    assert not windows_between(0, 399, 400, 200)


QUIET = {"sigma": 0.0, "leak_rate_hz": 0.0, "shot_noise_hz": 0.0, "refractory_us": 0}


@pytest.mark.parametrize(("mode", "cutoff_hz"), [("v2e_ideal", 0.0), ("v2e_cutoff100", 100.0)])
def test_counts_per_frame_pixel_and_polarity_are_v2e_s(shared_data: Path, mode: str, cutoff_hz: float) -> None:
    golden = np.load(shared_data / "v2e_golden" / "v2e_golden_64x48.npz")
    clip, expected = golden["clip"].astype(np.float64), golden[mode]
    simulator = EventSimulator(SimulatorConfig(cutoff_hz=cutoff_hz, **QUIET), 48, 64, np.random.default_rng(0))
    simulator.start(clip[0], 0)
    for i in range(1, len(clip)):
        found = simulator.step(clip[i], i * 2000)
        counts = np.zeros((2, 48, 64), np.int64)
        np.add.at(counts, (found.p, found.y, found.x), 1)
        assert np.array_equal(counts, expected[i]), f"frame {i}"


def simulator_of(height: int = 8, width: int = 8, seed: int = 0, **settings: float) -> EventSimulator:
    config = SimulatorConfig(**{**QUIET, "cutoff_hz": 0.0, **settings})
    return EventSimulator(config, height, width, np.random.default_rng(seed))


def test_crossing_times_are_interpolated_between_frames() -> None:
    simulator = simulator_of(1, 1)
    dark, bright = np.full((1, 1), 50.0), np.full((1, 1), 50.0 * np.exp(1.0))  # log intensity rises by 1
    simulator.start(dark, 1000)
    found = simulator.step(bright, 2000)
    np.testing.assert_allclose(found.t_us, [1200, 1400, 1600, 1800, 2000][: len(found.t_us)], atol=1)
    assert len(found.t_us) in (4, 5)  # the fifth threshold is at the end itself
    assert found.p.tolist() == [1] * len(found.t_us)


def test_events_are_in_time_order_within_the_step_and_on_the_sensor() -> None:
    rng = np.random.default_rng(0)
    simulator = simulator_of(20, 30, sigma=0.03, cutoff_hz=200, leak_rate_hz=1, shot_noise_hz=50, refractory_us=300)
    simulator.start(rng.uniform(0, 255, (20, 30)), 0, random_phase=True)
    for step in range(1, 6):
        found = simulator.step(rng.uniform(0, 255, (20, 30)), step * 5000)
        assert (np.diff(found.t_us) >= 0).all()
        assert found.t_us.min() >= (step - 1) * 5000
        assert found.t_us.max() <= step * 5000
        assert found.x.max() < 30
        assert found.y.max() < 20


def test_no_pixel_fires_twice_within_its_refractory_time() -> None:
    rng = np.random.default_rng(1)
    simulator = simulator_of(10, 10, refractory_us=700)
    simulator.start(rng.uniform(0, 255, (10, 10)), 0)
    steps = [simulator.step(rng.uniform(0, 255, (10, 10)), t * 2000) for t in range(1, 10)]
    pixel = np.concatenate([s.y.astype(int) * 10 + s.x for s in steps])
    t_us = np.concatenate([s.t_us for s in steps])
    for p in range(100):
        assert (np.diff(t_us[pixel == p]) > 700).all()


@pytest.mark.parametrize(("grey", "share"), [(20, 0.8909), (128, 0.5964)])
def test_shot_noise_has_the_rate_that_v2e_s_formula_gives(grey: int, share: float) -> None:
    assert share == pytest.approx((0.25 - 1) * (grey + 20) / 275 + 1, abs=1e-3)
    simulator = simulator_of(200, 200, shot_noise_hz=5.0)
    flat = np.full((200, 200), float(grey))
    simulator.start(flat, 0)
    found = [simulator.step(flat, t * 10_000) for t in range(1, 101)]
    rate = sum(len(f.t_us) for f in found) / 200**2 / 1.0
    assert rate == pytest.approx(5.0 * share, rel=0.03)


def test_leak_makes_on_events_at_its_rate() -> None:
    simulator = simulator_of(50, 50, leak_rate_hz=5.0, leak_spread=0.0)
    flat = np.full((50, 50), 100.0)
    simulator.start(flat, 0, random_phase=True)
    found = [simulator.step(flat, t * 10_000) for t in range(1, 301)]
    settled = found[100:]  # two seconds after one of running in
    assert sum(len(f.t_us) for f in settled) / 50**2 / 2.0 == pytest.approx(5.0, rel=0.01)
    assert all((f.p == 1).all() for f in found)


def test_a_random_phase_spreads_the_first_events() -> None:
    ramp = [np.full((40, 40), 60.0 * np.exp(0.02 * i)) for i in range(11)]  # one threshold in ten steps
    counts = {}
    for phase in (True, False):
        simulator = simulator_of(40, 40)
        simulator.start(ramp[0], 0, random_phase=phase)
        counts[phase] = [len(simulator.step(frame, (i + 1) * 1000).t_us) for i, frame in enumerate(ramp[1:])]
    assert sum(counts[False][:-1]) == 0
    assert min(counts[True]) > 0.5 * 1600 / 20


def test_log_intensity_is_linear_below_twenty_and_continuous() -> None:
    grey = np.array([0.0, 10.0, 20.0, 20.0 + 1e-9, 255.0])
    expected = [0.0, np.log(20) / 2, np.log(20), np.log(20), np.log(255)]
    np.testing.assert_allclose(log_intensity(grey), expected, atol=1e-6)


def test_settings_that_make_no_camera_are_refused() -> None:
    with pytest.raises(ConfigError, match="theta_on"):
        SimulatorConfig(theta_on=0.0)
    with pytest.raises(ConfigError, match="must not be negative"):
        SimulatorConfig(cutoff_hz=-1.0)


def step_of(start: float, *greys: float, every_us: int = 1000, **settings: float) -> list[tuple[int, int]]:
    """(time, polarity) of the events of one pixel whose grey level is each of these in turn."""
    simulator = simulator_of(1, 1, **settings)
    simulator.start(np.full((1, 1), start), 0)
    steps = [simulator.step(np.full((1, 1), grey), (n + 1) * every_us) for n, grey in enumerate(greys)]
    return [(int(t), int(p)) for step in steps for t, p in zip(step.t_us, step.p, strict=True)]


@pytest.mark.parametrize(("refractory_us", "times_us"), [(399, [400, 800]), (400, [400])])
def test_an_event_at_exactly_the_refractory_time_is_lost(refractory_us: int, times_us: list[int]) -> None:
    """Log intensity rises by 0.5 in a millisecond: with a threshold of 0.2 there are crossings at 400 and 800 µs."""
    found = step_of(50.0, 50.0 * np.exp(0.5), refractory_us=refractory_us)
    assert [t_us for t_us, _ in found] == pytest.approx(times_us, abs=0)


def test_a_lost_event_leaves_the_memorised_level_where_it_was() -> None:
    """Two crossings, the second lost: 0.3 above the memorised level, so the next small rise fires at once."""
    found = step_of(50.0, 50.0 * np.exp(0.5), 50.0 * np.exp(0.51), refractory_us=500)
    assert [(t_us, p) for t_us, p in found] == [(400, 1), (1000, 1)]


def test_a_noise_event_sets_its_pixel_s_memorised_level_to_the_present_one() -> None:
    """Every pixel is 0.15 above its memorised level and then rises by 0.1, which 0.25 in all would show.

    Of the pixels that noise has hit in between none fires, and of the others every one does.
    """
    simulator = simulator_of(100, 100, shot_noise_hz=200.0)
    flat = np.full((100, 100), 60.0)
    simulator.start(flat, 0)
    between = simulator.step(flat * np.exp(0.15), 5_000)
    hit = np.zeros((100, 100), bool)
    hit[between.y, between.x] = True
    assert 0.1 < hit.mean() < 0.9
    simulator.config = SimulatorConfig(**{**QUIET, "cutoff_hz": 0.0})
    after = simulator.step(flat * np.exp(0.25), 6_000)
    fired = np.zeros((100, 100), bool)
    fired[after.y, after.x] = True
    assert not (fired & hit).any()
    assert fired[~hit].all()


def test_shot_noise_goes_by_each_pixel_s_own_threshold() -> None:
    """Thresholds spread by half of their mean: the rate of a pixel is in inverse proportion to its own."""
    simulator = simulator_of(60, 60, sigma=0.05, shot_noise_hz=20.0)
    flat = np.full((60, 60), 20.0)
    simulator.start(flat, 0)
    counts = np.zeros((2, 3600))
    for n in range(1, 101):
        found = simulator.step(flat, n * 10_000)
        np.add.at(counts, (found.p, found.y.astype(int) * 60 + found.x), 1)
    share = (0.25 - 1) * (20 + 20) / 275 + 1
    for polarity, theta in ((1, simulator._theta_on), (0, simulator._theta_off)):
        expected = 20.0 / 2 * share * 0.2 / theta
        low, high = theta < np.quantile(theta, 0.1), theta > np.quantile(theta, 0.9)
        for group in (low, high):
            noise = float(4 / np.sqrt(expected[group].sum()))
            assert counts[polarity][group].sum() == pytest.approx(expected[group].sum(), rel=noise)
        assert expected[low].mean() > 2 * expected[high].mean(), "the two groups differ by much more than chance"


def test_the_low_pass_moves_by_the_brightness_of_the_pixel() -> None:
    """v2e: share = (grey + 20) / 275 · 2π · cutoff · dt, at most 1; worked for one step of 1 ms at 50 Hz."""
    share = (200.0 + 20.0) / 275.0 * 2 * np.pi * 50.0 * 1e-3
    assert 0.2 < share < 0.3
    simulator = simulator_of(1, 1, cutoff_hz=50.0)
    simulator.start(np.full((1, 1), 20.0), 0)
    found = simulator.step(np.full((1, 1), 200.0), 1000)
    risen = share * (np.log(200.0) - np.log(20.0))
    assert len(found.t_us) == int(risen / 0.2)
    np.testing.assert_allclose(found.t_us, [1000 * 0.2 * (n + 1) / risen for n in range(len(found.t_us))], atol=1)
