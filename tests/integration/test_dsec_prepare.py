"""DSEC recordings to pair stores: tasks, settings, several durations, any number of workers."""

import json
import re
from pathlib import Path

import pytest
from dsec_drives import BEGIN_US, OFFSET_US, SECOND, dsec, same, write_small
from dsec_writer import DsecFiles, random_events, write_sequence
from numpy_source import SMALL

from ray_app import cli
from ray_app.commands.prepare.command import run_prepare, source_from_config
from ray_app.commands.prepare.store_builder import build_task, claim_store, finish
from ray_app.config.prepare import PrepareDsec
from ray_app.errors import ConfigError
from ray_app.sources.base import RawPair, SourceTask
from ray_app.sources.dsec.source import DsecSource
from ray_app.store.manifest import Features
from ray_app.store.pair_store import PairStore


def test_tasks_are_bounded_json_and_independent_of_each_other(tmp_path: Path) -> None:
    for name in ("a b", "a_b", "-x", "ünï", "new\nline", "a" * 120, "a" * 119 + "b"):
        write_small(tmp_path, name, frames=21, constants=None)
    for durations, pick in (((50_000, 1_000_000), "middle"), ((50_000,), "all")):
        source = dsec(tmp_path, durations, pairs_per_window=pick)
        tasks = source.tasks()
        names = [task.name for task in tasks]
        assert names == sorted(set(names))
        assert all(re.fullmatch(r"\w[\w.-]*", name, re.ASCII) and len(name) < 150 for name in names)
        assert all(0 < task.num_pairs <= 64 for task in tasks)
        assert all(json.loads(json.dumps(task.spec)) == task.spec for task in tasks)
        claim_store(tmp_path / f"store-{pick}", source, tasks, Features(event=SMALL, target=SMALL))
    (first, *_), again = tasks, source.tasks()
    assert [task.num_pairs for task in tasks if task.spec["sequence"] == "a b"] == [60, 60, 60, 15]
    one = list(source.pairs(first))
    other = list(dsec(tmp_path, (50_000,), pairs_per_window="all").pairs(again[0]))
    assert len(one) == first.num_pairs
    assert all(
        same(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, RawPair) and isinstance(b, RawPair)
    )


def test_long_windows_are_few_to_a_task(tmp_path: Path) -> None:
    files = write_small(tmp_path, frames=3, constants=None)
    times = [BEGIN_US, BEGIN_US + 10, BEGIN_US + 120_000_000]
    files.timestamps.write_text("".join(f"{t}\n" for t in times))
    tasks = dsec(tmp_path, (20_000_000,)).tasks()
    assert [task.num_pairs for task in tasks] == [3, 3, 3, 2]
    assert [start for task in tasks for start, _ in task.spec["windows"]] == [
        BEGIN_US + i * 10_000_000 for i in range(11)
    ]


def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    for settings, message in (
        ({"durations_us": (49_999,)}, r"--durations \(49999us\) must be between 50ms and 20s"),
        ({"durations_us": (20_000_001,)}, "between 50ms and 20s"),
        ({"durations_us": ()}, "names no window length"),
        ({"durations_us": (1_000_000, 1_000_000)}, "names 1s twice"),
        ({"durations_us": (50_500,), "window_rounding": "ms"}, "whole milliseconds with --window-rounding ms"),
        ({"event_window_us": 2_000_000}, r"--event-window \(2s\) is longer than the window \(1s\)"),
        ({"max_gap_us": 1_999}, r"--max-gap \(1999us\) must be 2ms or more"),
        ({"step_us": 999}, r"--step \(999us\) must be 1ms or more"),
        ({"event_bins": 0}, r"--event-bins \(0\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            dsec(tmp_path, **({"durations_us": SECOND} | settings))


def built(source: DsecSource, folder: Path, tasks: list[SourceTask]) -> PairStore:
    both = Features(event=SMALL, target=SMALL)
    claim_store(folder, source, source.tasks(), both)
    finish(folder, source, [build_task(source, task, folder, both) for task in tasks], both, 0.0)
    return PairStore.open(folder)


def test_several_durations_stand_in_one_store(two_seconds: DsecFiles, tmp_path: Path) -> None:
    source = dsec(two_seconds.root, (200_000, 1_000_000, 2_000_000))
    store = built(source, tmp_path / "s", source.tasks())
    assert store.manifest.durations == {"200ms": 200_000, "1s": 1_000_000, "2s": 2_000_000}
    counts = {name: len(PairStore.open(tmp_path / "s", (name,)).index) for name in store.manifest.durations}
    assert counts == {"200ms": 19, "1s": 3, "2s": 1}
    assert store.manifest.source["steps"] == ["100ms", "500ms", "1s"]
    assert store.manifest.source["align"] == "far-field"
    assert store.manifest.source["events"] == "recorded"
    assert store.manifest.source["sequences"][0]["events"] == 20_000
    one_step = dsec(two_seconds.root, (50_000, 1_000_000), step_us=100_000)
    assert sum(task.num_pairs for task in one_step.tasks()) == 20 + 11


def test_all_images_of_a_window_stand_in_one_store(two_seconds: DsecFiles, tmp_path: Path) -> None:
    source = dsec(two_seconds.root, SECOND, pairs_per_window="all")
    store = built(source, tmp_path / "s", source.tasks())
    assert len(store.index) == len(set(store.index.sample_id)) == 15
    assert sorted(set(store.index.t_start_us.tolist())) == [BEGIN_US + i * 500_000 for i in range(3)]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_any_number_of_workers_prepares_the_same_store(tmp_path: Path) -> None:
    long_drive(tmp_path / "dsec", "interlaken_00_a", 420)
    long_drive(tmp_path / "dsec", "zurich_city_00_a", 620)
    results = []
    for num_workers in (1, 2, 16):
        flags = PrepareDsec(
            out=tmp_path / str(num_workers),
            root=tmp_path / "dsec",
            durations=("20s", "12s"),
            step="20s",
            max_gap="10s",
            num_workers=num_workers,
        )
        results.append(run_prepare(flags))
    one = results[0]
    assert [result["workers"] for result in results] == [1, 2, 16]
    assert one["files"] >= 16  # so 16 have something to do, and sequences are cut by span
    assert len({result["fingerprint"] for result in results}) == 1
    assert (one["pairs"], one["sequences"], one["rejected"]) == (2 * (21 + 31), 2, 0)
    assert one["durations"] == ["20s", "12s"]
    for path in (tmp_path / "1").iterdir():
        for others in ("2", "16"):
            assert path.read_bytes() == (tmp_path / others / path.name).read_bytes()


def long_drive(root: Path, name: str, seconds: int) -> DsecFiles:
    """A drive with few events and a frame every ten seconds."""
    files = DsecFiles(root, name)
    times = range(BEGIN_US, BEGIN_US + seconds * 1_000_000 + 1, 10_000_000)
    events = random_events(40_000, OFFSET_US, times[-1] + 1_000, seed=seconds)
    return write_sequence(files, events, times, None, t_offset_us=OFFSET_US, rgb_size=(18, 13))


@pytest.mark.usefixtures("ray_cluster")
def test_events_are_counted_covered_and_drawn(tmp_path: Path) -> None:
    events = random_events(50_000, OFFSET_US, BEGIN_US + 2_100_000)
    files = write_small(tmp_path / "dsec", "drive", frames=41, events=events)
    middle = run_prepare(PrepareDsec(out=tmp_path / "middle", root=files.root, step="1s"))
    each = run_prepare(PrepareDsec(out=tmp_path / "all", root=files.root, step="1s", pairs_per_window="all"))
    inside = int(((events.t_us >= BEGIN_US) & (events.t_us < BEGIN_US + 2_000_000)).sum())
    assert middle["windows"] == each["windows"] == 2
    assert middle["events_covered"] == each["events_covered"] == each["events_drawn"] == inside
    assert inside // 5 - 2 <= middle["events_drawn"] <= inside // 5
    assert 0 < middle["worker_peak_bytes"] < 2**30


def test_flags_make_the_source_that_they_name(tmp_path: Path) -> None:
    assert source_from_config(PrepareDsec(out=tmp_path, root=Path("dsec"))) == dsec(Path.cwd() / "dsec", SECOND)
    words = "dsec --out s --durations 50ms 1s --step 100ms --window-rounding ms --pairs-per-window all --align none"
    words += " --event-bins 3 --max-gap 1s --event-window 50ms"
    flags = cli.parse("prepare dsec", cli.COMMANDS["prepare dsec"], None, words.split())
    assert isinstance(flags, PrepareDsec)
    assert source_from_config(flags) == dsec(
        root=Path.cwd() / "dsec",
        durations_us=(50_000, 1_000_000),
        step_us=100_000,
        window_rounding="ms",
        pairs_per_window="all",
        align="none",
        event_bins=3,
        max_gap_us=1_000_000,
        event_window_us=50_000,
    )
