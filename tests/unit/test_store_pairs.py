"""A pair store gives back the bytes it was given, in one order, or names the file that is damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy_source import SMALL, NumpySource, build_store
from PIL import Image

from ray_app.errors import StoreError
from ray_app.sources.base import RawPair
from ray_app.store.manifest import PIXELS, Features, FeatureSpec, Manifest
from ray_app.store.pair_store import INDEX_COLUMNS, Pair, PairStore, publish, write_part

BOTH_SMALL = Features(event=SMALL, target=SMALL)
WIDE = FeatureSpec(dtype="float32", shape=(5,), scale=1.0)


def random_pairs(count: int, seed: int = 0, features: Features = BOTH_SMALL) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [
        Pair(
            f"s{i % 3}",
            i * 100,
            i * 100 + 200,
            rng.bytes(features.event.num_bytes),
            rng.bytes(features.target.num_bytes),
        )
        for i in range(count)
    ]


def store_of(folder: Path, *parts: list[Pair], features: Features = BOTH_SMALL) -> PairStore:
    folder.mkdir()
    records = [write_part(folder, f"part_{i}.parquet", part, features) for i, part in enumerate(parts)]
    publish(folder, records, features=features, durations={"200us": 200, "1s": 10**6}, source={}, rejected=b"")
    return PairStore.open(folder)


def test_a_store_gives_back_every_picture_as_pillow_resizes_it(small_store: Path) -> None:
    store = PairStore.open(small_store)
    source = NumpySource()
    raw = [pair for task in source.tasks() for pair in source.pairs(task)]
    event_ND, target_ND = store.read_rows(np.arange(len(store.index)))
    assert len(raw) == len(store.index) == store.manifest.pairs == 72
    for i, pair in enumerate(raw):  # drives and windows are built in canonical order here
        assert isinstance(pair, RawPair)
        assert (store.index.sequence[i], store.index.t_start_us[i]) == (pair.sequence, pair.t_start_us)
        for found_D, picture in ((event_ND[i], pair.event_HWC), (target_ND[i], pair.target_HWC)):
            small = Image.fromarray(picture).resize((16, 16), Image.Resampling.BILINEAR)
            expected = [small.getpixel((x, y))[c] for c in range(3) for y in range(16) for x in range(16)]  # type: ignore[index]
            assert found_D.tolist() == expected


def test_reading_rows_in_any_order_gives_each_row_its_own_pair(tmp_path: Path) -> None:
    pairs = random_pairs(50)
    store = store_of(tmp_path / "s", pairs[20:], pairs[:20])
    rows = np.random.default_rng(1).permutation(50)[:17]
    event_ND, target_ND = store.read_rows(rows)
    by_id = {pair.sample_id: pair for pair in pairs}
    for i, row in enumerate(rows):
        pair = by_id[store.index.sample_id[row]]
        assert (event_ND[i].tobytes(), target_ND[i].tobytes()) == (pair.event, pair.target)
        assert store.index.duration[row] == "200us"


def test_order_identity_and_fingerprint_do_not_depend_on_the_cut_into_files(tmp_path: Path) -> None:
    pairs = random_pairs(40)
    one = store_of(tmp_path / "one", pairs)
    three = store_of(tmp_path / "three", pairs[30:], pairs[:7][::-1], pairs[7:30])
    assert one.fingerprint == three.fingerprint
    for name in ("sample_id", "sequence", "t_start_us", "t_end_us", "duration"):
        assert np.array_equal(getattr(one.index, name), getattr(three.index, name))
    order = list(zip(one.index.sequence, one.index.t_start_us, one.index.sample_id, strict=True))
    assert order == sorted(order)
    other = store_of(tmp_path / "other", pairs[:-1])
    assert other.fingerprint != one.fingerprint


def test_the_identity_of_a_pair_covers_place_time_and_content() -> None:
    pair = Pair("s", 1, 2, b"ab", b"c")
    others = [
        Pair("t", 1, 2, b"ab", b"c"),
        Pair("s", 0, 2, b"ab", b"c"),
        Pair("s", 1, 3, b"ab", b"c"),
        Pair("s", 1, 2, b"a", b"bc"),
        Pair("s", 1, 2, b"ab", b"d"),
    ]
    assert len({pair.sample_id, *(other.sample_id for other in others)}) == 6
    assert pair.sample_id == Pair("s", 1, 2, b"ab", b"c").sample_id
    assert len(pair.sample_id) == 32


def test_the_same_pairs_give_the_same_file(tmp_path: Path) -> None:
    pairs = random_pairs(40)
    first, second = (write_part(tmp_path, name, pairs, BOTH_SMALL) for name in ("a.parquet", "b.parquet"))
    assert first.sha256 == second.sha256
    assert (tmp_path / "a.parquet").stat().st_size == first.bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_features_may_be_of_other_types_and_differ_in_width(tmp_path: Path) -> None:
    features = Features(event=SMALL, target=WIDE)
    pairs = random_pairs(9, features=features)
    store = store_of(tmp_path / "s", pairs, features=features)
    event_ND, target_ND = store.read_rows(np.arange(9))
    assert (event_ND.dtype, event_ND.shape) == (np.uint8, (9, 768))
    assert (target_ND.dtype, target_ND.shape) == (np.float32, (9, 5))
    assert {row.tobytes() for row in target_ND} == {pair.target for pair in pairs}
    with pytest.raises(ValueError, match=r"size|length|width|bytes"):
        write_part(tmp_path, "wrong.parquet", random_pairs(1), features)


def test_the_reference_feature_is_150528_wide() -> None:
    assert (PIXELS.width, PIXELS.num_bytes) == (150_528, 150_528)
    assert Features.model_validate_json(Features(event=PIXELS, target=WIDE).model_dump_json()).event == PIXELS


def test_durations_keep_their_windows_alone(tmp_path: Path) -> None:
    pairs = random_pairs(10)
    longer = [Pair("long", 0, 10**6, pair.event, pair.target) for pair in random_pairs(4, seed=1)]
    store = store_of(tmp_path / "s", pairs, longer)
    assert set(store.index.duration) == {"200us", "1s"}
    short = PairStore.open(tmp_path / "s", ["200us"])
    assert set(short.index.sequence) == {"s0", "s1", "s2"}
    assert short.fingerprint == store.fingerprint
    event_ND, _ = short.read_rows([3])
    assert event_ND.tobytes() in {pair.event for pair in pairs}
    with pytest.raises(StoreError, match="no windows of 5s; it has 200us, 1s"):
        PairStore.open(tmp_path / "s", ["5s"])


def test_a_manifest_lists_the_durations_that_occur(tmp_path: Path) -> None:
    assert store_of(tmp_path / "s", random_pairs(3)).manifest.durations == {"200us": 200}


def test_what_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere does not exist"):
        PairStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no finished pair store"):
        PairStore.open(tmp_path)


@pytest.fixture
def copy(small_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_store, tmp_path / "copy")


def test_a_flipped_byte_anywhere_is_found_and_its_file_named(copy: Path) -> None:
    rng = np.random.default_rng(0)
    names = sorted(path.name for path in copy.iterdir())
    assert names == ["drive_0000.parquet", *names[1:6], "manifest.json", "rejected.jsonl"]
    for name in names[4:]:
        path = copy / name
        intact = path.read_bytes()
        edges = [0, 1, len(intact) // 2, len(intact) - 5, len(intact) - 1]
        for place in [*edges, *rng.integers(0, len(intact), 60).tolist()] if intact else []:
            flipped = bytearray(intact)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(StoreError, match=name):
                PairStore.open(copy).verify()
        path.write_bytes(intact)
    PairStore.open(copy).verify()


def test_a_flipped_byte_is_found_by_reading_too(copy: Path) -> None:
    store = PairStore.open(copy)
    path = copy / "drive_0002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    store.read_rows([0])
    with pytest.raises(StoreError, match=r"drive_0002\.parquet is damaged"):
        store.read_rows([30])


@pytest.mark.parametrize("name", ["drive_0003.parquet", "rejected.jsonl"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is damaged: the file is missing"):
        PairStore.open(copy).verify()


def test_a_file_of_another_store_is_found(copy: Path, tmp_path: Path) -> None:
    other = build_store(NumpySource(seed=1), tmp_path / "other")
    shutil.copy(other / "drive_0001.parquet", copy / "drive_0001.parquet")
    with pytest.raises(StoreError, match=r"drive_0001\.parquet is damaged"):
        PairStore.open(copy)


def test_a_manifest_that_was_edited_by_hand_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    assert Manifest.read(copy).pairs == manifest["pairs"] == 72
    for changed in ({"pairs": 71}, {"version": 2}, {"surprise": 1}):
        path.write_text(json.dumps(manifest | changed, indent=1) + "\n")
        with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
            Manifest.read(copy)


def test_a_flipped_byte_in_an_index_column_is_found_when_a_store_is_opened(copy: Path) -> None:
    """The index is read without the features and their checksum, so pages have checksums of their own."""
    path = copy / "drive_0003.parquet"
    intact = path.read_bytes()
    layout = pq.ParquetFile(path).metadata
    for group in range(layout.num_row_groups):
        for column in range(len(INDEX_COLUMNS)):
            chunk = layout.row_group(group).column(column)
            assert chunk.path_in_schema in INDEX_COLUMNS
            last = chunk.data_page_offset + chunk.total_compressed_size - 1
            for place in np.linspace(last - chunk.total_compressed_size // 2, last, 12).astype(int):
                flipped = bytearray(intact)
                flipped[place] ^= 1
                path.write_bytes(flipped)
                with pytest.raises(StoreError, match=r"drive_0003\.parquet"):
                    PairStore.open(copy)
    path.write_bytes(intact)
    PairStore.open(copy)
