"""`prepare` writes the same bytes with any number of workers, loses only the bad pair, and resumes."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from numpy_source import SMALL, NumpySource, build_store

from ray_app.commands.prepare import command as prepare_command
from ray_app.commands.prepare.command import prepare, render_prepare, run_prepare, source_from_config
from ray_app.commands.prepare.store_builder import BuiltTask, build_task, claim_store, finish, finished
from ray_app.config.prepare import PrepareEventGpt, PrepareFlags, PrepareScenes, PrepareVideo
from ray_app.errors import RunInterrupted, StoreError
from ray_app.store.manifest import Features
from ray_app.store.pair_store import PairStore

BOTH = Features(event=SMALL, target=SMALL)
CASES = Path(__file__).resolve().parents[1] / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rejected(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def start(source: NumpySource, folder: Path) -> None:
    claim_store(folder, source, source.tasks(), BOTH)


def build(source: NumpySource, folder: Path, *tasks: int) -> list[BuiltTask]:
    return [build_task(source, source.tasks()[i], folder, BOTH) for i in tasks]


@pytest.mark.usefixtures("ray_cluster")
def test_one_two_and_four_workers_write_the_same_bytes(small_store: Path, tmp_path: Path) -> None:
    for num_workers in (1, 2, 4):
        out = tmp_path / str(num_workers)
        result = prepare(NumpySource(), PrepareFlags(out=out, num_workers=num_workers), SMALL)
        assert contents(out) == contents(small_store)
        assert result["fingerprint"] == PairStore.open(small_store).fingerprint
        assert (result["pairs"], result["sequences"], result["rejected"]) == (72, 6, 0)
        assert (result["workers"], result["pairs_reused"]) == (num_workers, 0)
        assert result["pairs_per_second"] >= result["pairs_per_second_per_core"] > 0


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_start_resumes_where_the_first_was_cut_off(small_store: Path, tmp_path: Path) -> None:
    source, out = NumpySource(), tmp_path / "s"
    start(source, out)
    build(source, out, 0, 1, 4)
    damaged = bytearray((out / "drive_0001.parquet").read_bytes())
    damaged[100] ^= 1
    (out / "drive_0001.parquet").write_bytes(damaged)
    times = {name: (out / f"{name}.parquet").stat().st_mtime_ns for name in ("drive_0000", "drive_0004")}
    result = prepare(source, PrepareFlags(out=out, num_workers=2), SMALL)
    assert result["pairs_reused"] == 24
    assert contents(out) == contents(small_store)
    assert times == {name: (out / f"{name}.parquet").stat().st_mtime_ns for name in times}


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_bad_pairs_end_with_the_first_few_named_and_what_was_built_stays(tmp_path: Path) -> None:
    source = NumpySource(num_sequences=3, bad=((0, 2),), unreadable=(1,))
    flags = PrepareFlags(out=tmp_path / "s", num_workers=2)
    with pytest.raises(StoreError, match=r"13 of 36 pairs could not be built \(36\.1%.*drive_0000, window 2: made"):
        prepare(source, flags, SMALL)
    assert len(rejected(Path(flags.out))) == 13
    assert (Path(flags.out) / "drive_0002.parquet").is_file()
    assert not (Path(flags.out) / "manifest.json").exists()
    allowed = flags.model_copy(update={"max_rejected_fraction": 0.4})
    result = prepare(source, allowed, SMALL)
    assert (result["pairs"], result["rejected"], result["pairs_reused"]) == (23, 13, 12)
    PairStore.open(flags.out).verify()


def test_after_ctrl_c_it_says_the_command_that_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_command, "cluster", leave)
    monkeypatch.setattr(sys, "argv", ["/venv/bin/ray-app", "prepare", "scenes", "--out", "my store"])
    with pytest.raises(RunInterrupted, match=r"continue with: ray-app prepare scenes --out 'my store'$") as caught:
        prepare(NumpySource(), PrepareFlags(out=tmp_path / "s"), SMALL)
    assert caught.value.exit_code == 130


def test_one_bad_pair_costs_one_line_and_no_neighbour(tmp_path: Path) -> None:
    folder = build_store(NumpySource(bad=((2, 5),), broken_off=((4, 9),)), tmp_path / "s")
    assert rejected(folder) == [
        {"input": "drive_0002", "position": "window 5", "reason": "made to fail"},
        *(
            {"input": "drive_0004", "position": f"pair {i} of 12", "reason": "drive_0004: ends at window 9"}
            for i in (9, 10, 11)
        ),
    ]
    whole, store = PairStore.open(build_store(NumpySource(), tmp_path / "whole")), PairStore.open(folder)
    assert store.manifest.rejected == 4
    assert set(whole.index.sample_id) - set(store.index.sample_id) == set(whole.index.sample_id[[29, 57, 58, 59]])


def test_a_black_picture_is_set_aside(tmp_path: Path) -> None:
    folder = build_store(NumpySource(num_sequences=1, black=((0, 3),)), tmp_path / "s")
    (line,) = rejected(folder)
    assert line["position"] == "window [1500000, 2500000)"
    assert "target picture is black" in line["reason"]


def test_a_window_of_a_length_that_the_source_does_not_name_is_set_aside(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Misnamed(NumpySource):
        def durations(self) -> list[str]:
            return ["50ms"]

    source, folder = Misnamed(num_sequences=1), tmp_path / "s"
    start(source, folder)
    (done,) = build(source, folder, 0)
    assert done.part is None
    assert len(done.rejected) == 12
    assert done.rejected[0].reason == "the window is 1000000 µs long, not 50ms"
    with pytest.raises(StoreError, match="12 of 12 pairs"):
        finish(folder, source, [done], BOTH, 1.0)


def test_a_pair_that_an_earlier_file_holds_is_set_aside(small_store: Path, tmp_path: Path) -> None:
    source, folder = NumpySource(num_sequences=8, twins=((6, 1), (7, 7))), tmp_path / "s"
    build_store(source, folder)
    lines = rejected(folder)
    assert len(lines) == 12
    assert lines[0] == {
        "input": "drive_0001",
        "position": "window [0, 1000000)",
        "reason": "the same pair as in drive_0001",
    }
    store = PairStore.open(folder)
    assert len(store.index) == 84
    assert len(set(store.index.sample_id)) == 84
    assert not (folder / "drive_0006.parquet").exists()
    assert contents(small_store)["drive_0001.parquet"] == (folder / "drive_0001.parquet").read_bytes()


def test_a_file_that_shares_some_pairs_keeps_the_others(tmp_path: Path) -> None:
    source, folder = NumpySource(num_sequences=2, twins=((1, 0),), bad=((0, 0), (0, 7))), tmp_path / "s"
    build_store(source, folder)
    store = PairStore.open(folder)
    store.verify()
    assert [(file.name, file.pairs) for file in store.files] == [
        ("drive_0000.parquet", 10),
        ("drive_0001.parquet", 2),
    ]
    assert store.index.t_start_us.tolist() == [window * 500_000 for window in range(12)]


def test_the_folder_must_be_new_or_empty(small_store: Path, tmp_path: Path) -> None:
    source = NumpySource()
    empty = tmp_path / "empty"
    empty.mkdir()
    start(source, empty)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("dear")
    with pytest.raises(StoreError, match="already holds something else"):
        start(source, full)
    with pytest.raises(StoreError, match="already holds something else"):
        start(source, full / "thesis.txt")
    with pytest.raises(StoreError, match="cannot be written"):
        start(source, full / "thesis.txt" / "s")
    with pytest.raises(StoreError, match="already holds a complete pair store"):
        start(source, small_store)
    assert contents(full) == {"thesis.txt": b"dear"}


def test_an_interrupted_prepare_of_other_settings_is_refused(tmp_path: Path) -> None:
    start(NumpySource(seed=1), tmp_path / "s")
    for other in (
        NumpySource(seed=2),
        NumpySource(seed=1, num_windows=11),
        NumpySource(seed=1, num_sequences=2),
    ):
        with pytest.raises(StoreError, match="of other settings or inputs"):
            start(other, tmp_path / "s")
    start(NumpySource(seed=1), tmp_path / "s")


def test_a_task_counts_as_finished_only_where_its_record_and_file_hold(tmp_path: Path) -> None:
    source, folder = NumpySource(bad=((1, 0),)), tmp_path / "s"
    start(source, folder)
    whole, partly = build(source, folder, 0, 1)
    tasks = source.tasks()
    assert finished(folder, tasks[0]) == whole
    assert partly.rejected
    assert finished(folder, tasks[1]) is None  # the input may have been repaired
    assert finished(folder, tasks[2]) is None
    (folder / ".prepare" / "drive_0000.json").write_text("{")
    assert finished(folder, tasks[0]) is None


def test_every_prepare_command_has_its_source_with_defaults_filled_in(tmp_path: Path) -> None:
    from ray_app.sources.eventgpt.source import EventGptSource
    from ray_app.sources.scenes import ScenesSource
    from ray_app.sources.video import VideoSource

    scenes = source_from_config(PrepareScenes(out=tmp_path, num_pairs=7, num_sequences=2, duration="500ms"))
    assert isinstance(scenes, ScenesSource)
    assert (scenes.duration_us, scenes.step_us, scenes.event_span_us) == (500_000, 250_000, 50_000)
    video = source_from_config(PrepareVideo(out=tmp_path, files=(Path("a.mp4"),)))
    assert isinstance(video, VideoSource)
    assert video.files == (Path.cwd() / "a.mp4",)
    eventgpt = source_from_config(PrepareEventGpt(out=tmp_path, root=Path("set"), step="1s"))
    assert isinstance(eventgpt, EventGptSource)
    assert (eventgpt.root, eventgpt.duration_us, eventgpt.step_us) == (
        Path.cwd() / "set",
        1_000_000,
        1_000_000,
    )


def test_the_result_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result: dict[str, Any] = {
        "store": "stores/a",
        "pairs": 1200,
        "sequences": 60,
        "rejected": 3,
        "pairs_reused": 100,
        "files": 60,
        "bytes": 123_456_789,
        "seconds": 12.5,
        "pairs_per_second": 88.0,
        "pairs_per_second_per_core": 44.0,
        "windows": 240,
        "events_covered": 50_000_000,
        "events_drawn": 10_000_000,
        "fingerprint": "f" * 64,
    }
    render_prepare(result, Console(width=120))
    printed = capsys.readouterr().out
    for text in (
        "1,200, 100 kept",
        "3 (reasons in rejected.jsonl)",
        "123.5 MB",
        "44.00 for each core",
        "50.0 million in 240 windows, 10.0 drawn; 0.8 million drawn/s",
    ):
        assert text in printed


@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_video_and_a_damaged_one_cost_their_own_pairs_alone(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("this is no video")
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    files = (tmp_path / "Thumbs.db", CASES / "edit_list.mp4", tmp_path / "bad.mp4", CASES / "bad_packet.mp4")
    out = tmp_path / "store"
    result = run_prepare(PrepareVideo(out=out, files=files, width=32, height=32, max_rejected_fraction=0.2))
    assert (result["pairs"], result["sequences"], result["rejected"]) == (15 + 148 - 22, 2, 23)
    lines = rejected(out)
    assert {line["position"] for line in lines} == {"the whole video", *(f"frame {i}" for i in range(51, 73))}
    assert {line["reason"][:50] for line in lines if line["position"].startswith("frame")} == {
        "frame 52 is damaged: Invalid data found when proce"
    }
