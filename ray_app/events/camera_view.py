"""A camera's frame as the event camera sees it, for things far away, and the part that both cameras see.

Both cameras stand 5 cm apart on one car. What is at infinite depth moves from one picture to the other by a
homography of the rectified cameras, whatever its distance:

    P = K_r1 · R_rect1 · R_10 · R_rect0ᵀ · K_r0⁻¹

`rectify_map` brings a raw event pixel into the rectified event camera, P from there into the frame. Nearer things
are off by the parallax (DSEC: 5.2, 2.6, 1.3, 0.5 event pixels at 5, 10, 20, 50 m).

A frame has about 2.1 pixels for each event pixel. So that fine patterns do not alias it is averaged over a box of
as many pixels (2 x 2) and then sampled bilinearly, in whole numbers: any machine makes the same bytes.

Shapes: H, W = event rows and columns; h, w = rows and columns of the common part.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError

Matrix = NDArray[np.float64]

FRACTION_BITS = 8
"""Places in a frame are rounded to 1/256 pixel."""
ONE = 1 << FRACTION_BITS
LARGEST_BOX = 8
"""Pixels; sums of a box times both weights fit 32 bits up to here."""


@dataclass(frozen=True, slots=True)
class Pinhole:
    """A rectified camera: x = fx · X/Z + cx, y = fy · Y/Z + cy."""

    fx: float
    """Focal length in pixels, to the right."""
    fy: float
    """Focal length in pixels, down."""
    cx: float
    """Column of the optical axis."""
    cy: float
    """Row of the optical axis."""

    def matrix(self) -> Matrix:
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], np.float64)

    def inverse(self) -> Matrix:
        return np.array(
            [[1 / self.fx, 0, -self.cx / self.fx], [0, 1 / self.fy, -self.cy / self.fy], [0, 0, 1]], np.float64
        )


@dataclass(frozen=True, slots=True)
class StereoCalibration:
    """An event camera (0) and a frame camera (1)."""

    event: Pinhole
    """Rectified event camera."""
    frame: Pinhole
    """Rectified frame camera."""
    rotation_10: Matrix
    """(3, 3) from the event camera's axes to the frame camera's."""
    rectify_0: Matrix
    """(3, 3) from the event camera's axes to its rectified axes."""
    rectify_1: Matrix
    """(3, 3) from the frame camera's axes to its rectified axes."""
    frame_width: int
    """Frame columns."""
    frame_height: int
    """Frame rows."""

    def homography(self) -> Matrix:
        """P: rectified event pixel to frame pixel for what is infinitely far, (3, 3)."""
        return _product(self.frame.matrix(), self.rectify_1, self.rotation_10, self.rectify_0.T, self.event.inverse())


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows [top, bottom) and columns [left, right) of the event camera."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, image: NDArray[Any]) -> NDArray[Any]:
        """Return the rectangle of an (H, W, …) array: a view."""
        return image[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, slots=True)
class EventView:
    """Map from frames of one rig to pictures of its event camera. `event_view` makes it; a rig needs one."""

    valid_HW: NDArray[np.bool_]
    """True for event pixels whose part of the frame is wholly within it."""
    crop: Rectangle
    """The part that both sides are cut to: all of it is valid."""
    box: int
    """Pixels of the frame, right and down, that are averaged before sampling."""
    frame_width: int
    """Frame columns."""
    frame_height: int
    """Frame rows."""
    corner_hw: NDArray[np.intp]
    """Flat place of the upper left of four averages, in the picture of averages."""
    right_hw1: NDArray[np.int32]
    """Weight of the right two, in 1/256."""
    down_hw1: NDArray[np.int32]
    """Weight of the lower two, in 1/256."""

    def target(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the frame in the event camera's view, cut to the common part: (h, w, 3). InputError: its size."""
        if frame.shape != (self.frame_height, self.frame_width, 3):
            raise InputError(
                f"the frame has {frame.shape[1]} x {frame.shape[0]} pixels, but its calibration is for "
                f"{self.frame_width} x {self.frame_height}"
            )
        sums = _box_sums(frame, self.box)
        width = sums.shape[1]
        flat = sums.reshape(-1, 3)
        one, two, three, four = (flat.take(self.corner_hw + step, axis=0) for step in (0, 1, width, width + 1))
        upper, lower = _blend(one, two, self.right_hw1), _blend(three, four, self.right_hw1)
        total = _blend(upper, lower, self.down_hw1)
        whole = self.box * self.box * ONE * ONE
        return ((total + whole // 2) // whole).astype(np.uint8)


def frame_places(rig: StereoCalibration, rectified: NDArray[np.floating]) -> NDArray[np.float64]:
    """(…, 2) places in the frame of (…, 2) places of the rectified event camera; NaN where nothing is seen."""
    p = rig.homography()
    x, y = rectified[..., 0].astype(np.float64), rectified[..., 1].astype(np.float64)
    seen = [row[0] * x + row[1] * y + row[2] for row in p]
    depth = np.where(seen[2] > 0, seen[2], np.nan)  # behind the frame camera
    return np.stack([seen[0] / depth, seen[1] / depth], axis=-1)


def event_view(rig: StereoCalibration, rectify_map: NDArray[np.floating]) -> EventView:
    """Return the view of raw event pixels; `rectify_map` (H, W, 2) holds the rectified place of each.

    InputError: the two cameras have no part in common.
    """
    places = frame_places(rig, rectify_map)
    box = _box(places)
    margin = (box - 1) / 2
    x, y = places[..., 0] - margin, places[..., 1] - margin  # in the picture of averages
    columns, rows = rig.frame_width - box + 1, rig.frame_height - box + 1
    valid = (x >= 0) & (x <= columns - 1) & (y >= 0) & (y <= rows - 1)
    crop = largest_part(valid)
    left_256 = np.rint(crop.of(x) * ONE).astype(np.int64)
    top_256 = np.rint(crop.of(y) * ONE).astype(np.int64)
    left = np.minimum(left_256 >> FRACTION_BITS, columns - 2)
    top = np.minimum(top_256 >> FRACTION_BITS, rows - 2)
    return EventView(
        valid_HW=valid,
        crop=crop,
        box=box,
        frame_width=rig.frame_width,
        frame_height=rig.frame_height,
        corner_hw=(top * columns + left).astype(np.intp),
        right_hw1=(left_256 - left * ONE).astype(np.int32)[..., None],
        down_hw1=(top_256 - top * ONE).astype(np.int32)[..., None],
    )


def largest_part(valid_HW: NDArray[np.bool_]) -> Rectangle:
    """Return a rectangle without an invalid pixel: the side with most of them is cut off until none is left.

    InputError: nothing is left, or the mask has holes.
    """
    top, left = 0, 0
    bottom, right = valid_HW.shape
    while top < bottom and left < right:
        part = ~valid_HW[top:bottom, left:right]
        if not part.any():
            return Rectangle(top, bottom, left, right)
        shares = [part[0].mean(), part[-1].mean(), part[:, 0].mean(), part[:, -1].mean()]
        worst = int(np.argmax(shares))
        if not shares[worst]:
            raise InputError("the rectify_map has holes: pixels amid the picture that lead to no place in the frame")
        top, bottom = top + (worst == 0), bottom - (worst == 1)
        left, right = left + (worst == 2), right - (worst == 3)
    raise InputError("by this calibration the event camera and the frame camera have no part of the view in common")


def _box(places: NDArray[np.float64]) -> int:
    """Frame pixels for each event pixel, rounded: the root of the area that a pixel covers, in the middle."""
    rows, columns = places.shape[:2]
    middle = places[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]
    right, down = np.diff(middle, axis=1)[:-1], np.diff(middle, axis=0)[:, :-1]
    area = np.abs(right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0])
    scale = float(np.sqrt(np.nanmedian(area))) if np.isfinite(area).any() else 1.0
    return int(np.clip(round(scale), 1, LARGEST_BOX))


def _box_sums(frame: NDArray[np.uint8], box: int) -> NDArray[np.uint16]:
    """Return sums over box x box pixels, one for each place where the box fits; at most 64 x 255."""
    rows, columns = frame.shape[0] - box + 1, frame.shape[1] - box + 1
    across = np.zeros((frame.shape[0], columns, 3), np.uint16)
    for i in range(box):
        across += frame[:, i : i + columns]
    sums = np.zeros((rows, columns, 3), np.uint16)
    for i in range(box):
        sums += across[i : i + rows]
    return sums


def _blend(one: NDArray[Any], other: NDArray[Any], weight: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return (256 − weight) · one + weight · other."""
    total = np.subtract(other, one, dtype=np.int32)
    total *= weight
    total += np.multiply(one, ONE, dtype=np.int32)
    return total


def _product(first: Matrix, *others: Matrix) -> Matrix:
    """Product of 3 x 3 matrices, summed in a fixed order: a BLAS may sum in another on another processor."""
    result = first
    for other in others:
        terms = result[:, :, None] * other[None]
        result = terms[:, 0] + terms[:, 1] + terms[:, 2]
    return result
