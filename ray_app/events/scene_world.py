"""What a drive is made of: a road that bends, a speed that changes, light, and what stands and moves beside it.

Places are road coordinates: s = metres along the road, n = metres to the right of its middle. Every value is a
function of the seed. Colours are red, green, blue, 0 to 255, as they look in full daylight.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[float, float, float]
Floats = NDArray[np.float64]
Generator = np.random.Generator

Place = Literal["city", "suburb", "country", "highway"]
Daytime = Literal["day", "dusk", "night"]

VIEW_M = 140.0
"""How far things are drawn."""
CHUNK_M = 40.0
"""Things along the road are drawn up for this length at a time."""
DRIVE_S = 300.0
"""Speeds repeat after about this time, bends after `ROAD_M`; what stands beside the road never does."""
ROAD_M = 3000.0


@dataclass(frozen=True, slots=True)
class Wall:
    """An upright rectangle from (s0, n0) to (s1, n1)."""

    s0: float
    n0: float
    s1: float
    n1: float
    bottom: float
    top: float
    pattern: str
    colour: Rgb
    glow: float = 0.0
    """Strength of its lit windows at night."""


@dataclass(frozen=True, slots=True)
class Board:
    """An upright rectangle that faces the camera, `n` in its middle."""

    s: float
    n: float
    width: float
    height: float
    bottom: float
    sprite: str
    """Name of a sprite; `plain`: one colour; `halo`: added light without an edge."""
    colour: Rgb
    glow: Rgb = (0.0, 0.0, 0.0)
    """Light given off, whatever the daytime."""


@dataclass(frozen=True, slots=True)
class Light:
    """Sky and lighting of one daytime."""

    sky_top: Rgb
    sky_low: Rgb
    cloud: Rgb
    cloudiness: float
    haze_m: float
    """Distance at which a thing keeps 37 % of its contrast."""
    ambient: Rgb
    """Factor on every colour."""
    left: float
    """Factor on walls left of the road, and `right` on those right of it: the sun is on one side."""
    right: float
    shadow: float
    """Darkness of shadows across the road."""
    headlight: float
    lamp: float
    """Strength of street lamps."""
    glow: float
    """Strength of lit windows, head and tail lights."""
    sun: float
    """Strength of the low sun's glare."""
    sun_angle: float
    """Where the sun stands, in radians from the first heading."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything about a drive that does not change while it lasts."""

    seed: int
    place: Place
    daytime: Daytime
    light: Light
    focal: float
    """Focal length, in picture widths."""
    camera_m: float
    horizon: float
    """Height of the horizon, in picture heights from the top."""
    lane_m: float
    lanes: int
    """Lanes each way."""
    lane: int
    """The lane driven in, counted from the middle."""
    kerb_m: float
    """From the road's middle to its edge."""
    wall_m: float
    """From the road's middle to houses."""
    building_m: tuple[float, float]
    """Lowest and highest building."""
    gaps: float
    """Share of the roadside without a building."""
    trees: float
    """Trees for each 40 m and side."""
    parked: float
    """Share of parking places taken."""
    hedge: float
    """Share of the roadside with a hedge, fence or rail."""
    lamp_step_m: float
    traffic_step_m: float
    """Mean distance between oncoming vehicles."""
    lead: bool
    """A vehicle drives ahead."""
    asphalt: Rgb
    verge: Rgb
    walk: Rgb
    walk_m: float
    grain: tuple[float, float]
    """Contrast of the ground's texture, on the road and beside it."""
    tones: tuple[Rgb, ...]
    """Colours of buildings."""
    contrast: float
    """Exponent of the camera's tone curve: above 1, dark grows darker and white stays."""


    @property
    def built(self) -> bool:
        """In a town: walks, houses, people on foot."""
        return self.place in ("city", "suburb")


@dataclass(frozen=True, slots=True)
class Halt:
    """The ego vehicle stands."""

    begin_s: float
    """First second of standing."""
    end_s: float
    """Last second of standing."""
    s: float
    """Where."""


class Drive:
    """Speed of the ego vehicle: straight pieces between knots; distance is their exact integral."""

    def __init__(self, rng: Generator, cruise: float, stop_share: float) -> None:
        v_first = cruise * rng.uniform(0.8, 1.1)
        times, speeds, v = [0.0], [v_first], v_first
        while times[-1] < DRIVE_S:
            if rng.random() < stop_share:
                then = cruise * rng.uniform(0.6, 1.2)
                phases = [(v / 3.0, 0.0), (rng.uniform(1.5, 5.0), 0.0), (then / 2.2, then)]
            else:
                then = cruise * rng.uniform(0.55, 1.3)
                phases = [(rng.uniform(1.5, 3.5), then), (rng.uniform(1.0, 6.0), then)]
            for length, v in phases:
                times.append(times[-1] + length)
                speeds.append(v)
        times.append(times[-1] + 2.0)
        speeds.append(v_first)
        self._t = np.array(times)
        self._v = np.array(speeds)
        self._s = np.concatenate([[0.0], np.cumsum(np.diff(self._t) * (self._v[1:] + self._v[:-1]) / 2)])
        standing = np.flatnonzero((self._v[:-1] == 0.0) & (self._v[1:] == 0.0))
        self._halts = [Halt(*map(float, (self._t[i], self._t[i + 1], self._s[i]))) for i in standing]

    def at(self, t_s: float) -> tuple[float, float]:
        """Distance driven in metres and speed in metres per second."""
        rounds, t = divmod(t_s, self._t[-1])
        i = min(int(np.searchsorted(self._t, t, side="right")) - 1, len(self._t) - 2)
        since = t - self._t[i]
        rate = (self._v[i + 1] - self._v[i]) / (self._t[i + 1] - self._t[i])
        v = self._v[i] + rate * since
        return float(rounds * self._s[-1] + self._s[i] + (self._v[i] + v) / 2 * since), float(v)

    def halts_near(self, t_s: float) -> list[Halt]:
        """Halts that begin between 15 s before `t_s` and 30 s after it."""
        now, period_s, period_m = t_s // self._t[-1], float(self._t[-1]), float(self._s[-1])
        shifted = [
            Halt(h.begin_s + k * period_s, h.end_s + k * period_s, h.s + k * period_m)
            for k in (now - 1, now, now + 1)
            if k >= 0
            for h in self._halts
        ]
        return [h for h in shifted if -15.0 < h.begin_s - t_s < 30.0]


class Road:
    """Curvature along the road, and what it does to the view. Bends are small-angle, as a chart unrolled."""

    GRID_M = np.arange(0.0, VIEW_M + 41.0)

    def __init__(self, rng: Generator, most: float) -> None:
        at, bends = [0.0], [0.0]
        while at[-1] < ROAD_M - 300:
            kappa = float(rng.choice([-1, 1]) * most * rng.uniform(0.25, 1.0))
            ramp = rng.uniform(6.0, 16.0)
            hold = min(rng.uniform(0.15, 1.2) / abs(kappa), 250.0)
            for length, value in ((rng.uniform(10.0, 110.0), 0.0), (ramp, kappa), (hold, kappa), (ramp, 0.0)):
                at.append(at[-1] + length)
                bends.append(value)
        fine = np.arange(0.0, ROAD_M + VIEW_M + 80.0, 0.5)
        kappa_fine = np.interp(fine % ROAD_M, [*at, ROAD_M], [*bends, 0.0])
        self._fine = fine
        self._heading = np.concatenate([[0.0], np.cumsum((kappa_fine[1:] + kappa_fine[:-1]) / 4)])
        self._aside = np.concatenate([[0.0], np.cumsum((self._heading[1:] + self._heading[:-1]) / 4)])

    def heading(self, s: float) -> float:
        """Radians turned to the right since s = 0."""
        rounds, rest = divmod(s, ROAD_M)
        turned = np.interp([ROAD_M, rest], self._fine, self._heading)
        return float(rounds * turned[0] + turned[1])

    def bend(self, s: float) -> Floats:
        """How far the road's middle lies to the right, in metres, at each distance of `GRID_M` from `s`."""
        rest = s % ROAD_M
        ahead = np.interp(rest + self.GRID_M, self._fine, self._aside)
        return ahead - ahead[0] - np.interp(rest, self._fine, self._heading) * self.GRID_M


def make_light(rng: Generator, daytime: Daytime) -> Light:
    """Sky and lighting of a daytime, with much room between one drive and the next."""
    u = rng.uniform
    sunny_left = rng.random() < 0.5
    if daytime == "day":
        bright = u(0.84, 1.0)
        blue = u(0.0, 1.0)
        shade, lit = u(0.2, 0.45), u(0.9, 1.4)
        low = (bright * (255 - 25 * blue), bright * (255 - 12 * blue), bright * 255)
        high = bright * u(0.45, 1.0)
        top = (high * (245 - 110 * blue), high * (248 - 62 * blue), high * (252 - 8 * blue))
        ambient = u(0.62, 1.05)
        return Light(
            top, low, (250, 250, 250), u(0.0, 1.0), u(120, 600), (ambient,) * 3,
            lit if sunny_left else shade, shade if sunny_left else lit,
            u(0.3, 0.5), 0.0, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip
    if daytime == "dusk":
        dim = u(0.25, 0.5)
        level = u(0.6, 1.0)
        return Light(
            (level * u(70, 130), level * u(90, 135), level * u(140, 190)),
            (level * 255, level * u(170, 225), level * u(110, 190)),
            (level * u(200, 255), level * u(110, 170), level * u(100, 150)),
            u(0.2, 1.0), u(90, 350), (dim * 1.05, dim * 0.95, dim * 0.95),
            u(0.4, 1.0), u(0.4, 1.0), 0.0, u(0.0, 0.5), u(0.1, 0.5), u(0.4, 0.9),
            u(0.0, 1.0), u(-0.5, 0.5),
        )  # fmt: skip
    dim = u(0.035, 0.1)
    sky = u(2, 34)
    return Light(
        (sky * 0.6, sky * 0.7, sky), (sky * u(1.2, 2.2), sky * u(1.0, 1.6), sky * 1.2),
        (sky * 2, sky * 1.6, sky * 1.4), u(0.0, 1.0), u(100, 400), (dim * 1.1, dim, dim * 0.95),
        1.0, 1.0, 0.0, u(0.7, 1.5), u(0.4, 1.5), u(0.8, 1.3), 0.0, 0.0,
    )  # fmt: skip


def make_world(seed: int) -> tuple[World, Drive, Road]:
    """The world, the speeds and the road of a seed."""
    rng = np.random.default_rng([seed, 1])
    u = rng.uniform
    place: Place = rng.choice(["city", "suburb", "country", "highway"], p=[0.4, 0.25, 0.2, 0.15])
    daytime: Daytime = rng.choice(["day", "dusk", "night"], p=[0.55, 0.2, 0.25])
    lanes = int(rng.choice([2, 3]) if place == "highway" else rng.choice([1, 2]) if place == "city" else 1)
    lane_m = u(3.0, 3.7)
    parking = place == "city" and rng.random() < 0.7
    kerb_m = lanes * lane_m + (2.3 if parking else u(0.3, 0.8))
    walk_m = u(1.5, 4.0) if place in ("city", "suburb") else 0.0
    cruise = {"city": u(6, 13), "suburb": u(7, 14), "country": u(11, 22), "highway": u(18, 32)}[place]
    stop_share = {"city": 0.3, "suburb": 0.15, "country": 0.03, "highway": 0.0}[place]
    asphalt = u(28, 85)
    green = rng.random() < 0.75
    verge = (u(20, 60), u(45, 80), u(15, 40)) if green else (u(70, 120), u(60, 95), u(45, 75))
    paved = u(60, 140)
    tones = tuple((tone * u(0.9, 1.15), tone, tone * u(0.65, 1.1)) for tone in u(35, 190, 5))
    world = World(
        seed=seed,
        place=place,
        daytime=daytime,
        light=make_light(rng, daytime),
        focal=u(0.68, 0.98),
        camera_m=u(1.2, 1.9),
        horizon=u(0.36, 0.6),
        lane_m=lane_m,
        lanes=lanes,
        lane=int(rng.integers(lanes)),
        kerb_m=kerb_m,
        wall_m=kerb_m + walk_m + (0.0 if place == "city" else u(3, 9)),
        building_m={
            "city": (u(6, 12), u(12, 32)),
            "suburb": (4.0, u(6, 9)),
            "country": (3.5, 7.0),
            "highway": (3.0, u(6, 25)),
        }[place],
        gaps={"city": u(0.0, 0.3), "suburb": u(0.25, 0.7), "country": u(0.8, 0.97), "highway": u(0.7, 1.0)}[place],
        trees={"city": u(0, 2), "suburb": u(0.5, 4), "country": u(0.5, 7), "highway": u(0, 5)}[place],
        parked=u(0.2, 0.95) if parking else 0.0,
        hedge={"city": 0.0, "suburb": u(0, 0.9), "country": u(0, 0.8), "highway": u(0.4, 1.0)}[place],
        lamp_step_m=u(22, 45),
        traffic_step_m=u(18, 140),
        lead=bool(rng.random() < 0.45),
        asphalt=(asphalt, asphalt, asphalt * u(0.98, 1.08)),
        verge=verge,
        walk=(paved, paved * 0.97, paved * 0.92),
        walk_m=walk_m,
        grain=(u(0.003, 0.014), u(0.04, 0.13)),
        tones=tones,
        contrast=u(*{"day": (1.6, 2.6), "dusk": (1.6, 2.3), "night": (1.0, 1.5)}[daytime]),
    )  # fmt: skip
    return world, Drive(rng, cruise, stop_share), Road(rng, min(0.35 / cruise, 0.04))
