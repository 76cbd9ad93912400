"""`inspect` counts, divides, measures and verifies a store in one pass."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy_source import SMALL
from PIL import Image
from rich.console import Console

from ray_app.config import InspectConfig
from ray_app.errors import ConfigError, StoreError
from ray_app.jobs.inspect import render_inspect, run_inspect
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part


def vectors_store(folder: Path, target: FeatureSpec) -> Path:
    """Four pairs whose features are not pictures."""
    features = Features(event=FeatureSpec(dtype="float32", shape=(8,), scale=1.0), target=target)
    rng = np.random.default_rng(0)
    pairs = [
        Pair(
            "s",
            i,
            i + 10,
            rng.random(8, np.float32).tobytes(),
            rng.random(target.width, np.float32).tobytes(),
        )
        for i in range(4)
    ]
    folder.mkdir()
    part = write_part(folder, "a.parquet", pairs, features)
    source = {"name": "vectors", "events": "recorded"}
    publish(folder, [part], features=features, durations={"10us": 10}, source=source, quarantine=b"")
    return folder


def test_inspect_tells_counts_split_and_cosine(small_store: Path) -> None:
    result = run_inspect(InspectConfig(store=small_store))
    assert {
        "pairs",
        "sequences",
        "quarantined",
        "fingerprint",
        "verified",
        "split",
        "before",
    } <= result.keys()
    assert (result["pairs"], result["sequences"], result["quarantined"]) == (72, 6, 0)
    assert result["verified"] is True
    assert result["fingerprint"] == PairStore.open(small_store).fingerprint
    split = {key: result["split"][key] for key in ("by", "train", "val", "test", "test_windows_overlapping_train")}
    assert split == {
        "by": "sequence",
        "train": 48,
        "val": 12,
        "test": 12,
        "test_windows_overlapping_train": 0.0,
    }
    event, target = (x.astype(np.float64) for x in PairStore.open(small_store).read_rows(np.arange(72)))
    cosine = (event * target).sum(1) / np.sqrt((event**2).sum(1) * (target**2).sum(1))
    assert result["before"]["cos_sim_mean"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert result["before"]["cos_sim_std"] == pytest.approx(cosine.std(), abs=1e-4)


def test_the_random_split_is_labelled_as_leaking(small_store: Path) -> None:
    split = run_inspect(InspectConfig(store=small_store, split="window"))["split"]
    assert (split["by"], split["train"] + split["val"], split["test"]) == ("window", 57, 15)
    assert split["test_windows_overlapping_train"] == 11 / 15
    assert "leaks" in split["label"]


def test_the_contact_sheet_shows_each_event_beside_its_target(small_store: Path, tmp_path: Path) -> None:
    picture = tmp_path / "sheets" / "pairs.png"
    result = run_inspect(InspectConfig(store=small_store, picture=picture))
    assert result["picture"] == str(picture)
    sheet = np.asarray(Image.open(picture))
    assert sheet.shape == (6 * 36 + 6, 4 * 44 + 6, 3)
    event_ND, target_ND = PairStore.open(small_store).read_rows([0])
    assert np.array_equal(sheet[6:22, 6:22], event_ND[0].reshape(SMALL.shape).transpose(1, 2, 0))
    assert np.array_equal(sheet[6:22, 28:44], target_ND[0].reshape(SMALL.shape).transpose(1, 2, 0))


def test_a_flipped_byte_ends_inspect_with_the_files_name(small_store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_store, tmp_path / "copy")
    path = copy / "drive_0003.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"drive_0003\.parquet is damaged"):
        run_inspect(InspectConfig(store=copy))


def test_a_picture_needs_pictures_and_a_png_name(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end its name in \.png"):
        run_inspect(InspectConfig(store=small_store, picture=tmp_path / "a.jpg"))
    vectors = vectors_store(tmp_path / "v", FeatureSpec(dtype="float32", shape=(8,), scale=1.0))
    with pytest.raises(ConfigError, match="are not pictures"):
        run_inspect(InspectConfig(store=vectors, picture=tmp_path / "a.png"))


def test_features_of_different_widths_have_no_cosine_before(tmp_path: Path) -> None:
    folder = vectors_store(tmp_path / "v", FeatureSpec(dtype="float32", shape=(5,), scale=1.0))
    result = run_inspect(InspectConfig(store=folder))
    assert result["before"] == {"cos_sim_mean": None, "cos_sim_std": None}
    assert result["split"]["by"] == "block"


@pytest.mark.parametrize("small", [True, False])
def test_the_result_can_be_printed(
    small: bool, small_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = FeatureSpec(dtype="float32", shape=(5,), scale=1.0)
    result = run_inspect(InspectConfig(store=small_store if small else vectors_store(tmp_path / "v", other)))
    render_inspect(result, Console(width=150))
    printed = capsys.readouterr().out
    assert result["fingerprint"] in printed
    assert ("3 × 16 × 16 uint8" in printed) == small
    assert ("72; windows: 72 of 1s" in printed) == small
    assert ("differ in width" in printed) != small
