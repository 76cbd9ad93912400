"""Rendered driving scenes: a picture for every moment of an endless drive, as a function of seed and time alone.

A scene is no photograph: it is a cheap stand-in for a camera on a moving vehicle, made so that an event camera's
simulator, run on its true motion, gives events like those of real drives.

Shapes: H, W = picture, R = rows above the horizon, C = colours (3, or 1 for grey).
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ray_app.scenes.drive import VIEW_M, Road
from ray_app.scenes.ground import Ground, View, lamplight, marks_ahead, shadows_ahead
from ray_app.scenes.painting import Air, Camera, Canvas, Upright
from ray_app.scenes.roadside import Board, Thing, Wall, roadside, traffic
from ray_app.scenes.textures import Floats, luma, make_patterns, make_sprites, unit_noise
from ray_app.scenes.world import CHUNK_M, make_world

RENDERER = 1
"""Number of this renderer: raised whenever the same seed gives other pictures."""
NEAREST_M = 2.0
"""Nothing nearer to the camera is drawn."""
SKY = 1024
"""Columns of the sky's panorama, all around."""
WINDOW_LIGHT = (235.0, 195.0, 120.0)
GLARE = (1.0, 0.8, 0.5)


class Scene:
    """One drive through one world. Building it bakes textures for about 0.2 s; a picture takes about 0.02 s."""

    def __init__(self, seed: int, height: int = 480, width: int = 640) -> None:
        self.world, self.drive, self.road = make_world(seed)
        self._camera = Camera(width, height, self.world.focal * width, self.world.camera_m)
        rng = np.random.default_rng([seed, 0])
        self._ground = Ground(self.world, rng, self._camera.focal)
        self._patterns, self._sprites = make_patterns(rng), make_sprites(rng)
        clouds = unit_noise(rng, 256, SKY, 14.0, 40.0) + 0.5 * unit_noise(rng, 256, SKY, 5.0, 14.0)
        self._clouds = np.clip(0.5 + 0.6 * clouds, 0, 1) * np.float32(self.world.light.cloudiness)
        ridge = unit_noise(rng, 1, SKY, 0.0, 30.0)[0] + 0.5 * unit_noise(rng, 1, SKY, 0.0, 4.0)[0]
        self._ridge = np.float32(rng.uniform(0.01, 0.07)) * np.clip(1 + 0.7 * ridge, 0.1, 3)
        self._phases = rng.uniform(0, 2 * np.pi, 5)
        self._roadside = lru_cache(maxsize=16)(lambda chunk: roadside(self.world, chunk))

    def rgb(self, t_s: float) -> NDArray[np.uint8]:
        """Render the camera's picture, (H, W, 3)."""
        image_CHW = self._exposed(self._painted(t_s, 3))
        return np.ascontiguousarray(np.rint(image_CHW).astype(np.uint8).transpose(1, 2, 0))

    def grey(self, t_s: float) -> Floats:
        """Return the same in grey, not rounded, (H, W), 0 to 255: what the event camera's pixels measure.

        The luma of `rgb` to within 3 %: tinted light on coloured ground is multiplied in grey.
        """
        return self._exposed(self._painted(t_s, 1))[0]

    def speed(self, t_s: float) -> float:
        """Metres per second."""
        return self.drive.at(t_s)[1]

    def heading(self, t_s: float) -> float:
        """Radians turned to the right since the drive began."""
        return self.road.heading(self.drive.at(t_s)[0])

    def view(self, t_s: float) -> View:
        """Position of the camera, which weaves a little within its lane."""
        s, _ = self.drive.at(t_s)
        weave = 0.25 * np.sin(0.031 * s + self._phases[0]) + 0.1 * np.sin(0.083 * s + self._phases[1])
        return View(t_s, s, self.world.lane_m * (self.world.lane + 0.5) + float(weave), self.road.bend(s))

    def roadside_ahead(self, view: View) -> list[Thing]:
        """Return the things at the roadside from just behind the camera as far as it sees."""
        chunks = range(int(view.s // CHUNK_M) - 1, int((view.s + VIEW_M) // CHUNK_M) + 1)
        return [thing for chunk in chunks for thing in self._roadside(chunk)]

    def _exposed(self, image_CHW: Floats) -> Floats:
        """Apply the tone curve to the grey, so that colours and grey stay one picture; clipped to 0 to 255."""
        grey_HW = image_CHW[0] if len(image_CHW) == 1 else luma(image_CHW)
        bright_HW = np.clip(grey_HW, 0, 255) / np.float32(255)
        return np.clip(image_CHW * np.power(bright_HW, np.float32(self.world.contrast - 1)), 0, 255)

    def _painted(self, t_s: float, colours: int) -> Floats:
        world, view = self.world, self.view(t_s)
        air = Air(world.light.sky_low, world.light.haze_m)
        canvas = Canvas(self._camera, self._horizon(t_s, self.speed(t_s)), air, colours)
        self._paint_sky(canvas, self.road.heading(view.s))
        self._ground.paint(canvas, view, marks_ahead(world, self.drive, view), shadows_ahead(world, view))
        self._paint_things(canvas, view)
        return canvas.image_CHW

    def _horizon(self, t_s: float, v: float) -> float:
        """Row of the horizon: the nose dips when braking, and the camera shakes with the speed."""
        rate = (self.speed(t_s + 0.25) - self.speed(max(t_s - 0.25, 0.0))) / 0.5
        waves = zip((0.5, 0.25, 0.08), (1.3, 3.1, 11.0), self._phases[2:], strict=True)
        shake = sum(size * np.sin(2 * np.pi * hz * t_s + phase) for size, hz, phase in waves)
        pixels = self._camera.height / 480 * (1.2 * rate + min(v / 8, 1.5) * float(shake))
        return self.world.horizon * self._camera.height + pixels

    def _paint_sky(self, canvas: Canvas, heading: float) -> None:
        """Gradient, clouds, the low sun and a ridge on the horizon: all so far away that they only turn."""
        light, camera = self.world.light, self._camera
        rows = slice(min(max(int(np.ceil(canvas.horizon)), 1), camera.height))
        angle_W = np.arctan2(np.arange(camera.width) + 0.5 - camera.width / 2, camera.focal) + heading
        column_W = np.floor(angle_W * (SKY / (2 * np.pi)))
        part_W = (angle_W * (SKY / (2 * np.pi)) - column_W).astype(np.float32)
        left_W = column_W.astype(np.int64) % SKY
        right_W = (left_W + 1) % SKY
        rise_R1 = (canvas.horizon - np.arange(camera.height)[rows, None] - 0.5).astype(np.float32)
        high_R1 = np.clip(rise_R1 / (0.5 * camera.height), 0, 1) ** np.float32(0.7)
        clouds = self._clouds[np.clip(rise_R1[:, 0] / camera.height * 400, 0, 255).astype(np.int64)]
        cloud_RW = clouds.take(left_W, 1) * (1 - part_W) + clouds.take(right_W, 1) * part_W
        ridge_W = camera.height * (self._ridge[left_W] * (1 - part_W) + self._ridge[right_W] * part_W)
        hill_RW = np.clip(ridge_W - rise_R1 + np.float32(0.5), 0, 1)
        kept = np.float32(np.exp(-350.0 / light.haze_m))
        off_W = (angle_W - light.sun_angle + np.pi) % (2 * np.pi) - np.pi
        sun_R = light.sun * np.exp(-((rise_R1[:, 0] / (0.14 * camera.height)) ** 2))
        glare_RW = np.outer(160 * sun_R, np.exp(-((off_W / 0.22) ** 2))).astype(np.float32)
        green = [a * c for a, c in zip(light.ambient, self.world.verge, strict=True)]
        colours = canvas.planes(light.sky_top, light.sky_low, light.cloud, green, GLARE)
        for plane_HW, top, low, white, hill, glare in colours:
            sky_RW = low + (top - low) * high_R1
            sky_RW = sky_RW + cloud_RW * (white - sky_RW)
            if light.sun:
                sky_RW += glare * glare_RW
            sky_RW += hill_RW * (low + kept * (hill - low) - sky_RW)
            plane_HW[rows] = sky_RW

    def _paint_things(self, canvas: Canvas, view: View) -> None:
        """Walls and boards, the farthest first; a wall's far end counts, for what is before it hides it."""
        things: list[Thing] = [*traffic(self.world, self.drive, view.t_s), *self.roadside_ahead(view)]
        far_m = np.array([thing.s1 if isinstance(thing, Wall) else thing.s for thing in things]) - view.s
        for i in np.argsort(-far_m, kind="stable"):
            thing = things[i]
            if far_m[i] <= NEAREST_M:
                break
            if isinstance(thing, Wall):
                self._paint_wall(canvas, view, thing)
            else:
                self._paint_board(canvas, view, thing)

    def _paint_wall(self, canvas: Canvas, view: View, wall: Wall) -> None:
        light = self.world.light
        cut_m = max(view.s + NEAREST_M - wall.s0, 0.0)  # the part behind the camera
        if wall.s0 - view.s > VIEW_M or wall.s0 + cut_m > wall.s1:
            return
        share = cut_m / (wall.s1 - wall.s0) if cut_m else 0.0
        length_m = float(np.hypot(wall.s1 - wall.s0, wall.n1 - wall.n0))
        near = (wall.s0 + cut_m, wall.n0 + share * (wall.n1 - wall.n0), share * length_m)
        facing = wall.s0 == wall.s1
        side = 1.0 if facing else light.walls[0 if wall.n0 < 0 else 1]
        ends = []
        for s, n, along_m in (near, (wall.s1, wall.n1, length_m)):
            distance_m, aside_m = self._from_camera(view, s, n)
            x = canvas.camera.width / 2 + canvas.camera.focal * aside_m / distance_m
            ends.append((x, distance_m, along_m, side * self._brightness(view, distance_m, aside_m)))
        (x0, d0, a0, light0), (x1, d1, a1, light1) = sorted(ends)
        upright = Upright((x0, x1), (d0, d1), (a0, a1), (light0, light1), wall.bottom_m, wall.top_m)
        colour = [c * a for c, a in zip(wall.colour, light.ambient, strict=True)]
        glow = [light.glow * wall.lit * c for c in WINDOW_LIGHT]
        canvas.wall(self._patterns[wall.pattern], upright, colour, glow)

    def _paint_board(self, canvas: Canvas, view: View, board: Board) -> None:
        light, camera = self.world.light, canvas.camera
        distance_m, aside_m = self._from_camera(view, board.s, board.n)
        scale = camera.focal / distance_m
        middle, half = camera.width / 2 + scale * aside_m, scale * board.width_m / 2
        low = canvas.horizon + scale * (camera.above_m - board.bottom_m)
        x, y = (middle - half, middle + half), (low - scale * board.height_m, low)
        if distance_m > VIEW_M or x[1] < 0 or x[0] > camera.width or 2 * half < 0.2:
            return
        kept = float(np.exp(-distance_m / light.haze_m))
        glow = [light.glow * g for g in board.glow]
        if board.sprite == "halo":
            if light.glow:
                canvas.halo(x, y, [kept * g for g in glow])
            return
        if board.sprite == "shade":
            canvas.rectangle(x, y, board.colour, 0.6)
            return
        bright = kept * self._brightness(view, distance_m, aside_m)
        colour = [
            bright * ambient * c + (1 - kept) * air
            for c, ambient, air in zip(board.colour, light.ambient, light.sky_low, strict=True)
        ]
        if board.sprite == "plain":
            canvas.rectangle(x, y, [max(c, g) for c, g in zip(colour, glow, strict=True)])
        else:
            canvas.sprite(self._sprites[board.sprite], x, y, colour, glow)

    def _from_camera(self, view: View, s: float, n: float) -> tuple[float, float]:
        """Metres ahead of the camera and to its right."""
        distance_m = s - view.s
        return distance_m, float(np.interp(distance_m, Road.GRID_M, view.bend_m)) + n - view.n

    def _brightness(self, view: View, distance_m: float, aside_m: float) -> float:
        """Ambient light, headlights and street lamps, as a multiple of the ambient light."""
        light = self.world.light
        if not light.headlight:
            return 1.0
        beam = light.headlight * np.exp(-distance_m / 22.0 - (aside_m / (0.35 * distance_m)) ** 2)
        lamp = 0.4 * light.lamp * lamplight(np.array(view.s + distance_m), self.world.lamp_step_m)
        return 1.0 + float(beam + lamp) / luma(light.ambient)
