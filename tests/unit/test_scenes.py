"""Scenes: pinhole geometry, exact motion, coverage painting, and pictures that depend on seed and time alone."""

from dataclasses import replace

import numpy as np
import pytest

from ray_app.scenes.drive import Drive, Road
from ray_app.scenes.painting import Air, Camera, Canvas, Upright
from ray_app.scenes.roadside import Board, Wall, roadside, traffic
from ray_app.scenes.scene import Scene
from ray_app.scenes.textures import Pattern, make_patterns, make_sprites, smoothed, sprite
from ray_app.scenes.world import CHUNK_M, make_world

PLAIN = Pattern(np.ones((1, 1, 1), np.float32), None, (1.0, 1.0))
CLEAR = Air((0.0, 0.0, 0.0), 1e9)
CAMERA = Camera(width=64, height=48, focal=50.0, above_m=1.5)
SMALL = {"height": 96, "width": 128}


def grey_canvas(horizon: float = 20.0) -> Canvas:
    return Canvas(CAMERA, horizon, CLEAR, 1)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(3, **SMALL)


# Pictures


def test_a_picture_depends_on_seed_and_time_alone(scene: Scene) -> None:
    fresh = Scene(3, **SMALL)
    later = fresh.grey(7.3)
    for t_s in (0.0, 7.3, 250.0):  # whatever was drawn before
        np.testing.assert_array_equal(scene.grey(t_s), Scene(3, **SMALL).grey(t_s))
    np.testing.assert_array_equal(scene.grey(7.3), later)
    np.testing.assert_array_equal(scene.rgb(1.0), fresh.rgb(1.0))


def test_another_seed_gives_another_drive(scene: Scene) -> None:
    other = Scene(4, **SMALL)
    assert np.abs(scene.grey(1.0) - other.grey(1.0)).mean() > 5.0
    assert scene.speed(1.0) != other.speed(1.0)


@pytest.mark.parametrize("seed", [0, 2, 3, 6])
def test_grey_is_the_luma_of_the_colours(seed: int) -> None:
    scene = Scene(seed, **SMALL)
    rgb, grey = scene.rgb(2.0), scene.grey(2.0)
    assert rgb.shape == (96, 128, 3)
    assert rgb.dtype == np.uint8
    assert grey.shape == (96, 128)
    assert grey.dtype == np.float32
    unclipped = (rgb.max(2) < 255) & (rgb.min(2) > 0)
    assert unclipped.mean() > 0.2
    np.testing.assert_allclose(
        (rgb @ np.array([0.299, 0.587, 0.114]))[unclipped], grey[unclipped], atol=0.51, rtol=0.03
    )


@pytest.mark.parametrize("seed", range(8))
def test_pictures_stay_in_range_and_are_not_blank(seed: int) -> None:
    scene = Scene(seed, 48, 64)
    for t_s in (0.0, 3.0, 30.0):
        grey = scene.grey(t_s)
        assert np.isfinite(grey).all()
        assert grey.min() >= 0.0
        assert grey.max() <= 255.0
        assert grey.std() > 2.0


def test_a_picture_changes_little_in_a_millisecond_and_more_in_five() -> None:
    for seed in (0, 5, 9):
        scene = Scene(seed, **SMALL)
        moving_s = next(t for t in np.arange(0.5, 60.0) if scene.speed(t) > 5.0)
        frame = scene.grey(moving_s)
        one, five = (np.abs(scene.grey(moving_s + dt) - frame).mean() for dt in (0.001, 0.005))
        assert 0.0 < one < 0.6 * five


def test_nothing_but_traffic_and_light_changes_while_standing() -> None:
    for seed in range(40):
        _, drive, _ = make_world(seed)
        if halts := [halt for halt in drive.halts_near(20.0) if halt.end_s - halt.begin_s > 2.0]:
            break
    scene = Scene(seed, **SMALL)
    middle = (halts[0].begin_s + halts[0].end_s) / 2
    assert scene.speed(middle) == 0.0
    change = np.abs(scene.grey(middle + 0.05) - scene.grey(middle))
    assert (change > 1.0).mean() < 0.3
    assert np.median(change) < 0.01


# Variety


def test_places_and_daytimes_all_occur() -> None:
    worlds = [make_world(seed)[0] for seed in range(80)]
    assert {world.place for world in worlds} == {"city", "suburb", "country", "highway"}
    shares = {day: np.mean([world.daytime == day for world in worlds]) for day in ("day", "dusk", "night")}
    assert shares["day"] > 0.4
    assert min(shares.values()) > 0.1


def test_turns_and_halts_occur_within_ten_seconds() -> None:
    turned, halted = 0, 0
    for seed in range(60):
        _, drive, road = make_world(seed)
        times = np.arange(0.0, 10.0, 0.5)
        headings = [road.heading(drive.at(t)[0]) for t in times]
        turned += np.ptp(headings) > np.pi / 6
        halted += min(drive.at(t)[1] for t in times) == 0.0
    assert turned >= 6
    assert halted >= 6


def test_night_is_darker_than_day() -> None:
    greys: dict[str, list[float]] = {"day": [], "night": []}
    for seed in range(30):
        daytime = make_world(seed)[0].daytime
        if daytime in greys and len(greys[daytime]) < 4:
            greys[daytime].append(float(Scene(seed, 48, 64).grey(1.0).mean()))
    assert max(greys["night"]) < min(greys["day"]) + 20.0
    assert np.mean(greys["night"]) < 0.6 * np.mean(greys["day"])


# Motion


@pytest.mark.parametrize("seed", range(5))
def test_distance_is_the_integral_of_speed(seed: int) -> None:
    drive = Drive(np.random.default_rng(seed), 10.0, 0.3)
    times = np.linspace(0.0, 700.0, 70_001)  # twice around
    s, v = np.array([drive.at(t) for t in times]).T
    integral = np.concatenate([[0.0], np.cumsum((v[1:] + v[:-1]) / 2 * np.diff(times))])
    np.testing.assert_allclose(s, integral, atol=0.02)
    assert (np.diff(s) >= -1e-9).all()
    assert v.min() == 0.0
    assert np.abs(np.diff(v)).max() < 0.2  # no jumps: at most 20 m/s² in 10 ms


def test_a_halt_is_where_and_when_the_vehicle_waits() -> None:
    drive = Drive(np.random.default_rng(0), 10.0, 0.5)
    for now in (0.0, 100.0, 500.0):
        for halt in drive.halts_near(now):
            s, v = drive.at((halt.begin_s + halt.end_s) / 2)
            assert v == 0.0
            assert s == pytest.approx(halt.s)


@pytest.mark.parametrize("s", [0.0, 500.0, 2990.0, 7000.0])
def test_a_bend_is_the_integral_of_the_heading(s: float) -> None:
    road = Road(np.random.default_rng(1), 0.03)
    ahead = np.arange(0.0, 100.0, 0.1)
    turned = np.array([road.heading(s + d) for d in ahead]) - road.heading(s)
    aside = np.concatenate([[0.0], np.cumsum((turned[1:] + turned[:-1]) / 2 * 0.1)])
    at = [20, 50, 99]
    np.testing.assert_allclose(road.bend(s)[at], np.interp(at, ahead, aside), atol=0.05)


def test_what_is_next_to_the_road_stays_where_it_is() -> None:
    world, _, _ = make_world(5)
    assert roadside(world, 7) == roadside(world, 7)
    for thing in roadside(world, 7):
        s = thing.s0 if isinstance(thing, Wall) else thing.s
        assert 7 * CHUNK_M - 1 <= s <= 8 * CHUNK_M + 10


def test_vehicles_move_steadily() -> None:
    world, drive, _ = make_world(next(s for s in range(50) if make_world(s)[0].place == "highway"))
    world = replace(world, lead=False)
    before, after = (
        {
            (b.n, b.colour, b.sprite): b.s
            for b in traffic(world, drive, t)
            if isinstance(b, Board) and b.sprite[:3] == "car"
        }
        for t in (5.0, 5.01)
    )
    moved = [after[key] - before[key] for key in before.keys() & after.keys()]
    assert moved
    assert 0.1 < max(abs(m) for m in moved) < 0.5  # 10 to 50 m/s


# Painting


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_a_rectangle_gives_the_light_of_its_area_wherever_it_is(shift: float) -> None:
    canvas = grey_canvas()
    canvas.rectangle((10.0 + shift, 13.5 + shift), (5.0 + shift, 6.25 + shift), (100.0, 100.0, 100.0))
    assert canvas.image_CHW.sum() == pytest.approx(100.0 * 3.5 * 1.25, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.37, 0.5])
def test_a_sprite_gives_the_same_light_wherever_it_is(shift: float) -> None:
    y, x = np.mgrid[0:64, 0:64]
    disc = sprite((np.hypot(x - 31.5, y - 31.5) < 28).astype(float), np.ones((64, 64)))
    canvas = grey_canvas()
    canvas.sprite(disc, (10.0 + shift, 26.0 + shift), (8.0 + shift, 24.0 + shift), (50.0,) * 3, (0.0,) * 3)
    assert canvas.image_CHW.sum() == pytest.approx(50.0 * np.pi * (28 / 64 * 16) ** 2, rel=0.02)


def test_a_wall_is_where_a_pinhole_sees_it() -> None:
    canvas = grey_canvas()
    near, far, n, top = 5.0, 25.0, 2.0, 1.2
    x = tuple(CAMERA.width / 2 + CAMERA.focal * n / d for d in (far, near))
    upright = Upright(x, (far, near), (20.0, 0.0), (1.0, 1.0), 0.3, top)
    canvas.wall(PLAIN, upright, (100.0,) * 3, (0.0,) * 3)
    image = canvas.image_CHW[0] / 100
    for column in (38, 42, 46, 50):
        distance = CAMERA.focal * n / (column + 0.5 - CAMERA.width / 2)
        high = 20.0 + CAMERA.focal * (1.5 - top) / distance
        low = 20.0 + CAMERA.focal * (1.5 - 0.3) / distance
        lit = image[:, column]
        assert lit.sum() == pytest.approx(low - high, abs=0.02)
        assert (lit * (np.arange(48) + 0.5)).sum() / lit.sum() == pytest.approx((high + low) / 2, abs=0.1)
    assert image[:, :35].sum() == 0.0


def test_a_pattern_on_a_wall_is_seen_in_perspective() -> None:
    """A white band from 9 m to 11 m along a wall: its columns are those of the pinhole."""
    shade = np.zeros((1, 1, 1024), np.float32)
    shade[0, 0, int(9 / 32 * 1024) : int(11 / 32 * 1024)] = 1.0
    canvas = grey_canvas()
    near, length, n = 4.0, 30.0, 2.0
    x = tuple(CAMERA.width / 2 + CAMERA.focal * n / d for d in (near + length, near))
    upright = Upright(x, (near + length, near), (length, 0.0), (1.0, 1.0), 0.0, 3.0)
    canvas.wall(Pattern(shade, None, (1.0, 32.0)), upright, (100.0,) * 3, (0.0,) * 3)
    seen = canvas.image_CHW[0, 20] > 50
    expected = [CAMERA.width / 2 + CAMERA.focal * n / (near + along) for along in (11.0, 9.0)]
    middles = np.flatnonzero(seen) + 0.5
    assert middles.min() == pytest.approx(expected[0], abs=1.0)
    assert middles.max() == pytest.approx(expected[1], abs=1.0)


def test_painting_outside_the_picture_changes_nothing() -> None:
    canvas = grey_canvas()
    for x, y in (((-9.0, -1.0), (1.0, 5.0)), ((70.0, 80.0), (1.0, 5.0)), ((1.0, 5.0), (48.0, 60.0))):
        canvas.rectangle(x, y, (9.0,) * 3)
        canvas.halo(x, y, (9.0,) * 3)
    assert not canvas.image_CHW.any()


def test_smoothing_keeps_the_mean_and_lessens_the_contrast() -> None:
    field = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    same, soft, softer = smoothed(field, [(0.0, 0.0), (1.0, 1.0), (4.0, 0.0)])
    np.testing.assert_allclose(same, field, atol=1e-5)
    assert soft.mean() == pytest.approx(field.mean(), abs=1e-6)
    assert soft.std() < 0.5 * field.std()
    np.testing.assert_allclose(softer.mean(0), field.mean(0), atol=1e-5)


def test_every_name_that_a_thing_bears_has_its_picture() -> None:
    rng = np.random.default_rng(0)
    patterns, sprites = make_patterns(rng), {*make_sprites(rng), "plain", "shade", "halo"}
    for seed in range(25):
        world, drive, _ = make_world(seed)
        for thing in [*roadside(world, 1), *(t for s in (2.0, 9.0, 15.0) for t in traffic(world, drive, s))]:
            assert thing.pattern in patterns if isinstance(thing, Wall) else thing.sprite in sprites
