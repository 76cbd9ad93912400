"""Rendered driving scenes: a picture for every moment of an endless drive, as a function of (seed, time) alone.

A scene is no photograph: it is a cheap stand-in for a camera on a moving vehicle, made so that an event camera's
simulator, run on its true motion, gives events like those of real drives.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ray_app.events.scene_draw import Camera, Canvas
from ray_app.events.scene_ground import Ground, View, lamplight, marks_ahead, shadows_ahead
from ray_app.events.scene_roadside import Thing, roadside, traffic
from ray_app.events.scene_textures import (
    LUMA,
    Floats,
    Pattern,
    Sprite,
    car_end,
    car_flank,
    car_side,
    facade,
    fence,
    hedge,
    tree,
    unit_noise,
    walker,
)
from ray_app.events.scene_world import CHUNK_M, VIEW_M, Board, Road, Wall, World, make_world

NEAREST_M = 2.0
SKY = 1024
"""Columns of the sky's panorama."""


class Scene:
    """One drive through one world. Building it bakes its textures (about a tenth of a second); frames are cheap."""

    def __init__(self, seed: int, height: int = 480, width: int = 640) -> None:
        self.world, self.drive, self.road = make_world(seed)
        self.camera = Camera(width, height, self.world.focal * width, self.world.camera_m)
        rng = np.random.default_rng([seed, 0])
        self._ground = Ground(self.world, rng, self.camera.focal)
        self._patterns: dict[str, Pattern] = {
            "plain": Pattern(np.ones((1, 1, 1), np.float32), None, (1.0, 1.0)),
            "hedge": hedge(rng, 5),
            "fence": fence(rng, 5),
            "car_side": car_side(rng, 4),
        } | {f"facade{i}": facade(rng, 5) for i in range(3)}
        self._sprites: dict[str, Sprite] = {
            "car_front": car_end(rng, True, False),
            "car_rear": car_end(rng, False, False),
            "van_front": car_end(rng, True, True),
            "van_rear": car_end(rng, False, True),
            "flank": car_flank(rng),
            "walker": walker(rng),
        } | {f"tree{i}": tree(rng) for i in range(3)}
        clouds = unit_noise(rng, 256, SKY, (14.0, 40.0)) + 0.5 * unit_noise(rng, 256, SKY, (5.0, 14.0))
        self._cloud = (np.clip(0.5 + 0.6 * clouds, 0, 1) * self.world.light.cloudiness).astype(np.float32)
        ridge = unit_noise(rng, 1, SKY, (0.0, 30.0))[0] + 0.5 * unit_noise(rng, 1, SKY, (0.0, 4.0))[0]
        self._ridge = (rng.uniform(0.01, 0.07) * np.clip(1.0 + 0.7 * ridge, 0.1, 3.0)).astype(np.float32)
        self._vibration = rng.uniform(0, 2 * np.pi, 3)
        self._sway = rng.uniform(0, 2 * np.pi, 2)
        self._stretch = lru_cache(maxsize=16)(lambda chunk: tuple(roadside(self.world, chunk)))

    def rgb(self, t_s: float) -> NDArray[np.uint8]:
        """What the camera sees, (H, W, 3)."""
        image = self._exposed(self._paint(t_s, 3).image_CHW)
        return np.rint(np.clip(image, 0, 255)).astype(np.uint8).transpose(1, 2, 0)

    def grey(self, t_s: float) -> Floats:
        """The same in grey, not rounded, (H, W), 0 to 255: what the event camera's pixels measure."""
        return np.clip(self._exposed(self._paint(t_s, 1).image_CHW)[0], 0, 255)

    def _exposed(self, image_CHW: Floats) -> Floats:
        """The tone curve, on the grey, so that colours and grey stay one picture."""
        grey = image_CHW[0] if len(image_CHW) == 1 else np.tensordot(LUMA, image_CHW, 1)
        return image_CHW * np.power(np.clip(grey, 0, 255) / np.float32(255), np.float32(self.world.contrast - 1))

    def speed(self, t_s: float) -> float:
        """Metres per second."""
        return self.drive.at(t_s)[1]

    def heading(self, t_s: float) -> float:
        """Radians turned to the right since the drive began."""
        return self.road.heading(self.drive.at(t_s)[0])

    def _paint(self, t_s: float, colours: int) -> Canvas:
        world = self.world
        s, v = self.drive.at(t_s)
        lane_n = world.lane_m * (world.lane + 0.5)
        wander = 0.25 * np.sin(0.31 * t_s + self._sway[0]) + 0.1 * np.sin(0.83 * t_s + self._sway[1])
        view = View(t_s, s, lane_n + wander * min(s / 10, 1.0), self.road.bend(s))
        canvas = Canvas(self.camera, self._horizon(t_s, v), colours)
        self._sky(canvas, self.road.heading(s))
        self._ground.paint(
            canvas, view, marks_ahead(world, self.drive, view), shadows_ahead(world, view)
        )
        self._things(canvas, view)
        return canvas

    def _horizon(self, t_s: float, v: float) -> float:
        """Row of the horizon: the nose dips when braking, and shakes a little with the speed."""
        rate = (self.speed(t_s + 0.25) - self.speed(max(t_s - 0.25, 0.0))) / 0.5
        shake = sum(
            a * np.sin(2 * np.pi * f * t_s + p)
            for a, f, p in zip((0.5, 0.25, 0.08), (1.3, 3.1, 11.0), self._vibration, strict=True)
        )
        pixels = self.camera.height / 480
        return self.world.horizon * self.camera.height + pixels * (1.2 * rate + min(v / 8, 1.5) * shake)

    def _sky(self, canvas: Canvas, heading: float) -> None:
        """Gradient, clouds, the low sun and a ridge on the horizon; all far away, so they turn and nothing else."""
        world, light, camera = self.world, self.world.light, self.camera
        bottom = min(max(int(np.ceil(canvas.horizon)), 1), camera.height)
        x = np.arange(camera.width) + 0.5 - camera.width / 2
        angle = np.arctan2(x, camera.focal) + heading
        column = angle / (2 * np.pi) * SKY
        before = np.floor(column).astype(np.int64)
        part = (column - before).astype(np.float32)
        before %= SKY
        after = (before + 1) % SKY
        rise = canvas.horizon - np.arange(bottom) - 0.5
        share = np.clip(rise / (0.5 * camera.height), 0, 1).astype(np.float32)[:, None] ** np.float32(0.7)
        row = np.clip(rise / camera.height * 400, 0, 255).astype(np.int64)
        cloud = self._cloud[row]
        cloud = cloud[:, before] * (1 - part) + cloud[:, after] * part
        ridge = self._ridge[before] * (1 - part) + self._ridge[after] * part
        low = np.float32(camera.height) * ridge
        hill = np.clip(low - rise[:, None].astype(np.float32) + np.float32(0.5), 0, 1)
        veil = np.float32(np.exp(-350.0 / light.haze_m))
        glare = None
        if light.sun:
            off = (angle - light.sun_angle + np.pi) % (2 * np.pi) - np.pi
            wide = np.exp(-((off / 0.22) ** 2)) * 160 * light.sun
            glare = np.outer(np.exp(-((rise / (0.14 * camera.height)) ** 2)), wide).astype(np.float32)
        colours = zip(
            canvas.image_CHW,
            canvas.tones(light.sky_top),
            canvas.tones(light.sky_low),
            canvas.tones(light.cloud),
            canvas.tones([a * c for a, c in zip(light.ambient, world.verge, strict=True)]),
            canvas.tones((1.0, 0.8, 0.5)),
            strict=True,
        )
        for plane_HW, high, air, white, green, warm in colours:
            sky = np.float32(air) + (np.float32(high) - np.float32(air)) * share
            sky = sky + cloud * (np.float32(white) - sky)
            if glare is not None:
                sky += glare * np.float32(warm)
            sky += hill * (np.float32(air) + veil * (np.float32(green) - np.float32(air)) - sky)
            plane_HW[:bottom] = sky

    def _things(self, canvas: Canvas, view: View) -> None:
        """Walls and boards, the farthest first. A wall is as far as its far end: what stands before it comes after."""
        chunk = int(view.s // CHUNK_M)
        things: list[Thing] = []
        for i in range(chunk - 1, int((view.s + VIEW_M) // CHUNK_M) + 1):
            things += self._stretch(i)
        things += traffic(self.world, self.drive, view.t_s)
        far_m = [max(t.s0, t.s1) if isinstance(t, Wall) else t.s for t in things]
        for i in np.argsort(far_m, kind="stable")[::-1]:
            thing = things[i]
            if not NEAREST_M < far_m[i] - view.s:
                break
            if isinstance(thing, Wall):
                self._wall(canvas, view, thing)
            elif thing.s - view.s < VIEW_M:
                self._board(canvas, view, thing)

    def _wall(self, canvas: Canvas, view: View, wall: Wall) -> None:
        world, light = self.world, self.world.light
        s = np.array([wall.s0, wall.s1])
        n = np.array([wall.n0, wall.n1])
        along = np.array([0.0, np.hypot(wall.s1 - wall.s0, wall.n1 - wall.n0)])
        near = view.s + NEAREST_M
        if s[0] < near:
            if s[1] - s[0] < 1e-6:
                return
            share = (near - s[0]) / (s[1] - s[0])
            s[0], n[0], along[0] = near, n[0] + share * (n[1] - n[0]), share * along[1]
        distance = s - view.s
        if distance[0] > VIEW_M:
            return
        aside = np.interp(distance, Road.GRID_M, view.bend_m) + n - view.n
        x = self.camera.width / 2 + self.camera.focal * aside / distance
        facing = wall.s1 - wall.s0 < 1e-6
        side = 1.0 if facing else light.left if n[0] < 0 else light.right
        lamps = [side * self._extra(canvas, view, a, d) for a, d in zip(aside, distance, strict=True)]
        colour = [c * a for c, a in zip(wall.colour, light.ambient, strict=True)]
        glow = [light.glow * wall.glow * c for c in (235.0, 195.0, 120.0)]
        canvas.wall(
            self._patterns[wall.pattern],
            (float(x[0]), float(x[1])),
            (1 / float(distance[0]), 1 / float(distance[1])),
            (float(along[0]), float(along[1])),
            (wall.bottom, wall.top),
            colour,
            light.sky_low,
            light.haze_m,
            glow,
            (lamps[0], lamps[1]),
        )

    def _extra(self, canvas: Canvas, view: View, aside: float, distance: float) -> float:
        """Light of headlights and street lamps as a multiple of the ambient light, 1 where there is neither."""
        light = self.world.light
        if not light.headlight:
            return 1.0
        ambient = float(LUMA @ np.array(light.ambient))
        beam = light.headlight * np.exp(-distance / 22.0 - (aside / (0.35 * distance)) ** 2)
        lamp = 0.4 * light.lamp * lamplight(view.s + distance, self.world.lamp_step_m)
        return 1.0 + float(beam + lamp) / ambient

    def _board(self, canvas: Canvas, view: View, board: Board) -> None:
        light, camera = self.world.light, self.camera
        distance = board.s - view.s
        scale = camera.focal / distance
        aside = float(np.interp(distance, Road.GRID_M, view.bend_m)) + board.n - view.n
        middle = camera.width / 2 + scale * aside
        x = middle - scale * board.width / 2, middle + scale * board.width / 2
        low = canvas.horizon + scale * (camera.above_m - board.bottom)
        y = low - scale * board.height, low
        if x[1] < 0 or x[0] > camera.width or y[1] < 0 or y[0] > camera.height or x[1] - x[0] < 0.2:
            return
        kept = float(np.exp(-distance / light.haze_m))
        if board.sprite == "halo":
            if light.glow:
                canvas.halo(x, y, [light.glow * kept * g for g in board.glow])
            return
        if board.sprite == "shadow":
            canvas.rectangle(x, y, (0.0, 0.0, 0.0), 0.6)
            return
        extra = self._extra(canvas, view, aside, distance)
        colour = [
            kept * extra * a * c + (1 - kept) * air
            for c, a, air in zip(board.colour, light.ambient, light.sky_low, strict=True)
        ]
        if board.sprite == "plain":
            canvas.rectangle(x, y, [max(c, g * light.glow) for c, g in zip(colour, board.glow, strict=True)])
        else:
            canvas.sprite(self._sprites[board.sprite], x, y, colour, [g * light.glow for g in board.glow])
