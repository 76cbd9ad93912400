"""Patterns that scenes are painted with: each a stack of ever smoother copies, so that sampling does not alias.

Shapes: L = smoothness level (each about twice as smooth as the one before), M, N = rows and columns of a pattern.
Patterns repeat in both directions unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Generator = np.random.Generator

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A repeating pattern for walls and ground, in levels of equal size."""

    shade_LMN: Floats
    """Factor on the surface's colour."""
    glow_LMN: Floats | None
    """Light given off at night, 0 to 1; None: none."""
    metres: tuple[float, float]
    """Coordinates of the M rows and the N columns."""


@dataclass(frozen=True, slots=True)
class Sprite:
    """A flat picture that faces the camera, in levels of half the size each. Does not repeat."""

    levels: tuple[Floats, ...]
    """(3, M, N) each: coverage, shade times coverage, glow."""


def luma(colours: Any) -> Any:
    """Grey of red, green and blue, numbers or arrays. Written out: a matrix product may round by its threads."""
    return LUMA_WEIGHTS[0] * colours[0] + LUMA_WEIGHTS[1] * colours[1] + LUMA_WEIGHTS[2] * colours[2]


def smoothed(field_MN: Floats, widths: Sequence[tuple[float, float]]) -> Floats:
    """Return a copy for each (rows, columns): periodic Gaussian blur with these standard deviations, (L, M, N)."""
    fy = np.fft.fftfreq(field_MN.shape[0])[:, None]
    fx = np.fft.rfftfreq(field_MN.shape[1])[None, :]
    spectrum = np.fft.rfft2(field_MN.astype(np.float32))
    copies = []
    for down, across in widths:
        keep = np.exp(-2 * (np.pi * down * fy) ** 2) * np.exp(-2 * (np.pi * across * fx) ** 2)
        copies.append(np.fft.irfft2(spectrum * keep.astype(np.float32), s=field_MN.shape))
    return np.stack(copies).astype(np.float32)


def levels(field_MN: Floats) -> Floats:
    """Return the field, and copies blurred over one sample, two, four, eight: (5, M, N)."""
    return smoothed(field_MN, [(0.0, 0.0), *((0.5 * 2**i, 0.5 * 2**i) for i in range(1, 5))])


def unit_noise(rng: Generator, rows: int, columns: int, down: float, across: float | None = None) -> Floats:
    """Periodic noise of mean 0 and standard deviation 1, smooth over `down` rows and `across` columns."""
    white = rng.standard_normal((rows, columns), np.float32)
    (field,) = smoothed(white, [(down, down if across is None else across)])
    return (field - field.mean()) / field.std()


def ground_noise(rng: Generator, metres: float, focal: float, camera_m: float, num_levels: int) -> Floats:
    """Grain, patches and cracks of a ground seen at a grazing angle, mean 0: (L, 1024 along, 512 across).

    Level i is smooth over `metres` * 2**i along the road and, across it, over what the camera, `camera_m` high
    with a focal length in pixels, sees as one pixel at the distance where one pixel is that long.
    """
    shape = (1024, 512)
    grain = unit_noise(rng, *shape, 0.9)
    patches = unit_noise(rng, *shape, 14.0)
    spots = np.maximum(unit_noise(rng, *shape, 4.0, 2.0) - 1.5, 0.0)
    cracks = np.exp(-((unit_noise(rng, *shape, 30.0, 12.0) / 0.035) ** 2))
    field = np.clip(grain * (1.0 + 0.5 * patches), -2.5, 3.0) + 0.4 * patches + 2.0 * spots - 1.5 * cracks
    along = [metres * 2**i for i in range(1, num_levels)]
    widths = [(0.4 * m / metres, 0.4 * np.sqrt(m * focal * camera_m) / focal / metres) for m in along]
    return smoothed(field - field.mean(), [(0.0, 0.0), *widths])


def facade(rng: Generator) -> Pattern:
    """Walls with windows: eight bays by eight floors of 64 x 64 samples, some windows lit at night."""
    bays, cell = 8, 64
    side = bays * cell
    left, right = rng.uniform(0.12, 0.26), rng.uniform(0.74, 0.9)
    low, high = rng.uniform(0.2, 0.35), rng.uniform(0.75, 0.9)
    along = np.arange(cell) / cell
    across = (along > left) & (along < right)
    frame = np.abs(along - (left + right) / 2) < 0.02
    upright = (along > low) & (along < high)
    window = np.outer(upright, across & ~frame).astype(np.float32)
    sill = np.outer((along > low - 0.06) & (along <= low), across).astype(np.float32)
    ledge = np.outer(along < 0.045, np.ones(cell)).astype(np.float32)
    panes = np.tile(window, (bays, bays))
    pane_shade = np.kron(rng.uniform(0.12, 0.6, (bays, bays)), np.ones((cell, cell))).astype(np.float32)
    lit = np.kron(rng.random((bays, bays)) < rng.uniform(0.1, 0.45), np.ones((cell, cell)))
    strength = np.kron(rng.uniform(0.4, 1.0, (bays, bays)), np.ones((cell, cell)))
    grain = unit_noise(rng, side, side, 1.2) * 0.05 + unit_noise(rng, side, side, 25.0) * 0.08
    trim = rng.uniform(0.3, 0.6) * np.tile(sill, (bays, bays)) + rng.uniform(-0.5, 0.4) * np.tile(ledge, (bays, bays))
    shade = (1.0 + grain + trim) * (1 - panes) + panes * pane_shade * (1.0 + 2.0 * grain)
    metres = rng.uniform(2.8, 3.6) * bays, rng.uniform(2.2, 4.2) * bays
    return Pattern(
        levels(np.clip(shade, 0.05, 2.0)),
        levels(panes * lit * strength),
        metres,
    )


def hedge(rng: Generator) -> Pattern:
    """Leaves and dark gaps between them."""
    field = np.exp(0.7 * unit_noise(rng, 256, 256, 1.6) + 0.35 * unit_noise(rng, 256, 256, 10.0))
    return Pattern(levels(np.clip(field, 0.08, 2.8)), None, (5.0, 5.0))


def fence(rng: Generator) -> Pattern:
    """Boards with gaps, or a rail on posts."""
    along = np.arange(256)
    boards = (along % int(rng.choice([16, 32, 64])) > 3).astype(np.float32)
    tone = np.repeat(rng.uniform(0.7, 1.2, 16), 16).astype(np.float32)
    field = (boards * tone)[None, :] * (1 + 0.08 * unit_noise(rng, 256, 256, 12.0, 1.0))
    return Pattern(levels(np.clip(field, 0.15, 2.0)), None, (2.56, 5.12))


def flank(rng: Generator, height_m: float) -> Pattern:
    """Side of a car or van in one tile: wheels, doors, windows."""
    y, x = np.mgrid[1.0 : 0.0 : -1 / 128, 0.0 : 1.0 : 1 / 256].astype(np.float32)[:, ::-1]
    shade = np.where(y < 0.5, 0.9, 1.1)
    shade[(y > 0.6) & (y < 0.93) & (np.abs(x - 0.5) < 0.36) & (np.abs(x - 0.52) > 0.015)] = 0.15
    shade[np.abs(x - 0.5) < 0.004] = 0.5
    for wheel in (0.2, 0.8):
        radius = np.hypot((x - wheel) * 4.5, (y - 0.32 / height_m) * height_m)
        shade[radius < 0.36] = 0.08
        shade[radius < 0.2] = rng.uniform(0.5, 1.0)
    shade[y < 0.17 / height_m] *= 0.15
    return Pattern(levels(shade), None, (height_m, 4.5))


def sprite(cover_MN: NDArray, shade_MN: NDArray, glow_MN: NDArray | None = None) -> Sprite:
    """Levels of half the size down to 8 samples, with a clear border, so that edges blend in."""
    glow = np.zeros_like(cover_MN) if glow_MN is None else glow_MN
    level = np.stack([cover_MN, shade_MN * cover_MN, glow]).astype(np.float32)
    level[:, [0, -1], :] = 0.0
    level[:, :, [0, -1]] = 0.0
    levels = [level]
    while min(level.shape[1:]) > 8:
        level = (level[:, ::2, ::2] + level[:, 1::2, ::2] + level[:, ::2, 1::2] + level[:, 1::2, 1::2]) / np.float32(
            4
        )
        levels.append(level)
    return Sprite(tuple(levels))


def tree(rng: Generator) -> Sprite:
    """Crown of leaves on a trunk, 256 x 256."""
    y, x = np.mgrid[0:256, 0:256].astype(np.float32) / 2
    cover = np.zeros((256, 256), bool)
    for _ in range(14):
        cx, cy, radius = rng.normal(64, 18), rng.normal(48, 13), rng.uniform(13, 25)
        cx, cy = np.clip(cx, radius + 3, 125 - radius), max(cy, radius + 3)
        cover |= np.hypot(x - cx, y - cy) < radius
    edge = 0.5 * unit_noise(rng, 256, 256, 1.6) + 0.7 * unit_noise(rng, 256, 256, 4.0)
    crown = cover & (edge > -1.2 + 0.012 * np.hypot(x - 64, y - 46))
    trunk = (np.abs(x - 64) < 3) & (y > 60)
    leaves = 0.3 * unit_noise(rng, 256, 256, 1.5) + 0.35 * unit_noise(rng, 256, 256, 7.0)
    shade = np.where(crown, np.clip(np.exp(leaves - 0.012 * (y - 40)), 0.1, 2.6), 0.35)
    return sprite((crown | trunk).astype(np.float32), shade)


def car_end(rng: Generator, front: bool, tall: bool) -> Sprite:
    """Rear or front of a car or van, 128 x 128: body, window, lights, plate, wheels. Glow: its lights."""
    y, x = np.mgrid[0:128, 0:128].astype(np.float32)
    off = np.abs(x - 63.5)
    shoulder = 62 if tall else 52
    roof = 4 if tall else rng.integers(6, 14)
    half = np.where(y < shoulder, 44 + (y - roof) * (14 / (shoulder - roof)), 60.0)
    half = np.where(y > 108, 60.0 * (off > 36), half)
    cover = (off < half) & (y > roof) & (y < 124)
    shade = np.where(y < shoulder, 1.15, 1.0) - 0.002 * (y - 40)
    window = (y > roof + 6) & (y < shoulder - 3) & (off < half - 6)
    shade[window] = 0.12 + 0.25 * (((x - y)[window] % 64) < 12)
    shade[(y > 82) & (y < 96) & (off < 18)] = 1.7
    shade[(y > 100) & (off < 56)] = 0.35
    shade[y > 108] = 0.08
    lights = (off > 40) & (off < 57) & (y > 62) & (y < (76 if front else 80))
    shade[lights] = 1.8 if front else 0.9
    return sprite(cover.astype(np.float32), shade, lights.astype(np.float32))


def crossing_car(rng: Generator) -> Sprite:
    """Return a whole car from the side, driving across, 128 x 128."""
    y, x = np.mgrid[0:128, 0:128].astype(np.float32)
    cabin = (y > 20) & (y < 66) & (np.abs(x - 62) < 26 + (y - 20) * 0.45)
    body = (y >= 60) & (y < 108) & (np.abs(x - 63.5) < 61)
    wheels = np.zeros_like(body)
    for centre in (28, 99):
        wheels |= np.hypot(x - centre, (y - 108) / 2.4) < 9
    shade = np.full(y.shape, 1.0)
    shade[cabin & (y > 26) & (np.abs(x - 62) > 3)] = 0.18
    shade[(y > 98) | wheels] = 0.1
    shade[(y > 70) & (y < 76)] = rng.uniform(0.7, 1.4)
    return sprite((cabin | body | wheels).astype(np.float32), shade, ((x > 118) & (y > 66) & (y < 76)))


def walker(rng: Generator) -> Sprite:
    """Somebody on foot, 64 x 64."""
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)
    head = np.hypot(x - 32, y - 8) < 6
    trunk = (y > 14) & (y < 38) & (np.abs(x - 32) < 11)
    legs = (y >= 36) & (y < 63) & (np.abs(np.abs(x - 32) - (y - 34) * 0.22) < 4.5)
    shade = np.where(head, 1.4, np.where(trunk, 1.0, rng.uniform(0.2, 0.6)))
    return sprite((head | trunk | legs).astype(np.float32), shade)


def make_patterns(rng: Generator) -> dict[str, Pattern]:
    """Every pattern that a wall may name."""
    plain = Pattern(np.ones((1, 1, 1), np.float32), None, (1.0, 1.0))
    made = {"plain": plain, "hedge": hedge(rng), "fence": fence(rng)}
    made |= {"car_side": flank(rng, 1.45), "van_side": flank(rng, 2.42)}
    return made | {f"facade{i}": facade(rng) for i in range(3)}


def make_sprites(rng: Generator) -> dict[str, Sprite]:
    """Every sprite that a board may name."""
    made = {"crossing_car": crossing_car(rng), "walker": walker(rng)}
    for kind, tall in (("car", False), ("van", True)):
        made |= {f"{kind}_front": car_end(rng, True, tall), f"{kind}_rear": car_end(rng, False, tall)}
    return made | {f"tree{i}": tree(rng) for i in range(3)}
