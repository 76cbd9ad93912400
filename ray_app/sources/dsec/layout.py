"""Files of a DSEC sequence, its image times, and its calibration.

Two layouts. The tree of the coarse archives:

    ROOT/{train,test}/<seq>/events/left/{events.h5,rectify_map.h5}
                           /images/timestamps.txt
                           /images/left/rectified/%06d.png
                           /calibration/cam_to_cam.yaml

and the flat names of archives for one sequence each, side by side in ROOT or in a folder for each sequence:
`<seq>_events_left/`, `<seq>_images_rectified_left/`, `<seq>_image_timestamps.txt`, `<seq>_calibration/`. In a
folder that bears the sequence's name they may go without `<seq>_`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.camera_view import EventView, Pinhole, StereoCalibration, event_view
from ray_app.listing import data_in
from ray_app.parsing.text import read_utf8
from ray_app.parsing.yaml_text import parse_yaml
from ray_app.sources.dsec.hdf5 import require_whole
from ray_app.sources.images import read_image

MAP_SHAPE = (480, 640, 2)
"""Shape of the map from raw event pixels to rectified places."""
FRAME_SIZE = (1440, 1080)
"""Columns and rows of DSEC's rectified frames, where the calibration does not tell."""


@dataclass(frozen=True, slots=True)
class DsecSequence:
    """The files of one sequence's left cameras."""

    name: str
    """Name of the drive."""
    folder: Path
    """Folder of its files, by `find_sequences`."""
    events: Path
    """events.h5"""
    timestamps: Path
    """Image times, a line each."""
    images: Path
    """Folder of rectified frames."""
    calibration: Path | None
    """cam_to_cam.yaml, where it is present."""

    def frame(self, number: int) -> NDArray[np.uint8]:
        """Return a frame, (h, w, 3). InputError: missing or unreadable."""
        return read_image(self.images / f"{number:06d}.png")

    def times_us(self) -> NDArray[np.int64]:
        """Image times, rising. InputError: not such a file, or not as many as frames."""
        times = _read_times(self.timestamps)
        frames = sum(path.suffix == ".png" for path in data_in(self.images))
        if frames != len(times):
            raise InputError(
                f"{self.images} holds {frames} frames, but {self.timestamps} {len(times)} times; is a download "
                "incomplete?"
            )
        return times

    def view(self) -> EventView:
        """Return the map from its frames to its event camera. InputError: calibration missing or damaged."""
        if self.calibration is None:
            raise InputError(
                f"sequence '{self.name}' has no calibration/cam_to_cam.yaml; add it, or take --align none"
            )
        rig, table = read_rig(self.calibration), read_rectify_map(self.rectify_map())
        try:
            return event_view(rig, table)
        except InputError as error:
            raise InputError(f"sequence '{self.name}': {error}") from error

    def rectify_map(self) -> Path:
        """Return the file of it. InputError: missing."""
        folder = self.events.parent
        names = ("rectify_map.h5", "rectify_maps.h5")  # what files and code say, and what the documentation says
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise InputError(f"{folder / names[0]} is missing; add it, or take --align none")
        return found


def find_sequences(root: Path) -> list[tuple[Path, str]]:
    """(folder, name) of each sequence below a dataset's top folder, sorted by name.

    InputError: no such folder, none in it, a link that leads nowhere, one drive twice.
    """
    if root.is_symlink() and not root.exists():
        raise InputError(_dead_link(root))
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; `prepare dsec` wants the dataset's top folder")
    try:
        found = _found(root)
    except OSError as error:
        raise InputError(f"{error.filename or root} cannot be read: {error.strerror}") from error
    if not found:
        raise InputError(
            f"{root} holds no DSEC sequence; it needs train/<seq>/events/left/events.h5 and images/ next to it, or "
            "<seq>_events_left/, <seq>_images_rectified_left/ and <seq>_image_timestamps.txt"
        )
    return [(found[name], name) for name in sorted(found)]


def sequence_in(folder: Path, name: str) -> DsecSequence:
    """Return the files of a sequence from `find_sequences`. InputError: one that every pair needs is missing."""
    events = _first(folder, name, "events/left/events.h5", "events_left/events.h5")
    timestamps = _first(folder, name, "images/timestamps.txt", "image_timestamps.txt")
    images = _first(folder, name, "images/left/rectified", "images_rectified_left")
    for what, path in (("events", events), ("image times", timestamps), ("frames", images)):
        if not path.exists():
            raise InputError(
                f"sequence '{name}' has no {what}: {path} is missing; add it, or move the sequence out of the folder"
            )
    calibration = _first(folder, name, "calibration/cam_to_cam.yaml", "calibration/cam_to_cam.yaml")
    return DsecSequence(name, folder, events, timestamps, images, calibration if calibration.exists() else None)


def read_rig(path: Path) -> StereoCalibration:
    """Return the left cameras of a cam_to_cam.yaml. InputError: no YAML, or a camera or rotation that is missing."""
    try:
        lines = read_utf8(path).splitlines()
        content = parse_yaml("\n".join(line for line in lines if not line.startswith("%YAML")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error

    def value(group: str, *keys: str) -> Any:
        here = content
        for key in (group, *keys):
            if not isinstance(here, dict) or key not in here:
                raise InputError(
                    f"{path} has no {'.'.join((group, *keys))}; --align far-field needs the cameras camRect0 "
                    "(events) and camRect1 (frames), and T_10, R_rect0 and R_rect1"
                )
            here = here[key]
        return here

    def numbers(shape: tuple[int, ...], *keys: str) -> NDArray[np.float64]:
        try:
            array = np.array(value(*keys), np.float64)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"{path}: {'.'.join(keys)} holds something that is no number") from error
        if array.shape != shape or not np.isfinite(array).all():
            raise InputError(f"{path}: {'.'.join(keys)} has shape {array.shape}; it must be {shape}, all finite")
        return array

    def pinhole(camera: str) -> Pinhole:
        fx, fy, cx, cy = numbers((4,), "intrinsics", camera, "camera_matrix").tolist()
        if fx <= 0 or fy <= 0:
            raise InputError(f"{path}: {camera} has the focal lengths {fx} and {fy}; they must be above 0")
        return Pinhole(fx, fy, cx, cy)

    event, frame = pinhole("camRect0"), pinhole("camRect1")
    width, height = FRAME_SIZE
    if "resolution" in value("intrinsics", "camRect1"):
        width, height = (int(n) for n in numbers((2,), "intrinsics", "camRect1", "resolution"))
        if min(width, height) < 2:
            raise InputError(f"{path}: camRect1 has a resolution of {width} x {height} pixels")
    return StereoCalibration(
        event=event,
        frame=frame,
        rotation_10=numbers((4, 4), "extrinsics", "T_10")[:3, :3],
        rectify_0=numbers((3, 3), "extrinsics", "R_rect0"),
        rectify_1=numbers((3, 3), "extrinsics", "R_rect1"),
        frame_width=width,
        frame_height=height,
    )


def read_rectify_map(path: Path) -> NDArray[np.floating]:
    """(480, 640, 2) rectified place of each raw event pixel. InputError: damaged, or of another shape."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            dataset = file.get("rectify_map")
            if isinstance(dataset, h5py.Dataset):
                require_whole(dataset, path)
            shape, dtype = getattr(dataset, "shape", None), getattr(dataset, "dtype", np.dtype(np.void))
            if shape != MAP_SHAPE or not np.issubdtype(dtype, np.floating):  # before it is read: it may be huge
                raise InputError(
                    f"{path}: 'rectify_map' has shape {shape} and type {dtype}; it must be {MAP_SHAPE}, floats"
                )
            array: NDArray[np.floating] = dataset[()]
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error
    return array


def _found(root: Path) -> dict[str, Path]:
    """Folder of each sequence by name."""
    found: dict[str, Path] = {}
    for folder in [root, *_folders(root), *(f for part in ("train", "test") for f in _folders(root / part))]:
        for name in _names(folder):
            if name in found:
                raise InputError(f"sequence '{name}' is there twice: in {found[name]} and in {folder}")
            found[name] = folder
    return found


def _names(folder: Path) -> list[str]:
    """Sequences whose parts are in this folder: its own name for the tree, the files' for flat names."""
    names = {
        entry.name.removesuffix(ending)
        for ending in ("_events_left", "_images_rectified_left", "_image_timestamps.txt")
        for entry in data_in(folder)
        if entry.name.endswith(ending) and entry.name != ending
    }
    if any((folder / part).exists() for part in ("events/left", "events_left", "images/timestamps.txt")):
        names.add(folder.name)
    return sorted(names)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    found = data_in(parent)
    for entry in found:
        if entry.is_symlink() and not entry.exists():
            raise InputError(_dead_link(entry))
    return [entry for entry in found if entry.is_dir()]


def _dead_link(path: Path) -> str:
    return f"{path} is a symbolic link that leads nowhere, or back to itself; remove it or fix it"


def _first(folder: Path, name: str, tree: str, flat: str) -> Path:
    """Return the part's place by the tree or by flat names, whichever exists; else where it is missing."""
    own = [folder / tree, folder / flat] if folder.name == name else []
    places = [*own, folder / f"{name}_{flat}"]
    return next((place for place in places if place.exists()), places[0])


def _read_times(path: Path) -> NDArray[np.int64]:
    try:
        lines = read_utf8(path).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    times: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit()) or len(text) > 18:
            raise InputError(f"{path}, line {number}: '{text[:40]}' is no time in whole microseconds")
        if times and int(text) <= times[-1]:
            raise InputError(f"{path}, line {number}: {text} µs does not come after {times[-1]} µs")
        times.append(int(text))
    if not times:
        raise InputError(f"{path} holds no time")
    return np.array(times, np.int64)
