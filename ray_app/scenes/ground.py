"""The ground: for each picture row its distance, then albedo across the road, paint, texture, light and haze.

Shapes: R = picture rows below the horizon, W = columns, C = colours, L = smoothness levels, M, N = rows (along the
road) and columns (across it) of the texture, K = tables of albedo, P = their samples across the road.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_app.scenes.painting import Canvas
from ray_app.scenes.textures import Floats, Generator, ground_noise, luma, smoothed
from ray_app.scenes.world import CHUNK_M, Drive, Road, World

Doubles = NDArray[np.float64]

ACROSS_M = 0.02
"""Distance between samples of an albedo table."""
TEXTURE_SAMPLES = 4096
TABLE_LEVELS = 5
TEXEL_M = 0.025
"""Distance between samples of the texture."""
DASH_M = (12.0, 4.0)
"""Period and length of lane dashes."""
NEAR_M, FAR_M = 1.2, 600.0
PAINT = np.array([205.0, 205.0, 200.0])
HEADLIGHT_TINT = (1.0, 0.97, 0.9)
LAMP_TINT = (1.0, 0.92, 0.72)
BASE, DASHES, ZEBRA, STOP_LINE, LAMPLIT = range(5)


@dataclass(frozen=True, slots=True)
class View:
    """Position of the camera at one moment."""

    t_s: float
    """Time since the drive began."""
    s: float
    """Metres along the road."""
    n: float
    """Metres to the right of the road's middle."""
    bend_m: Doubles
    """Offset of the road's middle to the right at each distance of `Road.GRID_M`."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Paint on a stretch of road."""

    kind: int
    """ZEBRA or STOP_LINE."""
    begin: float
    """Metres along the road, and `end`."""
    end: float


class Ground:
    """Tables baked once for a world; `paint` draws the ground of one view."""

    def __init__(self, world: World, rng: Generator, focal: float) -> None:
        self._world = world
        self._noise_LMN = ground_noise(rng, TEXEL_M, focal, world.camera_m, 9)
        n = np.arange(-TEXTURE_SAMPLES // 2, TEXTURE_SAMPLES // 2) * np.float64(ACROSS_M)
        base_CP, rough_P = _albedo(world, rng, n)
        white_C1 = (PAINT - np.array(world.asphalt))[:, None]
        inner = np.abs(n) < world.lanes * world.lane_m
        lines = [k * world.lane_m for k in range(-world.lanes + 1, world.lanes)]
        near_lamps = np.exp(-(((np.abs(n) - world.kerb_m) / 5.0) ** 2))
        tables = [
            base_CP,
            white_C1 * np.any([np.abs(n - line) < 0.07 for line in lines], axis=0),
            white_C1 * (0.85 * (inner & (n % 1.0 < 0.5))),
            white_C1 * (0.9 * (inner & (n > 0.1))),
            base_CP * near_lamps,
        ]
        self._rough_P = _levels(rough_P * luma(base_CP))
        rgb_CKP = np.array([[_levels(table_CP[c]) for table_CP in tables] for c in range(3)])
        self._tables = {1: luma(rgb_CKP)[None], 3: rgb_CKP}

    def paint(
        self, canvas: Canvas, view: View, marks: Sequence[Mark], shadows: Sequence[tuple[float, float]]
    ) -> None:
        """Everything below the horizon; `shadows`: (from, to) in metres along the road."""
        camera, light = canvas.camera, self._world.light
        top = max(int(np.ceil(canvas.horizon)), 0)
        y_R = np.arange(top, camera.height) + 0.5
        distance_R = np.clip(camera.focal * camera.above_m / (y_R - canvas.horizon), NEAR_M, FAR_M)
        step_R = distance_R**2 / (camera.focal * camera.above_m)  # length of road in one row
        s_R = view.s + distance_R
        x_W = np.arange(0.5 - camera.width / 2, camera.width / 2, dtype=np.float32)
        middle_R = np.interp(distance_R, Road.GRID_M, view.bend_m) - view.n
        n_RW = x_W * _column(distance_R / camera.focal) - _column(middle_R)
        place_RW = _places(n_RW, distance_R / camera.focal)
        grain_RW = self._grain(n_RW, s_R, step_R)
        grain_RW *= self._rough_P.take(place_RW)
        shaded_R = sum((_inside(s_R, step_R, *band) for band in shadows), np.zeros_like(s_R))
        shade_R = 1 - light.shadow * np.minimum(shaded_R, 1)
        dash_R1 = _column(_dashed(s_R, step_R))
        lamp_R1 = _column(light.lamp * lamplight(s_R, self._world.lamp_step_m))
        beam_RW = _beam(light.headlight, distance_R, x_W / np.float32(camera.width))
        kept_R1 = _column(np.exp(-distance_R / light.haze_m))
        colours = canvas.planes(light.ambient, canvas.air.colour, HEADLIGHT_TINT, LAMP_TINT)
        for (plane_HW, ambient, air, head, warm), tables_KP in zip(
            colours, self._tables[len(canvas.image_CHW)], strict=True
        ):
            paint_RW = tables_KP[BASE].take(place_RW)
            paint_RW += tables_KP[DASHES].take(place_RW) * dash_R1
            for mark in marks:
                share_R = _inside(s_R, step_R, mark.begin, mark.end)
                if (rows := np.flatnonzero(share_R)).size:
                    part = slice(rows[0], rows[-1] + 1)
                    paint_RW[part] += tables_KP[mark.kind].take(place_RW[part]) * _column(share_R[part])
            paint_RW += grain_RW
            paint_RW *= ambient * _column(shade_R) + head * beam_RW
            if light.lamp:
                paint_RW += tables_KP[LAMPLIT].take(place_RW) * (warm * lamp_R1)
            paint_RW *= kept_R1
            paint_RW += air * (1 - kept_R1)
            plane_HW[top:] = paint_RW

    def _grain(self, n_RW: Floats, s_R: Doubles, step_R: Doubles) -> Floats:
        """Return the texture, as smooth in each row as the stretch of road that the row covers."""
        levels, m, n = self._noise_LMN.shape
        level_R = np.clip(np.log2(step_R / TEXEL_M) + 0.5, 0, levels - 1).astype(np.int64)
        row_R = (level_R * m + (s_R / TEXEL_M).astype(np.int64) % m) * n
        texel_RW = (n_RW * np.float32(1 / TEXEL_M)).astype(np.int32)
        texel_RW &= n - 1
        texel_RW += row_R.astype(np.int32)[:, None]
        return self._noise_LMN.take(texel_RW)


def marks_ahead(world: World, drive: Drive, view: View) -> list[Mark]:
    """Zebra crossings and stop lines in view: where the ego vehicle halts, and on some stretches of a town."""
    marks = []
    for halt in drive.halts_near(view.t_s):
        begin = halt.s + (13.0 if world.lead else 5.0)
        marks += [Mark(STOP_LINE, begin - 1.6, begin - 1.1), Mark(ZEBRA, begin, begin + 3.5)]
    if world.built:
        chunk = int(view.s // CHUNK_M)
        for i in range(chunk, chunk + 3):
            rng = np.random.default_rng([world.seed, 22, i])
            if rng.random() < 0.2:
                begin = i * CHUNK_M + rng.uniform(0, 36)
                marks.append(Mark(ZEBRA, begin, begin + 3.5))
    return marks


def shadows_ahead(world: World, view: View) -> list[tuple[float, float]]:
    """Stretches of road in the shade of roadside things, as (from, to)."""
    if not world.light.shadow:
        return []
    bands = []
    chunk = int(view.s // CHUNK_M)
    for i in range(chunk, chunk + 4):
        rng = np.random.default_rng([world.seed, 23, i])
        for _ in range(rng.poisson(1.2)):
            begin = i * CHUNK_M + rng.uniform(0, CHUNK_M)
            bands.append((begin, begin + rng.uniform(0.5, 12.0)))
    return bands


def lamplight(s: Doubles, step_m: float) -> Doubles:
    """Nearness of a street lamp, 0 to 1: there is one every `step_m` along the road."""
    off = (s / step_m + 0.5) % 1.0 - 0.5
    return np.exp(-((off * step_m / 6.0) ** 2))


def _albedo(world: World, rng: Generator, n: Doubles) -> tuple[Doubles, Doubles]:
    """Colour (3, P) and contrast of the texture (P,) across the road."""
    off = np.abs(n)
    colour_CP = np.repeat(np.array(world.verge)[:, None], len(n), 1)
    rough_P = np.full(len(n), world.grain[1])
    walk = off < world.kerb_m + world.walk_m
    colour_CP[:, walk] = np.array(world.walk)[:, None]
    rough_P[walk] = 0.5 * world.grain[1]
    colour_CP[:, off < world.kerb_m + 0.2] = 1.25 * np.array(world.walk)[:, None]
    road = off < world.kerb_m
    wear = 1 + 0.06 * np.cos(2 * np.pi * n / world.lane_m) + 0.03 * rng.standard_normal(len(n))
    colour_CP[:, road] = (np.array(world.asphalt)[:, None] * wear)[:, road]
    rough_P[road] = world.grain[0]
    if not world.built:
        edge = np.abs(off - world.lanes * world.lane_m + 0.15) < 0.08
        colour_CP[:, edge] = PAINT[:, None]
    return colour_CP, rough_P


def _levels(table_P: Doubles) -> Floats:
    """Return the table and copies smoothed over twice as many samples each, one after the other."""
    row = table_P[None].astype(np.float32)
    return smoothed(row, [(0.0, 0.0), *((0.0, 0.4 * 2**i) for i in range(1, TABLE_LEVELS))]).reshape(-1)


def _places(n_RW: Floats, pixel_m_R: Doubles) -> NDArray[np.int32]:
    """Flat indices into tables of `_levels`, as smooth in each row as one pixel is wide."""
    level_R = np.clip(np.log2(pixel_m_R / ACROSS_M) + 0.5, 0, TABLE_LEVELS - 1).astype(np.int32)
    place_RW = n_RW * np.float32(1 / ACROSS_M)
    place_RW += np.float32(TEXTURE_SAMPLES // 2)
    np.clip(place_RW, 0, TEXTURE_SAMPLES - 1, out=place_RW)
    return place_RW.astype(np.int32) + (level_R * TEXTURE_SAMPLES)[:, None]


def _beam(strength: float, distance_R: Doubles, x_W: Floats) -> Floats:
    """Light of the ego vehicle's headlights; `x_W` in picture widths from the middle."""
    if not strength:
        return np.zeros((1, 1), np.float32)
    reach_R = strength * np.exp(-distance_R / 14.0) * np.minimum(distance_R / 7.0, 1.0)
    return np.outer(reach_R, np.exp(-((x_W / 0.3) ** 2))).astype(np.float32)


def _inside(s_R: Doubles, step_R: Doubles, begin: float, end: float) -> Doubles:
    """Share of each row's stretch of road, `step_R` long, that is within [begin, end]."""
    low, high = np.maximum(s_R - step_R / 2, begin), np.minimum(s_R + step_R / 2, end)
    return np.clip((high - low) / step_R, 0, 1)


def _dashed(s_R: Doubles, step_R: Doubles) -> Doubles:
    """Share of each row's stretch of road that is dash, not gap."""
    period, length = DASH_M

    def dash_until(s: Doubles) -> Doubles:
        return np.floor(s / period) * length + np.minimum(s % period, length)

    return (dash_until(s_R + step_R / 2) - dash_until(s_R - step_R / 2)) / step_R


def _column(values_R: Doubles) -> Floats:
    return values_R.astype(np.float32)[:, None]
