"""True facts about a picture of a scene, from its geometry: what is in view, large enough, and not hidden.

Things are painted once more, as numbers on a coarse grid from far to near; what is left of a thing is what is seen
of it. A tree or a house covers all of its outline there, so that a thing behind it rather counts as hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.scenes.drive import VIEW_M, Road
from ray_app.scenes.ground import View
from ray_app.scenes.roadside import PAINTS, Board, Thing, Wall, traffic
from ray_app.scenes.scene import NEAREST_M, Scene
from ray_app.scenes.world import Daytime, Place, Rgb

ROWS, COLUMNS = 120, 160
"""Grid on which things are counted."""
LEAST_CELLS = 24
"""A thing of fewer cells is too small to be named: about 8 x 8 of 224 x 224 pixels."""
LEAST_SHARE = 0.4
"""A thing of which less is in view is hidden."""
NIGHT_M = 25.0
"""At night things without a light of their own are seen this far, in the headlights."""
HAZE = 1.5
"""Things are seen as far as this times the distance at which 37 % of the contrast is left."""
COLOURS_M = 40.0
"""Distance up to which the colour of a vehicle is named, in daylight."""
SIDE_SHARE = 0.04
"""Share of its half of the picture that a kind of thing fills at least to be the side of the road."""
BEND_M = 2.5
"""The road bends if its middle is this far aside at `BEND_AT_M` ahead."""
BEND_AT_M = 45
STANDING, SLOW, FAST = 0.3, 7.0, 16.0
"""Speeds in metres per second, which words are for."""
CHANGE = 0.8
"""A change of speed, in metres per second each second, that is named."""
CLOSING_M = 0.5
"""A change of the distance to the vehicle ahead, in metres, that is named."""
PAINT_WORDS = ("white", "black", "grey", "silver", "red", "blue", "green", "yellow")
SIDES = ("left", "right")
Side = Literal["houses", "tall buildings", "trees", "a hedge", "a fence", "a rail", "open ground"]
Bend = Literal["left", "straight", "right"]


@dataclass(frozen=True, slots=True)
class Vehicle:
    """A vehicle that is seen."""

    kind: str
    """car or van."""
    colour: str
    """Its colour in a word; empty in bad light or far away."""
    distance_m: float
    """Distance in metres."""


@dataclass(frozen=True, slots=True)
class Motion:
    """Motion in a window."""

    speed: Literal["standing", "slow", "moderate", "fast"]
    """Speed at its end, in a word."""
    change: Literal["steady", "braking", "accelerating"]
    """Change of the speed."""
    turn: Bend
    """Direction in which the vehicle turned."""
    lead: Literal["", "closing", "opening"]
    """Change of the distance to the vehicle ahead."""


@dataclass(frozen=True, slots=True)
class SceneFacts:
    """All that may be said about a picture, and about the window that ends with it."""

    place: Place
    """Kind of surroundings."""
    daytime: Daytime
    """Kind of light."""
    cloudy: bool | None
    """Clouds cover much of the sky; None at night."""
    bend: Bend
    """Direction of the road ahead."""
    lanes: int
    """Lanes each way."""
    sides: tuple[Side, Side]
    """Most of what is left and right of the road."""
    lead: Vehicle | None
    """Vehicle ahead in the same lane."""
    ahead: tuple[Vehicle, ...]
    """Vehicles in other lanes of the same direction, the nearest first."""
    oncoming: tuple[Vehicle, ...]
    """Vehicles that come towards the camera, the nearest first."""
    crossing: int
    """Vehicles that cross ahead."""
    parked: tuple[int, int]
    """Vehicles parked left and right."""
    people: tuple[int, int]
    """People on the walks left and right."""
    people_crossing: int
    """People who cross ahead."""
    traffic_light: Literal["", "red", "green"]
    """State of a traffic light ahead."""
    motion: Motion | None = None
    """Motion, of a window alone."""


def frame_facts(scene: Scene, t_s: float) -> SceneFacts:
    """Return the facts of the picture at a time in seconds."""
    world, view = scene.world, scene.view(t_s)
    moving = list(traffic(world, scene.drive, t_s))
    things = [*moving, *scene.roadside_ahead(view)]
    outlines = [_outline(scene, view, thing) for thing in things]
    owner_RX = _owners(things, outlines, view)
    cells = np.bincount(owner_RX[owner_RX >= 0], minlength=len(things))
    reach_m = min(VIEW_M, HAZE * world.light.haze_m)
    dark = world.daytime == "night"
    found: dict[str, list[Vehicle]] = {"lead": [], "ahead": [], "oncoming": []}
    parked, people, crossing, people_crossing, light = [0, 0], [0, 0], 0, 0, ""
    for i, thing in enumerate(things):
        outline = outlines[i]
        if not isinstance(thing, Board) or outline is None or outline.distance_m > reach_m:
            continue
        on_the_move, distance_m = i < len(moving), outline.distance_m
        if thing.sprite == "plain" and max(thing.glow) > 0 and on_the_move:
            if cells[i] and distance_m < 2 * NIGHT_M:
                light = "red" if thing.glow[0] > thing.glow[1] else "green"
            continue
        if cells[i] < LEAST_CELLS or cells[i] < LEAST_SHARE * outline.num_cells:
            continue
        lit = on_the_move and thing.sprite != "walker"
        if dark and not lit and distance_m > NIGHT_M:
            continue
        right = int(thing.n > 0)
        if thing.sprite == "walker":
            people[right] += not on_the_move
            people_crossing += on_the_move
        elif thing.sprite == "crossing_car":
            crossing += 1
        elif thing.sprite.endswith(("_front", "_rear")):
            if not on_the_move:
                parked[right] += 1
                continue
            seen = Vehicle(thing.sprite.split("_")[0], _colour(thing.colour, world.daytime, distance_m), distance_m)
            same_lane = abs(thing.n - world.lane_m * (world.lane + 0.5)) < 0.5
            found["oncoming" if thing.n < 0 else "lead" if same_lane else "ahead"].append(seen)
    nearest = {name: sorted(some, key=lambda each: each.distance_m) for name, some in found.items()}
    return SceneFacts(
        place=world.place,
        daytime=world.daytime,
        cloudy=None if dark else world.light.cloudiness > 0.5,
        bend=_bend(float(view.bend_m[BEND_AT_M])),
        lanes=world.lanes,
        sides=_sides(things, outlines, cells, dark),
        lead=nearest["lead"][0] if nearest["lead"] else None,
        ahead=tuple(nearest["ahead"]),
        oncoming=tuple(nearest["oncoming"]),
        crossing=crossing,
        parked=(parked[0], parked[1]),
        people=(people[0], people[1]),
        people_crossing=people_crossing,
        traffic_light=light,  # type: ignore[arg-type]
    )


def window_facts(scene: Scene, t_start_s: float, t_end_s: float) -> SceneFacts:
    """Return the facts of a window's last picture, with the motion over the window."""
    facts = frame_facts(scene, t_end_s)
    before, after = scene.speed(t_start_s), scene.speed(t_end_s)
    rate = (after - before) / (t_end_s - t_start_s)
    turned = scene.heading(t_end_s) - scene.heading(t_start_s)
    lead = ""
    then = frame_facts(scene, t_start_s).lead
    if facts.lead and then and abs(facts.lead.distance_m - then.distance_m) > CLOSING_M:
        lead = "closing" if facts.lead.distance_m < then.distance_m else "opening"
    motion = Motion(
        "standing" if after < STANDING else "slow" if after < SLOW else "fast" if after > FAST else "moderate",
        "braking" if rate < -CHANGE else "accelerating" if rate > CHANGE else "steady",
        "straight" if abs(turned) < 0.05 else "right" if turned > 0 else "left",
        lead,  # type: ignore[arg-type]
    )
    return replace(facts, motion=motion)


@dataclass(frozen=True, slots=True)
class _Outline:
    """Cells that a thing would cover if nothing were before it."""

    columns: slice
    top_X: NDArray[np.int64]
    """First row of each column."""
    bottom_X: NDArray[np.int64]
    """Row behind the last of each column."""
    distance_m: float
    """Distance of its near end."""

    @property
    def num_cells(self) -> int:
        return int((self.bottom_X - self.top_X).sum())


def _outline(scene: Scene, view: View, thing: Thing) -> _Outline | None:
    """Return where a thing is on the grid; None: it is outside, too near, too far, or only light or shade."""
    world = scene.world
    focal, horizon = world.focal * COLUMNS, world.horizon * ROWS
    if isinstance(thing, Wall):
        near_s = max(thing.s0, view.s + NEAREST_M)
        if near_s > thing.s1 or near_s - view.s > VIEW_M:
            return None
        share = (near_s - thing.s0) / (thing.s1 - thing.s0) if thing.s1 > thing.s0 else 0.0
        ends = [(near_s, thing.n0 + share * (thing.n1 - thing.n0)), (thing.s1, thing.n1)]
        low_m, high_m = thing.bottom_m, thing.top_m
    else:
        if thing.sprite in ("halo", "shade") or not NEAREST_M < thing.s - view.s <= VIEW_M:
            return None
        half = thing.width_m / 2
        ends = [(thing.s, thing.n - half), (thing.s, thing.n + half)]
        low_m, high_m = thing.bottom_m, thing.bottom_m + thing.height_m
    placed = []
    for s, n in ends:
        distance_m = s - view.s
        aside_m = float(np.interp(distance_m, Road.GRID_M, view.bend_m)) + n - view.n
        placed.append((COLUMNS / 2 + focal * aside_m / distance_m, 1 / distance_m))
    (x0, inverse0), (x1, inverse1) = sorted(placed)
    first, last = max(round(x0), 0), min(round(x1), COLUMNS)
    if first >= last:
        return None
    share_X = (np.arange(first, last) + 0.5 - x0) / max(x1 - x0, 1e-6)
    scale_X = focal * (inverse0 + (inverse1 - inverse0) * np.clip(share_X, 0, 1))
    rows = [np.clip(np.rint(horizon + (world.camera_m - m) * scale_X), 0, ROWS).astype(int) for m in (high_m, low_m)]
    return _Outline(slice(first, last), rows[0], rows[1], float(1 / max(inverse0, inverse1)))


def _owners(things: Sequence[Thing], outlines: Sequence[_Outline | None], view: View) -> NDArray[np.int64]:
    """Return the number of the thing that is seen in each cell, -1 for none."""
    owner_RX = np.full((ROWS, COLUMNS), -1)
    far_m = [-(thing.s1 if isinstance(thing, Wall) else thing.s) + view.s for thing in things]
    row_R1 = np.arange(ROWS)[:, None]
    for i in np.argsort(far_m, kind="stable"):
        if (outline := outlines[i]) is not None:
            part = owner_RX[:, outline.columns]
            part[(row_R1 >= outline.top_X) & (row_R1 < outline.bottom_X)] = i
    return owner_RX


def _sides(
    things: Sequence[Thing], outlines: Sequence[_Outline | None], cells: NDArray[np.intp], dark: bool
) -> tuple[Side, Side]:
    """Return what fills most of each side of the road, the side of a thing being that of the road it is on."""
    filled: list[dict[str, float]] = [{}, {}]
    tallest = [0.0, 0.0]
    for i, thing in enumerate(things):
        outline, n = outlines[i], thing.n0 if isinstance(thing, Wall) else thing.n
        kind = _side_kind(thing)
        if outline is None or not cells[i] or not kind:
            continue
        if dark and kind != "houses" and outline.distance_m > NIGHT_M:
            continue
        right = int(n > 0)
        filled[right][kind] = filled[right].get(kind, 0.0) + cells[i] / (ROWS * COLUMNS / 2)
        if kind == "houses" and isinstance(thing, Wall):
            tallest[right] = max(tallest[right], thing.top_m)
    names = []
    for right in (0, 1):
        kind, share = max(filled[right].items(), key=lambda item: item[1], default=("open ground", 1.0))
        if share < SIDE_SHARE:
            kind = "open ground"
        names.append("tall buildings" if kind == "houses" and tallest[right] > 11.0 else kind)
    return names[0], names[1]  # type: ignore[return-value]


def _side_kind(thing: Thing) -> str:
    if isinstance(thing, Wall):
        if thing.pattern.startswith("facade"):
            return "houses"
        return {"hedge": "a hedge", "fence": "a fence", "plain": "a rail"}.get(thing.pattern, "")
    return "trees" if thing.sprite.startswith("tree") else ""


def _bend(aside_m: float) -> Bend:
    return "straight" if abs(aside_m) < BEND_M else "right" if aside_m > 0 else "left"


def _colour(paint: Rgb, daytime: Daytime, distance_m: float) -> str:
    """Return the word of a paint; none where it cannot be seen."""
    if daytime != "day" or distance_m > COLOURS_M:
        return ""
    return PAINT_WORDS[PAINTS.index(paint)]
