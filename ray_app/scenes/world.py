"""World of a drive: place, light, road, roadside; all drawn from its seed, widely.

Places are road coordinates: s = metres along the road, n = metres to the right of its middle. Colours are red,
green, blue, 0 to 255, as they look in full daylight.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ray_app.scenes.drive import Drive, Generator, Road

Rgb = tuple[float, float, float]
Interval = tuple[float, float]
Place = Literal["city", "suburb", "country", "highway"]
Daytime = Literal["day", "dusk", "night"]

CHUNK_M = 40.0
"""Things along the road are drawn up for this length at a time."""
DAYTIMES: dict[Daytime, float] = {"day": 0.56, "dusk": 0.22, "night": 0.22}
"""Share of drives."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Usual ranges of a kind of place: (least, most) of each."""

    share: float
    """Share of drives."""
    lanes: tuple[int, int]
    """Lanes each way."""
    cruise: Interval
    """Usual speed of the ego vehicle in metres per second."""
    halts: float
    """Share of speed changes that are halts."""
    walk_m: Interval
    """Width of the walk."""
    setback_m: Interval
    """From the walk to houses."""
    lowest_m: Interval
    """Height of the lowest building."""
    highest_m: Interval
    """Height of the highest building."""
    gaps: Interval
    """Share of the roadside without a building."""
    trees: Interval
    """Trees for each chunk and side."""
    hedges: Interval
    """Share of the roadside with a hedge, fence or rail."""
    traffic: float
    """Speed of other vehicles in metres per second."""


PLACES: dict[Place, Surroundings] = {
    "city": Surroundings(
        0.40, (1, 2), (6, 13), 0.3, (1.5, 4), (0, 0), (6, 12), (12, 32), (0, 0.3), (0, 2), (0, 0), 10
    ),
    "suburb": Surroundings(
        0.25, (1, 1), (7, 14), 0.15, (1.5, 4), (3, 9), (4, 4), (6, 9), (0.25, 0.7), (0.5, 4), (0, 0.9), 11
    ),
    "country": Surroundings(
        0.20, (1, 1), (11, 22), 0.03, (0, 0), (3, 9), (3, 4), (5, 8), (0.8, 0.97), (0.5, 7), (0, 0.8), 20
    ),
    "highway": Surroundings(
        0.15, (2, 3), (18, 32), 0.0, (0, 0), (3, 9), (3, 3), (6, 25), (0.7, 1), (0, 5), (0.4, 1), 30
    ),
}


@dataclass(frozen=True, slots=True)
class Light:
    """Sky and lighting."""

    sky_top: Rgb
    """Colour high in the picture."""
    sky_low: Rgb
    """Colour at the horizon, and of the haze."""
    cloud: Rgb
    """Colour of clouds."""
    cloudiness: float
    """Opacity of clouds, 0 to 1."""
    haze_m: float
    """Distance at which a thing keeps 37 % of its contrast."""
    ambient: Rgb
    """Factor on every colour."""
    walls: tuple[float, float]
    """Factors on walls left and right of the road: the sun is on one side."""
    shadow: float = 0.0
    """Darkness of shadows across the road, 0 to 1."""
    headlight: float = 0.0
    """Strength of the ego vehicle's headlights."""
    lamp: float = 0.0
    """Strength of street lamps."""
    glow: float = 0.0
    """Strength of lit windows, head and tail lights."""
    sun: float = 0.0
    """Strength of the low sun's glare."""
    sun_angle: float = 0.0
    """Direction of the low sun, in radians to the right of the first heading."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything about a drive that does not change while it lasts."""

    seed: int
    """Seed of everything at and on the road."""
    place: Place
    """Kind of surroundings."""
    daytime: Daytime
    """Kind of light."""
    light: Light
    """Sky and lighting."""
    contrast: float
    """Exponent of the camera's tone curve: above 1, dark grows darker and white stays."""
    focal: float
    """Focal length, in picture widths."""
    camera_m: float
    """Height of the camera above the ground."""
    horizon: float
    """Row of the horizon, in picture heights from the top."""
    lane_m: float
    """Width of a lane."""
    lanes: int
    """Lanes each way."""
    lane: int
    """The lane driven in, counted from the middle."""
    kerb_m: float
    """From the road's middle to its edge."""
    walk_m: float
    """Width of the walk along it, 0 for none."""
    wall_m: float
    """From the road's middle to houses."""
    building_m: Interval
    """Height of the lowest and of the highest building."""
    gaps: float
    """Share of the roadside without a building."""
    trees: float
    """Trees for each chunk and side."""
    parked: float
    """Share of parking places taken."""
    hedge: float
    """Share of the roadside with a hedge, fence or rail."""
    lamp_step_m: float
    """Distance between street lamps."""
    traffic_step_m: float
    """Mean distance between vehicles of a lane."""
    lead: bool
    """A vehicle drives ahead in the same lane."""
    asphalt: Rgb
    """Colour of the road."""
    verge: Rgb
    """Colour of the ground next to the road."""
    walk: Rgb
    """Colour of the walk."""
    grain: tuple[float, float]
    """Contrast of the ground's texture, on the road and next to it."""
    tones: tuple[Rgb, ...]
    """Colours of buildings."""

    @property
    def built(self) -> bool:
        """True in a town: walks, zebra crossings, people on foot."""
        return self.place in ("city", "suburb")


def make_world(seed: int) -> tuple[World, Drive, Road]:
    """Return the world, the speeds and the road of a seed, which must not be negative."""
    rng = np.random.default_rng([seed, 1])
    place = list(PLACES)[rng.choice(len(PLACES), p=[usual.share for usual in PLACES.values()])]
    daytime = list(DAYTIMES)[rng.choice(len(DAYTIMES), p=list(DAYTIMES.values()))]
    usual, u = PLACES[place], rng.uniform
    lanes = int(rng.integers(usual.lanes[0], usual.lanes[1] + 1))
    lane_m = u(3.0, 3.7)
    parking = place == "city" and rng.random() < 0.7
    kerb_m = lanes * lane_m + (2.3 if parking else u(0.3, 0.8))
    walk_m = u(*usual.walk_m)
    cruise = u(*usual.cruise)
    asphalt, paved = u(28, 85), u(60, 140)
    grass = (u(20, 60), u(45, 80), u(15, 40))
    soil = (u(70, 120), u(60, 95), u(45, 75))
    world = World(
        seed=seed,
        place=place,
        daytime=daytime,
        light=make_light(rng, daytime),
        contrast=u(*{"day": (1.5, 2.4), "dusk": (1.5, 2.2), "night": (1.1, 1.6)}[daytime]),
        focal=u(0.68, 0.98),
        camera_m=u(1.2, 1.9),
        horizon=u(0.38, 0.58),
        lane_m=lane_m,
        lanes=lanes,
        lane=int(rng.integers(lanes)),
        kerb_m=kerb_m,
        walk_m=walk_m,
        wall_m=kerb_m + walk_m + u(*usual.setback_m),
        building_m=(u(*usual.lowest_m), u(*usual.highest_m)),
        gaps=u(*usual.gaps),
        trees=u(*usual.trees),
        parked=u(0.2, 0.95) if parking else 0.0,
        hedge=u(*usual.hedges),
        lamp_step_m=u(22, 45),
        traffic_step_m=u(18, 140),
        lead=bool(rng.random() < 0.45),
        asphalt=(asphalt, asphalt, asphalt * u(0.98, 1.08)),
        verge=grass if rng.random() < 0.75 else soil,
        walk=(paved, paved * 0.97, paved * 0.92),
        grain=(u(0.003, 0.014), u(0.04, 0.13)),
        tones=tuple((tone * u(0.9, 1.15), tone, tone * u(0.65, 1.1)) for tone in u(35, 190, 5)),
    )
    return world, Drive(rng, cruise, usual.halts), Road(rng, min(0.35 / cruise, 0.04))


def make_light(rng: Generator, daytime: Daytime) -> Light:
    """Sky and lighting of a daytime, with much room between one drive and the next."""
    u = rng.uniform
    if daytime == "day":
        bright, blue = u(0.84, 1.0), u(0.0, 1.0)
        high = bright * u(0.45, 1.0)
        sides = (u(0.2, 0.45), u(0.9, 1.4))
        return Light(
            sky_top=(high * (245 - 110 * blue), high * (248 - 62 * blue), high * (252 - 8 * blue)),
            sky_low=(bright * (255 - 25 * blue), bright * (255 - 12 * blue), bright * 255),
            cloud=(250.0, 250.0, 250.0),
            cloudiness=u(0.0, 1.0),
            haze_m=u(120, 600),
            ambient=(u(0.62, 1.05),) * 3,
            walls=sides if rng.random() < 0.5 else sides[::-1],
            shadow=u(0.3, 0.5),
        )
    if daytime == "dusk":
        dim, level = u(0.25, 0.5), u(0.6, 1.0)
        return Light(
            sky_top=(level * u(70, 130), level * u(90, 135), level * u(140, 190)),
            sky_low=(level * 255, level * u(170, 225), level * u(110, 190)),
            cloud=(level * u(200, 255), level * u(110, 170), level * u(100, 150)),
            cloudiness=u(0.2, 1.0),
            haze_m=u(90, 350),
            ambient=(1.05 * dim, 0.95 * dim, 0.95 * dim),
            walls=(u(0.4, 1.0), u(0.4, 1.0)),
            headlight=u(0.0, 0.5),
            lamp=u(0.1, 0.5),
            glow=u(0.4, 0.9),
            sun=u(0.0, 1.0),
            sun_angle=u(-0.5, 0.5),
        )
    dim, sky = u(0.035, 0.1), u(6, 70)
    return Light(
        sky_top=(0.6 * sky, 0.7 * sky, sky),
        sky_low=(sky * u(1.2, 2.2), sky * u(1.0, 1.6), 1.2 * sky),
        cloud=(2.0 * sky, 1.6 * sky, 1.4 * sky),
        cloudiness=u(0.0, 1.0),
        haze_m=u(100, 400),
        ambient=(1.1 * dim, dim, 0.95 * dim),
        walls=(1.0, 1.0),
        headlight=u(0.7, 1.5),
        lamp=u(0.4, 1.5),
        glow=u(0.8, 1.3),
    )
