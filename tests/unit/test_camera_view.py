"""Frames in the event camera's view: hand-worked projections, an independent formulation, and what a filter owes.

The real constants are those of one camera group of DSEC.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dsec_writer import HEIGHT, MADE_UP, RGB_HEIGHT, RGB_WIDTH, WIDTH, rectify_map, undistorted_rays

from ray_app.errors import InputError
from ray_app.events.camera_view import (
    EventView,
    Pinhole,
    Rectangle,
    StereoCalibration,
    event_view,
    frame_places,
    largest_part,
)


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "dsec_calibration.json").read_text())


@pytest.fixture(scope="module")
def rays(real: dict[str, Any]) -> np.ndarray:
    return undistorted_rays(real)


@pytest.fixture(scope="module")
def table(real: dict[str, Any]) -> np.ndarray:
    return rectify_map(real)


@pytest.fixture(scope="module")
def places(real: dict[str, Any], table: np.ndarray) -> np.ndarray:
    return frame_places(rig_of(real), table)


@pytest.fixture(scope="module")
def view(real: dict[str, Any], table: np.ndarray) -> EventView:
    return event_view(rig_of(real), table)


def rig_of(constants: dict[str, Any]) -> StereoCalibration:
    return StereoCalibration(
        event=Pinhole(*constants["camRect0"]),
        frame=Pinhole(*constants["camRect1"]),
        rotation_10=np.array(constants["T_10"])[:3, :3],
        rectify_0=np.array(constants["R_rect0"]),
        rectify_1=np.array(constants["R_rect1"]),
        frame_width=RGB_WIDTH,
        frame_height=RGB_HEIGHT,
    )


def flat_view(scale: int, width: int = 32, height: int = 24) -> EventView:
    """Parallel cameras without distortion, `scale` frame pixels for each event pixel, both from the upper left."""
    event, frame = Pinhole(10, 10, 0, 0), Pinhole(10 * scale, 10 * scale, (scale - 1) / 2, (scale - 1) / 2)
    rows, columns = np.mgrid[:height, :width]
    same = np.stack([columns, rows], axis=-1).astype(np.float32)
    return event_view(
        StereoCalibration(event, frame, np.eye(3), np.eye(3), np.eye(3), width * scale, height * scale),
        same,
    )


def test_a_projection_worked_by_hand() -> None:
    """Parallel cameras: pixel (335 + 57, 221 − 114) is the ray (0.1, −0.2, 1), so 714 + 116.5 and 571 − 233."""
    place = frame_places(rig_of(MADE_UP), np.array([392.0, 107.0]))
    assert place == pytest.approx([830.5, 338.0])


def test_a_turned_camera_worked_by_hand() -> None:
    """Frames taken 45° to the right: a ray straight ahead, at the event axis, is 45° to their left."""
    turn = np.array([[0.5**0.5, 0, -(0.5**0.5)], [0, 1, 0], [0.5**0.5, 0, 0.5**0.5]])
    rig = rig_of(MADE_UP | {"T_10": np.block([[turn, np.zeros((3, 1))], [np.eye(4)[3:]]])})
    assert frame_places(rig, np.array([335.0, 221.0])) == pytest.approx([714 - 1165, 571])
    assert np.isnan(frame_places(rig, np.array([335.0 - 600, 221.0]))).all()  # behind the frame camera


def test_the_real_axis_worked_by_hand(real: dict[str, Any]) -> None:
    """The rectified event axis (0, 0, 1) through the transposed rectification, the turn, and the other one.

    R_rect0ᵀ e3 is the third row of R_rect0; the rest is dot products, worked in decimals to six places.
    """
    ray = np.array([-0.011475, 0.003492, 0.999928])
    turned = np.array(
        [
            0.999687 * ray[0] + 0.009652 * ray[1] + 0.023064 * ray[2],
            -0.009722 * ray[0] + 0.999948 * ray[1] + 0.002920 * ray[2],
            -0.023034 * ray[0] - 0.003144 * ray[1] + 0.999730 * ray[2],
        ]
    )
    assert turned == pytest.approx([0.011624, 0.006523, 0.999911], abs=2e-6)
    straight = np.array(
        [
            0.999857 * turned[0] - 0.013026 * turned[1] - 0.010764 * turned[2],
            0.013061 * turned[0] + 0.999910 * turned[1] + 0.003182 * turned[2],
            0.010722 * turned[0] - 0.003322 * turned[1] + 0.999937 * turned[2],
        ]
    )
    by_hand = 1164.6238 * straight[:2] / straight[2] + [713.5791, 570.9349]
    place = frame_places(rig_of(real), np.array(real["camRect0"][2:]))
    assert place == pytest.approx(by_hand, abs=0.01)
    assert place == pytest.approx([714.48, 582.42], abs=0.05)


def test_the_event_camera_sees_the_part_of_the_frame_that_is_known_of_the_real_one(
    table: np.ndarray, places: np.ndarray
) -> None:
    assert table[0, 0] == pytest.approx([-6.2, -0.1], abs=0.05)
    assert table[-1, -1] == pytest.approx([645.9, 491.5], abs=0.05)
    assert np.rint(places[..., 0].min()) == 8
    assert np.rint(places[..., 0].max()) == 1360
    assert np.rint(places[..., 1].min()) == 123
    assert np.rint(places[..., 1].max()) == 1142
    assert (places[..., 1] > RGB_HEIGHT - 0.5).mean() == pytest.approx(0.058, abs=0.0005)
    right = np.diff(places[..., 0], axis=1)[200:280, 280:360]
    assert right.mean() == pytest.approx(2.10, abs=0.01)


def test_the_map_is_what_each_raw_pixels_ray_hits_and_rectification_cancels(
    real: dict[str, Any], rays: np.ndarray, places: np.ndarray
) -> None:
    """Independent: K_r1 · R_rect1 · R_10 · ray, where the ray is the raw pixel without distortion."""
    rays = rays @ np.array(real["T_10"])[:3, :3].T @ np.array(real["R_rect1"]).T
    fx, fy, cx, cy = real["camRect1"]
    direct = np.stack([fx * rays[..., 0] / rays[..., 2] + cx, fy * rays[..., 1] / rays[..., 2] + cy], axis=-1)
    assert np.abs(direct - places).max() < 1e-3  # rectify_map is float32


@pytest.mark.parametrize("distance_m", [5, 10, 20, 50, 1e6])
def test_near_things_are_off_by_the_parallax(
    real: dict[str, Any], rays: np.ndarray, places: np.ndarray, distance_m: float
) -> None:
    """A point projected with the 4.6 cm between the cameras, against the same without: f · baseline / distance."""
    point = rays[240, 320] * distance_m
    transform = np.array(real["T_10"])
    seen = np.array(real["R_rect1"]) @ (transform[:3, :3] @ point + transform[:3, 3])
    fx, fy, cx, cy = real["camRect1"]
    hit = np.array([fx * seen[0] / seen[2] + cx, fy * seen[1] / seen[2] + cy])
    away = np.linalg.norm(places[240, 320] - hit) / 2.1
    by_hand = fx * np.linalg.norm(transform[:2, 3]) / distance_m / 2.1
    assert away == pytest.approx(by_hand, rel=0.01, abs=1e-4)
    assert by_hand == pytest.approx(24.5 / distance_m, rel=0.01), "2.4 event pixels at 10 m"


def test_the_common_part_is_valid_throughout_and_cuts_the_real_bottom_alone(
    view: EventView, places: np.ndarray
) -> None:
    assert view.box == 2
    assert view.crop.of(view.valid_HW).all()
    assert (view.crop.top, view.crop.left, view.crop.right) == (0, 0, WIDTH)
    assert 440 <= view.crop.bottom <= 452
    assert not view.valid_HW[view.crop.bottom].all()
    assert (~view.valid_HW).mean() == pytest.approx(0.058, abs=0.002)
    # A pixel is valid where its whole 2 x 2 box and the sample next to it are: half a pixel within the border.
    assert np.array_equal(view.valid_HW, places[..., 1] <= RGB_HEIGHT - 1.5)


def test_a_ramp_comes_out_as_its_value_at_each_place(view: EventView, places: np.ndarray) -> None:
    """Averages and bilinear samples of a plane are the plane, up to rounding (1/2 for uint8, 1/256 px)."""
    rows, columns = np.mgrid[:RGB_HEIGHT, :RGB_WIDTH]
    frame = np.stack([columns / 8, rows / 8, (columns + rows) / 16], axis=-1).astype(np.uint8)
    frame_floor = np.stack([columns // 8, rows // 8, (columns + rows) // 16], axis=-1)
    assert np.array_equal(frame, frame_floor)
    places = view.crop.of(places)
    want = np.stack([places[..., 0] / 8, places[..., 1] / 8, places.sum(axis=-1) / 16], axis=-1) - 7 / 16
    got = view.target(frame)
    assert got.shape == (view.crop.bottom, WIDTH, 3)
    assert np.abs(got - want).max() < 1.0  # the ramp has steps of its own, half a unit either way
    assert np.abs((got - want).mean(axis=(0, 1))).max() < 0.05


def test_the_filter_against_float_arithmetic_pixel_by_pixel(view: EventView, places: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (RGB_HEIGHT, RGB_WIDTH, 3), dtype=np.uint8)
    got = view.target(frame)
    for row, column in rng.integers(0, (view.crop.bottom, WIDTH), (200, 2)).tolist():
        x, y = np.rint((places[row, column] - 0.5) * 256) / 256
        i, j = int(y), int(x)
        boxes = [frame[i + a : i + a + 2, j + b : j + b + 2].mean(axis=(0, 1)) for a in (0, 1) for b in (0, 1)]
        weights = [(1 - y + i) * (1 - x + j), (1 - y + i) * (x - j), (y - i) * (1 - x + j), (y - i) * (x - j)]
        want = sum(weight * box for weight, box in zip(weights, boxes, strict=True))
        assert np.abs(got[row, column] - want).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_whole_scales_are_plain_block_means(scale: int) -> None:
    view = flat_view(scale)
    frame = np.random.default_rng(1).integers(0, 256, (24 * scale, 32 * scale, 3), dtype=np.uint8)
    blocks = frame.reshape(24, scale, 32, scale, 3).mean(axis=(1, 3))
    assert view.box == scale
    assert view.crop == Rectangle(0, 24, 0, 32)
    assert np.array_equal(view.target(frame), np.floor(blocks + 0.5))


def test_a_pattern_finer_than_an_event_pixel_becomes_grey_and_does_not_alias(view: EventView) -> None:
    frame = np.zeros((RGB_HEIGHT, RGB_WIDTH, 3), np.uint8)
    frame[:, ::2] = 255
    got = view.target(frame)
    assert got.min() >= 127
    assert got.max() <= 128


def test_a_frame_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="has 63 x 48 pixels, but its calibration is for 64 x 48"):
        flat_view(2).target(np.zeros((48, 63, 3), np.uint8))


def test_the_largest_part_cuts_all_sides_and_no_more() -> None:
    mask = np.ones((20, 30), bool)
    mask[:2], mask[-3:], mask[:, :4], mask[:, -1:] = False, False, False, False
    assert largest_part(mask) == Rectangle(2, 17, 4, 29)
    assert largest_part(np.ones((3, 4), bool)) == Rectangle(0, 3, 0, 4)
    bent = np.ones((HEIGHT, WIDTH), bool)
    bent[440 + (np.arange(WIDTH) - 320) ** 2 // 10_000, np.arange(WIDTH)] = False
    for column in range(WIDTH):
        bent[440 + (column - 320) ** 2 // 10_000 :, column] = False
    assert largest_part(bent) == Rectangle(0, 440, 0, WIDTH)


def test_cameras_without_a_common_part_are_refused() -> None:
    with pytest.raises(InputError, match="no part of the view in common"):
        largest_part(np.zeros((4, 5), bool))
    holed = np.ones((9, 9), bool)
    holed[4, 4] = False
    with pytest.raises(InputError, match="has holes"):
        largest_part(holed)
