"""The reference's dataset folder as pairs: from its list or from its folders, with what cannot be read rejected."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recordings import read_events
from test_sources import everything, recording, saved

from ray_app import cli
from ray_app.commands.prepare.command import source_from_config
from ray_app.errors import InputError
from ray_app.events.render import equal_counts, event_image
from ray_app.sources.base import RawPair, RejectedPair
from ray_app.sources.eventgpt.source import EventGptSource


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two drives of three clips with images, one drive of two clips with recordings alone."""
    rng = np.random.default_rng(0)

    def image(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)

    for drive in ("zurich", "thun"):
        for clip in ("000002", "000010", "000001"):
            for i in range(5):
                image(tmp_path / "event_image" / drive / f"{clip}_{i}.png")
            for i in range(4):
                image(tmp_path / "video" / drive / clip / f"{i:06d}.png")
    for clip in ("000000", "000001"):
        start = {"time_start": 7_000_000 + int(clip)}
        saved(tmp_path / "event_npy" / "interlaken" / f"{clip}.npy", recording(seed=int(clip)) | start)
        image(tmp_path / "video" / "interlaken" / clip / "000000.png")
    return tmp_path


def test_the_middle_image_and_the_middle_frame_make_a_pair(dataset: Path) -> None:
    found = everything(EventGptSource(dataset, 1_000_000, 500_000))
    assert all(isinstance(item, RawPair) for item in found)
    pairs = {(p.sequence, p.t_start_us): p for p in found if isinstance(p, RawPair)}
    assert sorted(pairs) == [
        ("interlaken", 7_000_000),
        ("interlaken", 7_000_001),
        *((drive, clip * 500_000) for drive in ("thun", "zurich") for clip in (1, 2, 10)),
    ]
    one = pairs["zurich", 5_000_000]
    assert np.array_equal(one.event_HWC, np.asarray(Image.open(dataset / "event_image/zurich/000010_2.png")))
    assert np.array_equal(one.target_HWC, np.asarray(Image.open(dataset / "video/zurich/000010/000002.png")))
    drawn = pairs["interlaken", 7_000_000]
    events = read_events(dataset / "event_npy/interlaken/000000.npy")
    assert np.array_equal(drawn.event_HWC, event_image(equal_counts(events, 5)[2]))
    assert drawn.t_end_us - drawn.t_start_us == 1_000_000


def test_each_unreadable_clip_costs_itself_alone(dataset: Path) -> None:
    (dataset / "event_image/thun/000001_2.png").write_bytes(b"")
    (dataset / "event_image/thun/000002_2.png").unlink()
    shutil.rmtree(dataset / "video/zurich/000010")
    (dataset / "event_npy/interlaken/000001.npy").write_bytes(b"\x93NUMPY")
    cut = dataset / "video/zurich/000001/000002.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    found = everything(EventGptSource(dataset, 1_000_000, 500_000))
    reasons = {item.input: item.reason for item in found if isinstance(item, RejectedPair)}
    assert set(reasons) == {"thun/000001", "thun/000002", "zurich/000010", "zurich/000001", "interlaken/000001"}
    assert "is empty" in reasons["thun/000001"]
    assert "is missing" in reasons["thun/000002"]
    assert "holds no frame" in reasons["zurich/000010"]
    assert "no readable image" in reasons["zurich/000001"]
    assert len(found) == 8


def test_companions_of_macos_are_neither_clips_nor_frames(dataset: Path) -> None:
    before = everything(EventGptSource(dataset, 1_000_000, 500_000))
    for path in [path for path in dataset.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    for folder in [path for path in dataset.rglob("*") if path.is_dir()]:
        folder.with_name(f"._{folder.name}").write_bytes(b"\0\5\x16\7")
        (folder / ".DS_Store").write_bytes(b"")
        (folder / "Thumbs.db").write_bytes(b"")
        (folder / "__MACOSX").mkdir()
    after = everything(EventGptSource(dataset, 1_000_000, 500_000))
    assert len(after) == len(before)
    for one, other in zip(before, after, strict=True):
        assert isinstance(one, RawPair)
        assert isinstance(other, RawPair)
        assert np.array_equal(one.target_HWC, other.target_HWC)
        assert np.array_equal(one.event_HWC, other.event_HWC)


def test_frames_and_event_images_are_turned_and_scaled_as_every_image_is(dataset: Path) -> None:
    image, exif = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16)), Image.Exif()
    exif[0x0112] = 6
    image.save(dataset / "video/zurich/000010/000002.png", exif=exif)
    deep = np.arange(192, dtype=np.uint16).reshape(12, 16) << 8
    Image.fromarray(deep).save(dataset / "event_image/zurich/000010_2.png")
    found = everything(EventGptSource(dataset, 1_000_000, 500_000))
    (pair,) = [p for p in found if isinstance(p, RawPair) and (p.sequence, p.t_start_us) == ("zurich", 5_000_000)]
    assert np.array_equal(pair.target_HWC[..., 0], np.rot90(np.asarray(image), -1))
    assert np.array_equal(pair.event_HWC[..., 2], np.asarray(image))


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no clips"):
        EventGptSource(tmp_path, 1_000_000, 500_000).tasks()
    with pytest.raises(InputError, match="is not a folder"):
        EventGptSource(tmp_path / "nothing", 1_000_000, 500_000).tasks()


def listed(root: Path, entries: Any) -> EventGptSource:
    (root / "EventGPT_Instruction_Subset.json").write_text(json.dumps(entries))
    return EventGptSource.of_folder(root)


def entry(sequence: str, clip: str, **changes: Any) -> dict[str, Any]:
    """An entry as the reference writes it."""
    return {
        "id": f"{sequence}-{clip}",
        "split": "my_egpt_dsec_train_1s",
        "event_data": f"{sequence}/{clip}.npy",
        "video_data": f"{sequence}/{clip}",
        "event_image": [f"{sequence}/{clip}_{i}.png" for i in range(5)],
        "conversations": [{"from": "human", "value": "<event>\nWhat is there?"}, {"from": "gpt", "value": "A road."}],
    } | changes


def test_the_instruction_list_says_which_clips_there_are(dataset: Path) -> None:
    entries = [entry("zurich", "000010"), entry("thun", "000001"), entry("zurich", "000010", id="again")]
    source = listed(dataset, [*entries, {"event_data": "interlaken/000001.npy"}])
    found = everything(source)
    assert [(p.sequence, p.t_start_us) for p in found if isinstance(p, RawPair)] == [
        ("interlaken", 7_000_001),
        ("thun", 500_000),
        ("zurich", 5_000_000),
    ]
    assert len(found) == 3  # two questions about one clip are one pair
    plain = {(p.sequence, p.t_start_us): p for p in everything(replace(source, instructions=None))}
    for pair in found:
        same = plain[pair.sequence, pair.t_start_us]
        assert np.array_equal(pair.event_HWC, same.event_HWC)
        assert np.array_equal(pair.target_HWC, same.target_HWC)
    assert source.describe()["instructions"]["file"] == "EventGPT_Instruction_Subset.json"


def test_the_list_may_name_other_places_for_images_and_frames(dataset: Path) -> None:
    images = [f"thun/000002_{i}.png" for i in (4, 3, 1, 0, 2)]
    (pair,) = everything(listed(dataset, [entry("zurich", "000010", event_image=images, video_data="thun/000001")]))
    assert np.array_equal(pair.event_HWC, np.asarray(Image.open(dataset / "event_image/thun/000002_1.png")))
    assert np.array_equal(pair.target_HWC, np.asarray(Image.open(dataset / "video/thun/000001/000002.png")))
    assert (pair.sequence, pair.t_start_us) == ("zurich", 5_000_000)


def test_a_clip_whose_name_is_no_text_costs_itself_alone(dataset: Path) -> None:
    before = len(everything(EventGptSource.of_folder(dataset)))
    os.mkdir(os.fsencode(dataset / "video" / "thun") + b"/caf\xe9")
    *good, bad = sorted(
        everything(EventGptSource.of_folder(dataset)), key=lambda item: isinstance(item, RejectedPair)
    )
    assert len(good) == before
    assert isinstance(bad, RejectedPair)
    assert bad.reason == r"thun/caf\udce9 is no valid text; rename it"


def test_an_entry_that_is_flawed_or_leads_nowhere_costs_itself_alone(dataset: Path) -> None:
    (dataset / "event_npy/interlaken/000000.npy").write_bytes(b"")
    flawed = {
        "it is a str, not an object": "text",
        "it has no event_data": {"id": "x"},
        "event_data is no path": entry("a", "b", event_data=7),
        "it must be <sequence>/<clip>.npy": entry("a", "b", event_data="b.npy"),
        "leads out of the dataset folder": entry("a", "b", video_data="../../etc"),
        "event_data is '/etc/passwd.npy'": entry("a", "b", event_data="/etc/passwd.npy"),
        "event_image must list 5 images": entry("a", "b", event_image=["a/b_0.png"]),
        "event_image is no path": entry("a", "b", event_image=[1, 2, 3, 4, 5]),
        "is missing, and so is": entry("a", "b"),
        "000000.npy is empty (0 bytes)": entry("interlaken", "000000", event_image=[]),
        "holds no frame": entry("thun", "000001", video_data="thun/nothing"),
        "video_data is no path": entry("a", "b", video_data="thun/\ud800"),
    }
    found = everything(listed(dataset, [*flawed.values(), entry("zurich", "000002")]))
    rejected = [item for item in found if isinstance(item, RejectedPair)]
    assert len(rejected) == len(found) - 1 == len(flawed)
    for reason in flawed:
        assert any(reason in item.reason for item in rejected), reason
    assert any("EventGPT_Instruction_Subset.json, entry 1 (id 'x')" in item.reason for item in rejected)


def test_a_list_that_is_none_is_refused(dataset: Path) -> None:
    for text, message in (
        ("", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("{}", "holds a dict; an instruction JSON is a list"),
        ("[]", "lists no clip"),
    ):
        (dataset / "EventGPT_Instruction_Subset.json").write_text(text)
        with pytest.raises(InputError, match=message):
            EventGptSource.of_folder(dataset).tasks()
    with pytest.raises(InputError, match=r"nothing\.json cannot be read: No such file"):
        EventGptSource.of_folder(dataset, instructions=dataset / "nothing.json").tasks()


def test_clips_drawn_as_one_image_come_from_their_own_folder(dataset: Path) -> None:
    folder = dataset / "event_image_1f" / "thun"
    folder.mkdir(parents=True)
    shutil.copy(dataset / "event_image/thun/000002_4.png", folder / "000001_0.png")
    source = EventGptSource.of_folder(dataset, event_bins=1)
    found = {(p.sequence, p.t_start_us): p for p in everything(source) if isinstance(p, RawPair)}
    assert set(found) == {("thun", 500_000), ("interlaken", 7_000_000), ("interlaken", 7_000_001)}
    assert np.array_equal(found["thun", 500_000].event_HWC, np.asarray(Image.open(folder / "000001_0.png")))
    events = read_events(dataset / "event_npy/interlaken/000000.npy")
    assert np.array_equal(found["interlaken", 7_000_000].event_HWC, event_image(events))
    images = {"event_image_1f": ["thun/000001_0.png"]}
    (dataset / "list.json").write_text(json.dumps([entry("thun", "000001", **images)]))
    (one,) = everything(EventGptSource.of_folder(dataset, instructions=dataset / "list.json", event_bins=1))
    assert np.array_equal(one.event_HWC, found["thun", 500_000].event_HWC)


@pytest.mark.parametrize(
    ("name", "duration_us", "step_us"),
    [
        ("my_egpt_dsec_train_500ms", 500_000, 250_000),
        ("my_egpt_dsec_seq_20s", 20_000_000, 10_000_000),
        ("my_egpt_dsec_seq_50ms", 50_000, 50_000),
        ("anything", 1_000_000, 500_000),
        ("train_0s", 1_000_000, 500_000),
    ],
)
def test_the_folders_name_gives_the_length_of_its_clips(name: str, duration_us: int, step_us: int) -> None:
    source = EventGptSource.of_folder(Path("/data") / name)
    assert (source.duration_us, source.step_us) == (duration_us, step_us)
    given = EventGptSource.of_folder(Path("/data") / name, duration_us=2_000_000, step_us=100_000)
    assert (given.duration_us, given.step_us) == (2_000_000, 100_000)


def test_the_real_50_ms_recordings_begin_at_their_first_event(shared_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "egpt_50ms"
    for clip in ("000069", "000079", "000099"):
        (root / "event_npy" / "interlaken_00_d").mkdir(parents=True, exist_ok=True)
        shutil.copy(shared_data / "events" / f"{clip}.npy", root / "event_npy" / "interlaken_00_d")
        (root / "video" / "interlaken_00_d" / clip).mkdir(parents=True)
        Image.new("RGB", (8, 6), (9, 9, 9)).save(root / "video" / "interlaken_00_d" / clip / "000000.png")
    shutil.copy(shared_data / "events" / "corrupt_zero_bytes.npy", root / "event_npy/interlaken_00_d/000239.npy")
    found = everything(EventGptSource.of_folder(root))
    pairs = [item for item in found if isinstance(item, RawPair)]
    assert len(pairs) == 3
    for pair, clip in zip(pairs, ("000069", "000079", "000099"), strict=True):
        events = read_events(shared_data / "events" / f"{clip}.npy")
        assert pair.t_start_us == events.t_us[0]
        assert pair.t_end_us - pair.t_start_us == 50_000
        assert np.array_equal(pair.event_HWC, event_image(equal_counts(events, 5)[2]))
    (empty,) = [item for item in found if isinstance(item, RejectedPair)]
    assert (empty.position, "is empty (0 bytes)" in empty.reason) == ("clip 000239", True)
    short = everything(EventGptSource.of_folder(root, duration_us=20_000))
    assert sum("more than a clip of 20ms; give the clips' length with --duration" in str(item) for item in short) == 3


def test_flags_make_the_source_that_they_name(dataset: Path) -> None:
    words = f"{dataset} --out s --duration 2s --step 1s --instructions list.json --event-bins 1".split()
    flags = cli.parse("prepare eventgpt", cli.COMMANDS["prepare eventgpt"], None, words)
    assert source_from_config(flags) == EventGptSource(dataset, 2_000_000, 1_000_000, Path.cwd() / "list.json", 1)
    plain = cli.parse("prepare eventgpt", cli.COMMANDS["prepare eventgpt"], None, [str(dataset), "--out", "s"])
    assert source_from_config(plain) == EventGptSource(dataset, 1_000_000, 500_000)
