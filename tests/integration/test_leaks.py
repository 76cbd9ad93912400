"""A planted leak of each kind is found, and where nothing is shared nothing is."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ray_app.commands.inspect.command import run_inspect
from ray_app.commands.inspect.scan import BRIGHT
from ray_app.commands.inspect.statistics import NIGHT_BELOW
from ray_app.config.base import SplitConfig
from ray_app.config.prepare import InspectConfig
from ray_app.core.image_similarity import CELLS, NEAR, brightness, descriptors, nearest
from ray_app.events.recording import Events
from ray_app.events.render import drawn_shares, event_image
from ray_app.sources.images import resized
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part
from ray_app.store.split import overlapping_row, split_pairs

SIZE = FeatureSpec(dtype="uint8", shape=(3, 64, 64), scale=1 / 255)
SECOND = 1_000_000


def view(seed: int, side: int = 64) -> NDArray[np.uint8]:
    """A picture of patches below a bright sky, (side, side, 3): no two seeds are alike but in the sky."""
    rng = np.random.default_rng(seed)
    patches = np.kron(rng.uniform(20, 150, (8, 8, 3)), np.ones((side // 8, side // 8, 1)))
    return np.clip(patches + np.linspace(90, 0, side)[:, None, None], 0, 255).astype(np.uint8)


def drawing(seed: int) -> NDArray[np.uint8]:
    """An event image with clusters of its own, (64, 64, 3)."""
    rng = np.random.default_rng(1000 + seed)
    centre_C2 = rng.uniform(5, 59, (8, 2))
    xy_N2 = np.clip(np.repeat(centre_C2, 60, axis=0) + rng.normal(0, 2.5, (480, 2)), 0, 63).astype(np.uint16)
    return event_image(
        Events(xy_N2[:, 0], xy_N2[:, 1], np.arange(480), rng.integers(0, 2, 480).astype(np.uint8), 64, 64)
    )


def pair(sequence: str, second: float, target_HWC: NDArray[np.uint8], event_HWC: NDArray[np.uint8]) -> Pair:
    start_us = int(second * SECOND)
    sides = (picture.transpose(2, 0, 1).tobytes() for picture in (event_HWC, target_HWC))
    return Pair(sequence, start_us, start_us + SECOND, *sides)


def clean(number: int, drives: str = "abcdefghij") -> list[Pair]:
    """Three windows each of some drives that share nothing, apart in time."""
    return [
        pair(f"drive_{drive}", 2.0 * i, view(seed), drawing(seed))
        for d, drive in enumerate(drives)
        for i in range(3)
        for seed in (number * 1000 + d * 10 + i,)
    ]


def store(folder: Path, pairs: list[Pair]) -> Path:
    features = Features(event=SIZE, target=SIZE)
    folder.mkdir()
    part = write_part(folder, "a.parquet", pairs, features)
    source = {"name": "made", "events": "recorded"}
    publish(folder, [part], features=features, durations={"1s": SECOND}, source=source, rejected=b"")
    return folder


def recoded(picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Darker, and through JPEG."""
    buffer = io.BytesIO()
    Image.fromarray((picture_HWC * 0.8).astype(np.uint8)).save(buffer, format="JPEG", quality=70)
    return np.asarray(Image.open(buffer))


CLEAN = {"identical": {"event": 0, "target": 0}, "near": {"event": 0, "target": 0}, "overlapping": 0}
PLANTED = {
    "identical event": (pair("elsewhere", 50, view(9001), drawing(11)), {"identical": {"event": 1, "target": 0}}),
    "identical target": (pair("elsewhere", 50, view(11), drawing(9001)), {"identical": {"event": 0, "target": 1}}),
    "near target": (pair("elsewhere", 50, recoded(view(11)), drawing(9001)), {"near": {"event": 0, "target": 1}}),
    "near event": (
        pair("elsewhere", 50, view(9001), np.roll(drawing(11), 1, axis=1)),
        {"near": {"event": 1, "target": 0}},
    ),
    "overlapping": (pair("drive_b", 2.9, view(9001), drawing(9001)), {"overlapping": 1}),
    "touching": (pair("drive_b", 3.0, view(9001), drawing(9001)), {}),
    "blank": (pair("elsewhere", 50, view(9001), np.full((64, 64, 3), 255, np.uint8)), {}),
}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_leak_between_stores_is_found_and_nothing_else(kind: str, tmp_path: Path) -> None:
    planted, expected = PLANTED[kind]
    white = pair("white", 90, view(9002), np.full((64, 64, 3), 255, np.uint8))
    mine = store(tmp_path / "mine", [*clean(0), white])
    other = store(tmp_path / "other", [*(replace(p, sequence=f"other_{p.sequence}") for p in clean(5)), planted])
    leak = run_inspect(InspectConfig(store=mine, against=other))["leaks"][-1]
    assert {key: leak[key] for key in CLEAN} == CLEAN | expected
    assert leak["any"] == (1 if expected else 0)
    assert len(leak["examples"]) == leak["any"]
    if expected:
        (example,) = leak["examples"]
        assert example["row"]["sequence"] == "drive_b"
        assert example["other"]["sequence"] == planted.sequence
        assert example["other"]["t_start_us"] == planted.t_start_us
        assert (example["correlation"] is not None) == (example["kind"] == "near")


@pytest.mark.usefixtures("ray_cluster")
def test_a_leak_between_the_parts_of_a_split_is_found(tmp_path: Path) -> None:
    pairs = clean(0)
    folder = store(tmp_path / "clean", pairs)
    found = run_inspect(InspectConfig(store=folder))["leaks"]
    assert [(leak["part"], leak["against"], leak["any"]) for leak in found] == [
        ("test", "train", 0),
        ("test", "val", 0),
        ("val", "train", 0),
    ]
    opened = PairStore.open(folder)
    split = split_pairs(opened.index, SplitConfig())
    test, train = (opened.index.sequence[rows[0]] for rows in (split.test, split.train))
    of_test = next(n for n, each in enumerate(pairs) if each.sequence == test)
    of_train = next(each for each in pairs if each.sequence == train)
    pairs[of_test] = replace(pairs[of_test], target=of_train.target)
    page = tmp_path / "leak.html"
    found = run_inspect(InspectConfig(store=store(tmp_path / "leaking", pairs), html=page))["leaks"]
    assert [(leak["any"], leak["identical"]["target"]) for leak in found] == [(1, 1), (0, 0), (0, 0)]
    assert "<strong>identical target</strong>" in page.read_text()


def files(key: str, digit: int) -> dict[str, Any]:
    """What a manifest says of the files of two sequences."""
    return {key: [{"sequence": f"drive_{drive}", "sha256": f"{digit}" * 64} for drive in "ab"]}


@pytest.mark.parametrize(
    "sources",
    [
        [{"name": "scenes", "seed": seed, "renderer": 1} for seed in (0, 1)],
        [{"name": "video"} | files("videos", digit) for digit in (0, 1)],
        [{"name": "davis"} | files("recordings", digit) for digit in (0, 1)],
    ],
    ids=lambda sources: sources[0]["name"],
)
def test_drives_of_one_name_and_another_seed_or_file_are_not_the_same_recording(
    sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    from ray_app.commands.inspect.leaks import joined_index

    stores = []
    for number, source in enumerate(sources):
        folder = store(tmp_path / str(number), clean(number, "ab"))
        opened = PairStore.open(folder)
        stores.append(replace(opened, manifest=opened.manifest.model_copy(update={"source": source})))
    index, rows = joined_index(stores), np.arange(12)
    assert (overlapping_row(index, rows[:6], rows[6:]) < 0).all()
    index = joined_index([stores[0], stores[0]])
    assert overlapping_row(index, rows[:6], rows[6:]).tolist() == list(range(6, 12))


def test_the_most_alike_is_the_same_in_blocks_and_by_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 8)).astype(np.float32) for n in (23, 37))
    monkeypatch.setattr("ray_app.core.image_similarity.ROWS_PER_BLOCK", 5)
    place, best = nearest(a, b)
    product = np.einsum("nk,mk->nm", a.astype(np.float64), b.astype(np.float64))
    assert place.tolist() == product.argmax(axis=1).tolist()
    assert best == pytest.approx(product.max(axis=1), rel=1e-5)


@pytest.mark.parametrize("size", [16, 50, 64, 224])
def test_cells_are_means_by_area_whatever_the_size(size: int) -> None:
    picture_HWC = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    grey = picture_HWC @ np.array([0.299, 0.587, 0.114])
    fine = np.kron(grey, np.ones((CELLS, CELLS)))  # each pixel as 16 x 16: cells are then whole
    expected = fine.reshape(CELLS, size, CELLS, size).mean(axis=(1, 3))
    assert brightness(picture_HWC.transpose(2, 0, 1)[None])[0] == pytest.approx(expected, abs=0.01)


def test_a_sketch_does_not_see_brightness_and_contrast_and_shows_nothing_of_a_flat_picture() -> None:
    picture = view(3, 224).transpose(2, 0, 1)[None]
    sketch = descriptors(brightness(picture))
    darker = descriptors(brightness((picture * 0.5 + 20).astype(np.uint8)))
    assert float((sketch * darker).sum()) > 0.99 > NEAR
    assert np.linalg.norm(sketch) == pytest.approx(1.0, abs=1e-5)
    assert not descriptors(brightness(np.full_like(picture, 77))).any()


def test_shares_of_a_drawn_image_outlive_its_resize() -> None:
    rng = np.random.default_rng(0)
    count = 60_000
    x, y = rng.integers(0, 640, count).astype(np.uint16), rng.integers(0, 480, count).astype(np.uint16)
    p = (rng.random(count) < 0.6).astype(np.uint8)
    drawn = event_image(Events(x, y, np.arange(count), p, 640, 480))
    active = np.mean(drawn[..., 1] == 0)
    positive = np.sum(drawn[..., 0] > drawn[..., 2]) / np.sum(drawn[..., 1] == 0)
    small = resized(drawn, 224, 224)
    photograph, white = view(0, 224).transpose(2, 0, 1), np.full_like(small, 255)
    found_active, found_positive = drawn_shares(np.stack([small, photograph, white]))
    assert found_active[0] == pytest.approx(active, abs=0.003)
    assert found_positive[0] == pytest.approx(positive, abs=0.003)
    assert np.isnan(found_active[1])
    assert found_active[2] == 0.0
    assert np.isnan(found_positive[1:]).all()


def test_night_is_recognised_by_the_brightest_tenth_of_the_cells() -> None:
    street = np.full((1, 3, 64, 64), 12, np.uint8)
    street[:, :, 30:38, 28:40] = 240  # a lamp: 6 of 256 cells
    by_day = street.copy()
    by_day[:, :, :16] = 150
    below, above = (float(np.quantile(brightness(picture), BRIGHT)) for picture in (street, by_day))
    assert below < NIGHT_BELOW < above
