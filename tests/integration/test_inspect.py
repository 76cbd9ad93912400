"""`inspect` counts, divides, measures and verifies a store in one pass."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy_source import SMALL, NumpySource, build_store
from pages import assert_has_words, assert_light_and_dark, assert_self_contained
from PIL import Image
from rich.console import Console

from ray_app.commands.inspect.command import render_inspect, run_inspect
from ray_app.config.prepare import InspectConfig
from ray_app.errors import ConfigError, StoreError
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part

pytestmark = pytest.mark.usefixtures("ray_cluster")


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
    publish(folder, [part], features=features, durations={"10us": 10}, source=source, rejected=b"")
    return folder


def test_inspect_counts_split_and_cosine(small_store: Path) -> None:
    result = run_inspect(InspectConfig(store=small_store))
    assert {
        "pairs",
        "sequences",
        "rejected",
        "fingerprint",
        "verified",
        "split",
        "before",
    } <= result.keys()
    assert (result["pairs"], result["sequences"], result["rejected"]) == (72, 6, 0)
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


def test_the_contact_sheet_shows_each_event_next_to_its_target(small_store: Path, tmp_path: Path) -> None:
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


def test_a_page_shows_windows_leaks_and_their_pictures(small_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "pages" / "store.html"
    result = run_inspect(InspectConfig(store=small_store, split="window", html=path))
    page = path.read_text()
    for check in (assert_self_contained, assert_has_words, assert_light_and_dark):
        check(page)
    assert result["html"] == str(path)
    assert '<h1 class="loses">LEAKS: ' in page
    assert page.count("data:image/png;base64,") >= 4
    assert "Day and night by a rule" in page
    assert "no event counts" in page
    with pytest.raises(ConfigError, match=r"end its name in \.html"):
        run_inspect(InspectConfig(store=small_store, html=tmp_path / "a.pdf"))


def test_parts_by_whole_drives_share_nothing_and_drives_of_one_name_overlap(
    small_store: Path, tmp_path: Path
) -> None:
    other = build_store(NumpySource(seed=7), tmp_path / "other")
    *of_split, between = run_inspect(InspectConfig(store=small_store, against=other))["leaks"]
    assert [(leak["any"], leak["examples"]) for leak in of_split] == [(0, [])] * 3
    assert between["identical"] == {"event": 0, "target": 0}
    assert between["overlapping"] == 72  # in this source recordings differ only by name


def test_what_the_source_counted_is_reported(tmp_path: Path) -> None:
    from ray_app.commands.prepare.store_builder import build_task, claim_store, finish
    from ray_app.sources.scenes import ScenesSource

    source = ScenesSource(num_pairs=4, num_sequences=2, seed=0, width=64, height=48)
    features = Features(event=SMALL, target=SMALL)
    claim_store(tmp_path / "s", source, source.tasks(), features)
    built = [build_task(source, task, tmp_path / "s", features) for task in source.tasks()]
    finish(tmp_path / "s", source, built, features, 0.0)
    events = [source.events(source.scene(drive), drive, window) for drive in range(2) for window in range(2)]
    windows = run_inspect(InspectConfig(store=tmp_path / "s"))["windows"]
    drawn = windows["events_drawn"]
    assert (drawn["known"], drawn["min"], drawn["max"]) == (4, min(map(len, events)), max(map(len, events)))
    shares = [np.mean(of_window.p) for of_window in events]
    assert windows["positive_share_of_events_drawn"]["mean"] == pytest.approx(np.mean(shares))
    assert windows["frame_minus_window_centre_ms"]["max"] == windows["frame_minus_window_centre_ms"]["min"] == 0.0
    assert windows["events_per_window"] is None  # 50 ms of each second are simulated
    assert windows["overlap_with_previous"] | {"mean": 0.5} == windows["overlap_with_previous"]


def test_windows_of_one_length_are_measured_where_files_hold_others(tmp_path: Path) -> None:
    features = Features(event=SMALL, target=SMALL)
    rng = np.random.default_rng(0)
    (tmp_path / "s").mkdir()
    parts = [
        write_part(
            tmp_path / "s",
            f"{name}.parquet",
            [Pair(name, i * us, (i + 1) * us, *(rng.bytes(768) for _ in range(2))) for i in range(3)],
            features,
        )
        for name, us in (("a", 1_000_000), ("b", 2_000_000))
    ]
    source, lengths = {"name": "noise", "events": "recorded"}, {"1s": 1_000_000, "2s": 2_000_000}
    publish(tmp_path / "s", parts, features=features, durations=lengths, source=source, rejected=b"")
    result = run_inspect(InspectConfig(store=tmp_path / "s", durations=("2s",)))
    assert [line["sequence"] for line in result["by_sequence"]] == ["b"]
    assert result["windows"]["active_share_of_drawn_image"] is None
    assert any("not white with red and blue" in note for note in result["warnings"])
