"""Things at the roadside and things that move on the road, as walls and boards.

Both are functions of the world's seed and of a place or a time: what is drawn does not depend on where a drive
was entered.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ray_app.scenes.drive import VIEW_M, Drive, Generator, Halt
from ray_app.scenes.world import CHUNK_M, PLACES, Rgb, World


@dataclass(frozen=True, slots=True)
class Wall:
    """An upright rectangle from (s0, n0) to (s1, n1), s0 <= s1."""

    s0: float
    """Metres along the road of its near end."""
    n0: float
    """Metres to the right of the road's middle of its near end."""
    s1: float
    """Metres along the road of its far end."""
    n1: float
    """Metres to the right of the road's middle of its far end."""
    bottom_m: float
    """Height of its foot above the ground."""
    top_m: float
    """Height of its top above the ground."""
    pattern: str
    """Name of a pattern."""
    colour: Rgb
    """Colour in full daylight."""
    lit: bool = False
    """Some of its windows are lit at night."""


@dataclass(frozen=True, slots=True)
class Board:
    """An upright rectangle that faces the camera."""

    s: float
    """Metres along the road."""
    n: float
    """Metres from the road's middle to its own, to the right."""
    width_m: float
    """Width."""
    height_m: float
    """Height."""
    bottom_m: float
    """Height of its foot above the ground."""
    sprite: str
    """Name of a sprite; or `plain`: one colour; `shade`: darkens what is behind it; `halo`: adds light alone."""
    colour: Rgb
    """Colour in full daylight."""
    glow: Rgb = (0.0, 0.0, 0.0)
    """Light given off by its glowing parts, or by all of a plain board."""


Thing = Wall | Board

BLACK: Rgb = (0.0, 0.0, 0.0)
HEADLIGHT: Rgb = (255.0, 245.0, 225.0)
TAIL_LIGHT: Rgb = (200.0, 20.0, 15.0)
TAIL_HALO: Rgb = (80.0, 8.0, 6.0)
LAMP: Rgb = (255.0, 225.0, 165.0)
CAR_M = 4.5
"""Length of a car."""
PAINTS: tuple[Rgb, ...] = (
    (225, 225, 225), (20, 20, 24), (110, 112, 118), (165, 168, 172), (140, 20, 20), (25, 45, 110),
    (60, 70, 60), (200, 170, 60),
)  # fmt: skip
CLOTHES: tuple[Rgb, ...] = ((20, 20, 30), (150, 40, 40), (40, 60, 120), (200, 200, 190), (90, 80, 60))

SIGNS: tuple[Rgb, ...] = ((215, 215, 215), (170, 25, 25), (30, 60, 150))


def roadside(world: World, chunk: int) -> list[Thing]:
    """Everything on both sides of [chunk, chunk + 1) * `CHUNK_M` metres of road."""
    rng = np.random.default_rng([world.seed, 2, chunk + 1])
    start = chunk * CHUNK_M
    things: list[Thing] = []
    for side in (-1, 1):
        things += _buildings(world, rng, start, side)
        things += _edge(world, rng, start, side)
        things += _trees(world, rng, start, side)
        things += _parked(world, rng, start, side)
        things += _people(world, rng, start, side)
    things += _posts(world, rng, start)
    return things


def _buildings(world: World, rng: Generator, start: float, side: int) -> Iterator[Thing]:
    at, end = start, start + CHUNK_M
    while at < end - 1.0:
        length = rng.uniform(7.0, 24.0) if end - at > 12.0 else end - at
        length = min(length, end - at)
        if rng.random() >= world.gaps:
            n = side * (world.wall_m + rng.uniform(0.0, 1.2 if world.place == "city" else 14.0))
            top = rng.uniform(*world.building_m)
            colour, pattern = _any(rng, world.tones), f"facade{rng.integers(3)}"
            yard = 0.0 if world.place == "city" else min(rng.uniform(1.0, 4.0), length / 4)
            s0, s1 = at + yard, at + length - yard + (0.3 if yard == 0.0 else 0.0)
            yield Wall(s0, n, s1, n, 0.0, top, pattern, colour, True)
            yield Wall(s0, n, s0, n + side * 12.0, 0.0, top, pattern, colour, True)
        at += length


def _people(world: World, rng: Generator, start: float, side: int) -> Iterator[Thing]:
    for _ in range(rng.poisson({"city": 1.5, "suburb": 0.4}.get(world.place, 0.0))):
        at, n = start + rng.uniform(0, CHUNK_M), side * (world.kerb_m + rng.uniform(0.4, world.walk_m))
        yield Board(at, n, 0.85, rng.uniform(1.5, 1.9), 0.0, "walker", _any(rng, CLOTHES))


def _edge(world: World, rng: Generator, start: float, side: int) -> Iterator[Thing]:
    """Hedge, fence, rail or noise barrier along the whole stretch."""
    if rng.random() >= world.hedge:
        return
    s0, s1 = start, start + CHUNK_M + 0.3
    if world.place == "highway":
        n = side * (world.kerb_m + 1.0)
        grey = (150.0, 152.0, 155.0)
        yield Wall(s0, n, s1, n, 0.45, 0.78, "plain", grey)
        for i in range(0, int(CHUNK_M), 4):
            yield Board(start + i, n, 0.14, 0.75, 0.0, "plain", (90.0, 90.0, 92.0))
        if rng.random() < 0.35:
            n, tone = side * (world.kerb_m + 4.0), rng.uniform(40, 150)
            yield Wall(s0, n, s1, n, 0.0, rng.uniform(2.5, 4.5), "fence", (tone, tone, tone * 0.9))
        return
    n = side * (world.kerb_m + world.walk_m + 0.4)
    if rng.random() < 0.6:
        yield Wall(s0, n, s1, n, 0.0, rng.uniform(0.8, 2.2), "hedge", (45.0, 65.0, 32.0))
    else:
        tone = rng.uniform(60, 190)
        yield Wall(s0, n, s1, n, 0.0, rng.uniform(0.8, 1.8), "fence", (tone, tone * 0.9, tone * 0.78))


def _trees(world: World, rng: Generator, start: float, side: int) -> Iterator[Thing]:
    for _ in range(rng.poisson(world.trees)):
        near = world.kerb_m + (0.8 if world.place == "city" else 1.5)
        n = side * (near + (0.0 if world.place == "city" else rng.exponential(5.0)))
        height = rng.uniform(5.0, 12.0)
        green = rng.uniform(0.7, 1.3)
        colour = (42 * green * rng.uniform(0.7, 1.4), 62 * green, 30 * green)
        at = start + rng.uniform(0, CHUNK_M)
        yield Board(at, n, height * rng.uniform(0.6, 0.9), height, 0.0, f"tree{rng.integers(3)}", colour)


def _parked(world: World, rng: Generator, start: float, side: int) -> Iterator[Thing]:
    for place in range(6):
        if rng.random() < world.parked:
            s, paint = start + place * CHUNK_M / 6 + rng.uniform(0, 1.5), _any(rng, PAINTS)
            yield from vehicle(s, side * (world.kerb_m - 1.15), paint, side < 0, rng.random() < 0.2, parked=True)


def _posts(world: World, rng: Generator, start: float) -> Iterator[Thing]:
    """Street lamps at their regular distance, and road signs."""
    first = int(np.ceil(start / world.lamp_step_m))
    for k in range(first, int(np.ceil((start + CHUNK_M) / world.lamp_step_m))):
        if world.place == "country":
            break
        at, side = k * world.lamp_step_m, 1 if k % 2 else -1
        n, grey = side * (world.kerb_m + 0.5), (70.0, 72.0, 74.0)
        yield Board(at, n, 0.18, 7.5, 0.0, "plain", grey)
        yield Board(at, n - side * 0.9, 1.9, 0.12, 7.4, "plain", grey)
        yield Board(at, n - side * 1.7, 0.8, 0.22, 7.25, "plain", grey, LAMP)
        yield Board(at, n - side * 1.7, 3.2, 3.2, 5.8, "halo", BLACK, LAMP)
    for _ in range(rng.poisson(0.6)):
        at, n = start + rng.uniform(0, CHUNK_M), world.kerb_m + 0.7
        yield Board(at, n, 0.08, 2.9, 0.0, "plain", (120.0, 120.0, 120.0))
        yield Board(at - 0.05, n, 0.7, 0.7, 2.2, "plain", _any(rng, SIGNS))


def vehicle(s: float, n: float, paint: Rgb, towards_us: bool, tall: bool, *, parked: bool = False) -> Iterator[Thing]:
    """Return a car or van with its near end at `s`: the end that is seen, its flank towards the middle, lights."""
    width, height = (2.1, 2.5) if tall else (1.85, 1.5)
    inner = n - np.sign(n) * width / 2
    kind, glow = "van" if tall else "car", HEADLIGHT if towards_us else TAIL_LIGHT
    yield Wall(s, inner, s + CAR_M, inner, 0.05, 0.97 * height, f"{kind}_side", paint)
    yield Board(s + CAR_M, n, 1.1 * width, 0.35, -0.1, "shade", BLACK)
    yield Board(s, n, width, height, 0.0, kind + ("_front" if towards_us else "_rear"), paint, glow)
    if not parked:
        size, halo = (1.5, HEADLIGHT) if towards_us else (0.6, TAIL_HALO)
        low = height * (0.33 if tall else 0.45) - size / 2
        for off in (-0.36 * width, 0.36 * width):
            yield Board(s - 0.01, n + off, size, size, low, "halo", BLACK, halo)


def traffic(world: World, drive: Drive, t_s: float) -> Iterator[Thing]:
    """All vehicles on the move at time `t_s`, in the place where they are then."""
    s, v = drive.at(t_s)
    lane_m = world.lane_m
    cruise = PLACES[world.place].traffic
    for lane in range(world.lanes):
        n, speed = -lane_m * (lane + 0.5), cruise * (1.0 - 0.08 * lane)
        for place, paint, tall in _stream(world, 3 + 2 * lane, s + speed * t_s):
            yield from vehicle(place - speed * t_s, n, paint, True, tall)
    for lane in range(world.lanes):
        if lane != world.lane:
            n, speed = lane_m * (lane + 0.5), cruise * (1.1 - 0.1 * lane)
            for place, paint, tall in _stream(world, 4 + 2 * lane, s - speed * t_s):
                yield from vehicle(place + speed * t_s, n, paint, False, tall)
    rng = np.random.default_rng([world.seed, 20])
    paint, tall, phase = _any(rng, PAINTS), rng.random() < 0.3, rng.uniform(0, 6)
    if world.lead:
        gap = 7.5 + rng.uniform(0.8, 1.6) * v + 1.5 * np.sin(0.03 * s + phase)
        yield from vehicle(s + gap, lane_m * (world.lane + 0.5), paint, False, tall)
    for halt in drive.halts_near(t_s):
        yield from _crossing(world, t_s, halt, halt.s + (16.0 if world.lead else 8.0))


def _stream(world: World, tag: int, s: float) -> Iterator[tuple[float, Rgb, bool]]:
    """(place, paint, tall) of the vehicles of one lane that are in view from `s`, places in their own frame."""
    step = world.traffic_step_m
    for k in range(int(np.floor(s / step)), int(np.floor((s + VIEW_M) / step)) + 1):
        rng = np.random.default_rng([world.seed, tag, k % 2**32])
        slack = max(step - 9.0, 0.0)
        yield k * step + rng.uniform(0, slack), _any(rng, PAINTS), rng.random() < 0.25


def _crossing(world: World, t_s: float, halt: Halt, s: float) -> Iterator[Thing]:
    """Vehicles and people that cross ahead while the ego vehicle waits, and the traffic light at which it waits."""
    rng = np.random.default_rng([world.seed, 21, int(halt.begin_s)])
    red = halt.begin_s - 4.0 < t_s < halt.end_s - 0.4
    n = world.kerb_m + 0.4
    yield Board(s - 4.0, n, 0.12, 2.6, 0.0, "plain", (60.0, 62.0, 60.0))
    yield Board(s - 4.0, n, 0.34, 0.95, 2.5, "plain", (25.0, 25.0, 25.0))
    glow = (255.0, 40.0, 30.0) if red else (40.0, 255.0, 120.0)
    yield Board(s - 4.01, n, 0.22, 0.22, 3.15 if red else 2.6, "plain", glow, glow)
    for sprite, width_m, height_m, wide_m, slowest, fastest, number in (
        ("crossing_car", 4.4, 1.5, 40.0, 5.0, 11.0, 4),
        ("walker", 0.85, 1.75, world.kerb_m + 1.5, 1.0, 1.7, 3),
    ):
        for i in range(number):
            way, speed = rng.choice([-1, 1]), rng.uniform(slowest, fastest)
            aside = way * speed * (t_s - rng.uniform(halt.begin_s + 0.5, halt.end_s - 0.5))
            colour = _any(rng, PAINTS if sprite == "crossing_car" else CLOTHES)
            if abs(aside) < wide_m:
                at = s + 2.0 * way + 0.2 * i if sprite == "crossing_car" else s - 2.5 - 0.2 * i
                yield Board(at, aside, width_m, height_m, 0.0, sprite, colour, TAIL_LIGHT)


def _any(rng: Generator, colours: tuple[Rgb, ...]) -> Rgb:
    return colours[rng.integers(len(colours))]
