"""A long drive in the true DSEC format, written second by second: as many events and as hard to read as real ones.

Events of a second are drawn on moving edges: on three real 50 ms windows the columns take 2.7 to 3.0 bytes an event
as DSEC compresses them, here 2.9. Frames are real PNG files of a rolling texture.

Shapes: N = events of one second, H, W = frame rows and columns.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from dsec_writer import (
    BLOSC,
    HEIGHT,
    MADE_UP,
    RGB_HEIGHT,
    RGB_WIDTH,
    WIDTH,
    DsecFiles,
    rectify_map,
    write_calibration,
)
from numpy.typing import NDArray
from PIL import Image

SECOND_US = 1_000_000
FRAME_EVERY_US = 50_000
CLOCK_STARTS_US = 49_599_300_776
FIRST_FRAME_US = CLOCK_STARTS_US + 2_300
NUM_EDGE_PIXELS = 40_000
"""Pixels that fire at one time: 13 % of the sensor; real parts of a window touch 5 to 9 %, whole ones 14 to 30 %."""
PAN_PIXELS_PER_S = 60
CHUNK_BYTES = 164_090
"""As h5py chooses it for some 300 million events in one go."""
TYPES = {"x": "<u2", "y": "<u2", "p": "|u1", "t": "<u4"}


def write_drive(root: Path, name: str, num_seconds: int, events_per_s: int, seed: int = 0) -> DsecFiles:
    """Write the whole sequence, unless it exists. Unfinished files have another name."""
    files = DsecFiles(root, name)
    if files.events.exists():
        return files
    write_frames(files, num_seconds, seed)
    write_calibration(files.calibration, MADE_UP, (RGB_WIDTH, RGB_HEIGHT))
    files.events.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(files.rectify_map, "w") as file:
        file["rectify_map"] = rectify_map(MADE_UP)
    partial = files.events.with_suffix(".partial")
    write_long_events(partial, seconds(num_seconds, events_per_s, seed), num_seconds)
    os.replace(partial, files.events)
    return files


def seconds(num_seconds: int, events_per_s: int, seed: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Columns of each second: edges that pan to the left, one polarity on each side, a tenth of it noise."""
    rng = np.random.default_rng(seed)
    edge_x, edge_y, edge_p = edges(rng)
    for second in range(num_seconds):
        counts = rng.poisson(events_per_s / SECOND_US, SECOND_US)
        t = np.repeat(np.arange(SECOND_US, dtype=np.uint32), counts) + np.uint32(second * SECOND_US)
        at = rng.integers(0, NUM_EDGE_PIXELS, len(t), np.int32)
        pan = (t // np.uint32(SECOND_US // PAN_PIXELS_PER_S)).astype(np.int32)
        x = (edge_x[at] - pan) % WIDTH
        p = edge_p[at] ^ (rng.integers(0, 10, len(t), np.uint8) == 0)
        yield {"x": x.astype(np.uint16), "y": edge_y[at], "p": p.astype(np.uint8), "t": t}


def edges(rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.bool_]]:
    """Pixels of wavy lines from top to bottom, 10 wide, the left half of each darker."""
    thickness, lines = 10, NUM_EDGE_PIXELS // (10 * HEIGHT) + 1
    y = np.tile(np.repeat(np.arange(HEIGHT), thickness), lines)
    line = np.repeat(np.arange(lines), HEIGHT * thickness)
    side = np.tile(np.arange(thickness), lines * HEIGHT)
    waves = rng.uniform(10, 40, lines)[line] * np.sin(y / rng.uniform(20, 90, lines)[line])
    x = (line * WIDTH // lines + waves + side).astype(np.int32)
    keep = rng.permutation(len(y))[:NUM_EDGE_PIXELS]
    return x[keep], y[keep].astype(np.uint16), side[keep] >= thickness // 2


def write_long_events(path: Path, parts: Iterator[dict[str, NDArray[Any]]], num_seconds: int) -> None:
    """Write events.h5 from parts of one second, with one of them in memory at a time."""
    with h5py.File(path, "w") as file:
        count, index = 0, np.zeros(num_seconds * 1000, np.uint64)
        for second, part in enumerate(parts):
            for name, column in part.items():
                if second == 0:
                    chunks = (CHUNK_BYTES // column.itemsize,)
                    file.create_dataset(f"events/{name}", (0,), TYPES[name], maxshape=(None,), chunks=chunks, **BLOSC)
                dataset = file[f"events/{name}"]
                dataset.resize((count + len(column),))
                dataset[count:] = column
            starts = np.searchsorted(part["t"], (np.arange(1000) + second * 1000) * 1000, side="left")
            index[second * 1000 : (second + 1) * 1000] = count + starts
            count += len(part["t"])
        file.create_dataset("ms_to_idx", data=index, chunks=True, **BLOSC)
        file["t_offset"] = np.int64(CLOCK_STARTS_US)


def write_frames(files: DsecFiles, num_seconds: int, seed: int) -> None:
    """PNG files of 1440 x 1080 pixels: a cloudy texture with grain that rolls by, about as large as real frames."""
    times_us = range(FIRST_FRAME_US, CLOCK_STARTS_US + num_seconds * SECOND_US, FRAME_EVERY_US)
    files.images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 220, (12, 16, 3), np.uint8)
    clouds = np.asarray(Image.fromarray(coarse).resize((2 * RGB_WIDTH, RGB_HEIGHT), Image.Resampling.BICUBIC))
    scene = np.clip(clouds.astype(np.int16) + rng.integers(-6, 7, clouds.shape), 0, 255).astype(np.uint8)
    for number in range(len(times_us)):
        left = number * 3 % RGB_WIDTH
        image = Image.fromarray(scene[:, left : left + RGB_WIDTH])
        image.save(files.images / f"{number:06d}.png", compress_level=1)
    files.timestamps.parent.mkdir(parents=True, exist_ok=True)
    files.timestamps.write_text("".join(f"{t}\n" for t in times_us))
