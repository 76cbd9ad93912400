"""Writes small DSEC sequences in the true format: file names, dtypes, filters, time bases, calibration.

Shapes: H, W = 480, 640 event rows and columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import hdf5plugin
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from ray_app.events.recording import Events

WIDTH, HEIGHT = 640, 480
RGB_WIDTH, RGB_HEIGHT = 1440, 1080
BLOSC = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.BITSHUFFLE)

MADE_UP: dict[str, Any] = {
    "camRect0": [570.0, 570.0, 335.0, 221.0],
    "camRect1": [1165.0, 1165.0, 714.0, 571.0],
    "cam0": [556.0, 556.0, 342.0, 215.0],
    "cam0_distortion": [-0.09, 0.18, -0.0007, 0.0004],
    "T_10": np.eye(4).tolist(),
    "R_rect0": np.eye(3).tolist(),
    "R_rect1": np.eye(3).tolist(),
}
"""Constants in the form of a real camera group's, for where those are not at hand: parallel cameras."""


@dataclass(frozen=True)
class DsecFiles:
    """Where a sequence's parts are written: the tree of the coarse archives, or flat names for each sequence."""

    root: Path
    name: str
    layout: Literal["tree", "flat"] = "tree"
    part: str = "train"

    @property
    def events(self) -> Path:
        return self._at("events/left", "events_left") / "events.h5"

    @property
    def rectify_map(self) -> Path:
        return self.events.with_name("rectify_map.h5")

    @property
    def timestamps(self) -> Path:
        return self._at("images/timestamps.txt", "image_timestamps.txt")

    @property
    def images(self) -> Path:
        return self._at("images/left/rectified", "images_rectified_left")

    @property
    def calibration(self) -> Path:
        return self._at("calibration", "calibration") / "cam_to_cam.yaml"

    def _at(self, tree: str, flat: str) -> Path:
        if self.layout == "tree":
            return self.root / self.part / self.name / tree
        return self.root / f"{self.name}_{flat}"


def write_sequence(
    files: DsecFiles,
    events: Events,
    image_times_us: Iterable[int],
    constants: Mapping[str, Any] | None = MADE_UP,
    *,
    t_offset_us: int = 0,
    offset_form: Literal["scalar", "one", "absent"] = "scalar",
    rgb_size: tuple[int, int] = (RGB_WIDTH, RGB_HEIGHT),
    pictures: Sequence[NDArray[np.uint8]] | None = None,
) -> DsecFiles:
    """Write a whole sequence: `events` at absolute times, `pictures` as frames, or frames that show their number.

    No `constants`, no calibration.
    """
    write_events(files.events, events, t_offset_us, offset_form)
    times = list(image_times_us)
    files.timestamps.parent.mkdir(parents=True, exist_ok=True)
    files.timestamps.write_text("".join(f"{t}\n" for t in times))
    files.images.mkdir(parents=True, exist_ok=True)
    for i in range(len(times)):
        picture = pictures[i] if pictures else frame(i, *rgb_size)
        Image.fromarray(picture).save(files.images / f"{i:06d}.png", compress_level=1)
    if constants is not None:
        write_calibration(files.calibration, constants, rgb_size)
        with h5py.File(files.rectify_map, "w") as file:
            file["rectify_map"] = rectify_map(constants)
    return files


def write_events(
    path: Path,
    events: Events,
    t_offset_us: int = 0,
    offset_form: Literal["scalar", "one", "absent"] = "scalar",
    chunks: int | bool = True,
) -> None:
    """events.h5 of events at absolute times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = (events.t_us - t_offset_us).astype(np.uint32)
    index = ms_to_idx(t)
    columns = {"x": (events.x, "<u2"), "y": (events.y, "<u2"), "p": (events.p, "|u1"), "t": (t, "<u4")}
    cut = (chunks,) if not isinstance(chunks, bool) else chunks
    with h5py.File(path, "w") as file:
        for name, (column, dtype) in columns.items():
            file.create_dataset(f"events/{name}", data=column.astype(dtype), chunks=cut, **BLOSC)
        file.create_dataset("ms_to_idx", data=index, chunks=True, **BLOSC)
        if offset_form == "scalar":
            file["t_offset"] = np.int64(t_offset_us)
        elif offset_form == "one":
            file["t_offset"] = np.array([t_offset_us], np.int64)


def ms_to_idx(t: NDArray[Any]) -> NDArray[np.uint64]:
    """For each millisecond of the file's clock the first event at or after it."""
    wide = t.astype(np.int64)
    last = int(wide[-1]) // 1000 if len(wide) else -1
    return np.searchsorted(wide, np.arange(last + 1) * 1000, side="left").astype(np.uint64)


def write_calibration(path: Path, constants: Mapping[str, Any], rgb_size: tuple[int, int]) -> None:
    """cam_to_cam.yaml with the header that OpenCV writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    event_size = [WIDTH, HEIGHT]
    content = {
        "extrinsics": {name: constants[name] for name in ("T_10", "R_rect0", "R_rect1")},
        "intrinsics": {
            "cam0": {
                "camera_matrix": constants["cam0"],
                "distortion_coeffs": constants["cam0_distortion"],
                "distortion_model": "radtan",
                "resolution": event_size,
            },
            "camRect0": {"camera_matrix": constants["camRect0"], "resolution": event_size},
            "camRect1": {"camera_matrix": constants["camRect1"], "resolution": list(rgb_size)},
        },
    }
    path.write_text("%YAML:1.0\n---\n" + yaml.safe_dump(content, default_flow_style=None))


def rectify_map(constants: Mapping[str, Any]) -> NDArray[np.float32]:
    """(H, W, 2) raw event pixel to rectified (x, y): distortion off, rotation on, the rectified camera's matrix."""
    rays = undistorted_rays(constants) @ np.array(constants["R_rect0"]).T
    fx, fy, cx, cy = constants["camRect0"]
    x, y = rays[..., 0] / rays[..., 2], rays[..., 1] / rays[..., 2]
    return np.stack([fx * x + cx, fy * y + cy], axis=-1).astype(np.float32)


def undistorted_rays(constants: Mapping[str, Any]) -> NDArray[np.float64]:
    """(H, W, 3) direction in the frame of cam0 that each raw event pixel sees; radtan, by fixed-point iteration."""
    fx, fy, cx, cy = constants["cam0"]
    k1, k2, p1, p2 = constants["cam0_distortion"]
    v, u = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    seen_x, seen_y = (u - cx) / fx, (v - cy) / fy
    x, y = seen_x, seen_y
    for _ in range(30):
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 * r2
        dx = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        dy = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        x, y = (seen_x - dx) / radial, (seen_y - dy) / radial
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def frame(number: int, width: int = RGB_WIDTH, height: int = RGB_HEIGHT) -> NDArray[np.uint8]:
    """A frame whose blue is its number, with ramps to the right and down; never black."""
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    image[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    image[..., 2] = 10 + number
    return image


def random_events(count: int, t_start_us: int, t_end_us: int, seed: int = 0) -> Events:
    """Sorted events all over the sensor, in [t_start_us, t_end_us)."""
    rng = np.random.default_rng(seed)
    return Events(
        x=rng.integers(0, WIDTH, count).astype(np.uint16),
        y=rng.integers(0, HEIGHT, count).astype(np.uint16),
        t_us=np.sort(rng.integers(t_start_us, t_end_us, count)),
        p=rng.integers(0, 2, count).astype(np.uint8),
        width=WIDTH,
        height=HEIGHT,
    )
