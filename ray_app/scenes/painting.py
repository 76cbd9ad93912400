"""Painting with coverage: every edge falls between pixels, so that slow motion changes brightness slowly.

Positions are in pixels; pixel i covers [i, i + 1), and a pair is (left, right) or (top, bottom).
Shapes: C = colours (3, or 1 for grey), H, W = picture, R, X = rows and columns of a part of it, L = smoothness
levels, M, N = rows and columns of a pattern.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.scenes.textures import Floats, Pattern, Sprite, luma

PointPair = tuple[float, float]
Colour = Sequence[float]


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole that looks along the road, level."""

    width: int
    """Columns of the picture."""
    height: int
    """Rows of the picture."""
    focal: float
    """Focal length in pixels."""
    above_m: float
    """Height above the ground."""


@dataclass(frozen=True, slots=True)
class Air:
    """Effect of distance on contrast."""

    colour: Colour
    """Colour to which everything fades."""
    metres: float
    """Distance at which a thing keeps 37 % of its contrast."""


@dataclass(frozen=True, slots=True)
class Upright:
    """An upright rectangle as the camera sees it; each pair gives its left and its right end."""

    x: PointPair
    """Columns, the smaller first."""
    distance_m: PointPair
    """Distances along the viewing direction."""
    along_m: PointPair
    """Places on its pattern."""
    light: PointPair
    """Factors on its colour."""
    bottom_m: float
    """Height of its foot above the ground."""
    top_m: float
    """Height of its top above the ground."""


class Canvas:
    """A picture that is painted from far to near."""

    def __init__(self, camera: Camera, horizon: float, air: Air, colours: int) -> None:
        self.camera, self.horizon, self.air = camera, horizon, air
        self.image_CHW = np.zeros((colours, camera.height, camera.width), np.float32)

    def tones(self, rgb: Colour) -> tuple[np.float32, ...]:
        """Return a colour as the canvas paints it: its three parts, or its grey."""
        if len(self.image_CHW) == 3:
            return tuple(np.float32(part) for part in rgb)
        return (np.float32(luma(rgb)),)

    def planes(self, *colours: Colour) -> Iterator[tuple[Any, ...]]:
        """Fill each colour's plane (H, W) of the canvas with that part of each colour given."""
        yield from zip(self.image_CHW, *(self.tones(rgb) for rgb in colours), strict=True)

    def rectangle(self, x: PointPair, y: PointPair, rgb: Colour, opacity: float = 1.0) -> None:
        """One colour."""
        if (box := self._box(x, y)) is None:
            return
        cover_RX = np.float32(opacity) * np.outer(_cover(y, box[0]), _cover(x, box[1]))
        for plane_HW, tone in self.planes(rgb):
            part_RX = plane_HW[box]
            part_RX += cover_RX * (tone - part_RX)

    def halo(self, x: PointPair, y: PointPair, rgb: Colour) -> None:
        """Add a round Gaussian glow that has faded out at the rectangle's edge."""
        if (box := self._box(x, y)) is None:
            return
        glow_RX = np.outer(_bell(y, box[0]), _bell(x, box[1]))
        for plane_HW, tone in self.planes(rgb):
            plane_HW[box] += tone * glow_RX

    def sprite(self, sprite: Sprite, x: PointPair, y: PointPair, rgb: Colour, glow: Colour) -> None:
        """Return a picture, interpolated from the level nearest in size."""
        if (box := self._box(x, y)) is None:
            return
        size = min(x[1] - x[0], y[1] - y[0])
        smaller = sum(size < 0.71 * level.shape[1] for level in sprite.levels[:-1])
        texels = sprite.levels[smaller]
        row, down = _between(y, box[0], texels.shape[1])
        column, across = _between(x, box[1], texels.shape[2])
        lines = texels.take(row, 1)
        lines += down[:, None] * (texels.take(row + 1, 1) - lines)
        patch = lines.take(column, 2)
        patch += across * (lines.take(column + 1, 2) - patch)
        cover_RX, shade_RX, glow_RX = patch
        for plane_HW, tone, light in self.planes(rgb, glow):
            part_RX = plane_HW[box]
            part_RX *= 1 - cover_RX
            part_RX += tone * shade_RX
            if light:
                part_RX += light * glow_RX

    def wall(self, pattern: Pattern, upright: Upright, rgb: Colour, glow: Colour) -> None:
        """Return a patterned rectangle at any angle. The colour of its pixels fades into the air."""
        x, camera = upright.x, self.camera
        columns = _span(x, camera.width)
        if columns.start >= columns.stop:
            return
        share_X = np.clip((_middles(columns) - x[0]) / max(x[1] - x[0], 1e-6), 0, 1)
        inverse_X = _mix(1 / upright.distance_m[0], 1 / upright.distance_m[1], share_X)
        scale_X = camera.focal * inverse_X
        high_X = self.horizon + (camera.above_m - upright.top_m) * scale_X
        low_X = self.horizon + (camera.above_m - upright.bottom_m) * scale_X
        rows = _span((float(high_X.min()), float(low_X.max())), camera.height)
        if rows.start >= rows.stop:
            return
        row_R1 = _middles(rows)[:, None]
        cover_RX = np.minimum(row_R1 - high_X, low_X - row_R1)
        cover_RX += np.float32(0.5)
        np.clip(cover_RX, 0, 1, out=cover_RX)
        cover_RX *= _cover(x, columns)
        # Distances along the wall are linear on the wall, so divided by the depth they are linear in the picture.
        (near_m, far_m), along_m = upright.distance_m, upright.along_m
        along_X = _mix(along_m[0] / near_m, along_m[1] / far_m, share_X) / inverse_X
        texel_RX = _texels(pattern, along_X, low_X - row_R1, scale_X)
        shade_RX = pattern.shade_LMN.take(texel_RX)
        lit = pattern.glow_LMN is not None and any(glow)
        lamp_RX = pattern.glow_LMN.take(texel_RX) if pattern.glow_LMN is not None and lit else None
        kept_X = np.exp(np.float32(-1 / self.air.metres) / inverse_X)
        light_X = kept_X * _mix(*upright.light, share_X)
        for plane_HW, tone, air, light in self.planes(rgb, self.air.colour, glow):
            part_RX = plane_HW[rows, columns]
            paint_RX = shade_RX * (tone * light_X)
            paint_RX += air * (1 - kept_X)
            if lamp_RX is not None:
                paint_RX += lamp_RX * (light * kept_X)
            paint_RX -= part_RX
            paint_RX *= cover_RX
            part_RX += paint_RX

    def _box(self, x: PointPair, y: PointPair) -> tuple[slice, slice] | None:
        """Return (rows, columns) touched by a rectangle; None: it is outside."""
        rows, columns = _span(y, self.camera.height), _span(x, self.camera.width)
        return None if rows.start >= rows.stop or columns.start >= columns.stop else (rows, columns)


def _texels(pattern: Pattern, along_X: Floats, above_RX: Floats, scale_X: Floats) -> NDArray[np.int32]:
    """Flat indices into the pattern's levels; `above_RX`: pixels above the wall's foot, where the pattern starts.

    A column's level is as smooth as the part of the pattern that one of its pixels covers.
    """
    levels, m, n = pattern.shade_LMN.shape
    per_row, per_column = np.float32(m / pattern.metres[0]), np.float32(n / pattern.metres[1])
    steps_X = np.abs(np.diff(along_X, append=along_X[-1:])) * per_column
    steps_X[-1] = steps_X[-2] if len(steps_X) > 1 else 8.0
    covered_X = np.maximum(np.sqrt(steps_X * (per_row / scale_X)), np.float32(1e-3))
    level_X = np.clip(np.log2(covered_X) + 1, 0, levels - 1).astype(np.int32)
    column_X = (along_X * per_column).astype(np.int32) & (n - 1)
    row_RX = (above_RX * (per_row / scale_X)).astype(np.int32)
    row_RX &= m - 1
    row_RX *= n
    row_RX += level_X * np.int32(m * n) + column_X
    return row_RX


def _mix(first: float, second: float, share: Floats) -> Floats:
    return np.float32(first) + np.float32(second - first) * share


def _span(edges: PointPair, size: int) -> slice:
    """Pixels touched, within the picture."""
    return slice(max(int(np.floor(edges[0])), 0), min(int(np.ceil(edges[1])), size))


def _middles(pixels: slice) -> Floats:
    return np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)


def _cover(edges: PointPair, pixels: slice) -> Floats:
    """Share of each pixel that is between the edges."""
    i = np.arange(pixels.start, pixels.stop, dtype=np.float32)
    return np.clip(np.minimum(i + 1, edges[1]) - np.maximum(i, edges[0]), 0, 1).astype(np.float32)


def _bell(edges: PointPair, pixels: slice) -> Floats:
    middle, width = (edges[0] + edges[1]) / 2, (edges[1] - edges[0]) / 5
    return np.exp(-(((_middles(pixels) - middle) / width) ** 2)).astype(np.float32)


def _between(edges: PointPair, pixels: slice, size: int) -> tuple[NDArray[np.intp], Floats]:
    """Texel before each pixel's middle, and how far that middle is on the way to the next texel's."""
    at = (_middles(pixels) - edges[0]) / (edges[1] - edges[0]) * size - 0.5
    before = np.clip(at, 0, size - 2).astype(np.intp)
    return before, np.clip(at - before, 0, 1).astype(np.float32)
