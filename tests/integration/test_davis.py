"""DAVIS recordings (.aedat4) as pairs: equal to what others decoded, on one clock, and never a crash."""

import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ray_app import cli
from ray_app.commands.prepare.command import run_prepare, source_from_config
from ray_app.config.prepare import PrepareDavis
from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.events.render import equal_counts, event_image
from ray_app.events.windows import Window
from ray_app.sources.base import RawPair, RejectedPair
from ray_app.sources.davis import source as davis
from ray_app.sources.davis.aedat4 import Aedat4, decoded_to_the_end, frame_span
from ray_app.sources.davis.source import DavisSource, EventSpan, Reader
from ray_app.sources.davis.spool import Spool
from ray_app.sources.npy import read_npy
from ray_app.sources.recorded import WindowingConfig
from ray_app.store.pair_store import PairStore

WIDTH, HEIGHT = 346, 260
SHORT = WindowingConfig((50_000,))


@pytest.fixture(scope="module")
def sample(shared_data: Path) -> Path:
    return shared_data / "pairs" / "sample.aedat4"


@pytest.fixture(scope="module")
def decoded(shared_data: Path) -> Events:
    """The sample's events as another program decoded them."""
    columns = read_npy(shared_data / "pairs" / "davis346_events.npy")
    return Events.checked(columns["x"], columns["y"], columns["t"], columns["p"], WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def pictures(shared_data: Path) -> dict[int, NDArray[np.uint8]]:
    """Its frames as another program decoded them, by the start of their exposure in microseconds."""
    files = sorted((shared_data / "pairs").glob("frame_*.png"))
    return {int(file.stem.removeprefix("frame_")): np.asarray(Image.open(file)) for file in files}


def everything(source: DavisSource) -> list[RawPair | RejectedPair]:
    return [item for task in source.tasks() for item in source.pairs(task)]


def pairs_of(source: DavisSource) -> list[RawPair]:
    found = everything(source)
    assert [item for item in found if isinstance(item, RejectedPair)] == []
    return [item for item in found if isinstance(item, RawPair)]


def events_in(excerpt: EventSpan) -> Events:
    """All of an excerpt's events."""
    parts = list(excerpt.parts(0, excerpt.stop))
    x, y, t_us, p = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "y", "t_us", "p"))
    return Events(x, y, t_us, p, excerpt.width, excerpt.height)


def columns_of(events: Events) -> list[NDArray[Any]]:
    return [events.x, events.y, events.t_us, events.p]


def test_events_and_frames_equal_those_that_another_program_decoded(
    sample: Path, decoded: Events, pictures: dict[int, NDArray[np.uint8]]
) -> None:
    everything = Reader(sample).excerpt(Window(0, 2**62))
    assert everything.stop == 6_676
    for mine, theirs in zip(columns_of(events_in(everything)), columns_of(decoded), strict=True):
        assert np.array_equal(mine, theirs)
    assert [frame["exposure_begin_t"] for frame in everything.frames] == list(pictures)
    assert everything.frames_us.tolist() == [t_us + 250 for t_us in pictures]  # exposed for half a millisecond
    for number, picture in enumerate(pictures.values()):
        assert np.array_equal(everything.frame(number), np.repeat(picture[..., None], 3, axis=2))


def test_a_pair_is_the_middle_fifth_of_the_windows_events_with_its_middle_frame(
    sample: Path, decoded: Events, pictures: dict[int, NDArray[np.uint8]]
) -> None:
    times = [t_us + 250 for t_us in pictures]
    found = pairs_of(DavisSource((sample,), SHORT))
    assert [pair.t_start_us - times[0] for pair in found] == [0, 25_000, 50_000]
    for pair in found:
        assert (pair.sequence, pair.t_end_us - pair.t_start_us) == ("sample", 50_000)
        inside = decoded.between(pair.t_start_us, pair.t_end_us)
        assert np.array_equal(pair.event_HWC, event_image(equal_counts(inside, 5)[2]))
        frames = [i for i, t_us in enumerate(times) if pair.t_start_us <= t_us < pair.t_end_us]
        assert np.array_equal(pair.target_HWC[..., 1], list(pictures.values())[frames[len(frames) // 2]])
        assert pair.event_HWC.shape == pair.target_HWC.shape == (HEIGHT, WIDTH, 3)
    each = pairs_of(DavisSource((sample,), replace(SHORT, pairs_per_window="all")))
    assert len(each) == 15
    assert all(np.array_equal(a.event_HWC, b.event_HWC) for a, b in zip(each[2::5], found, strict=True))


def test_frames_and_events_lie_on_one_clock(sample: Path) -> None:
    """Pixels that got brighter between two frames gave positive events then: most of all at the true times."""
    everything = Reader(sample).excerpt(Window(0, 2**62))
    events = events_in(everything)
    grey = [np.log(everything.frame(i)[..., 0] + 10.0) for i in range(4)]

    def agreement(shift_us: int) -> float:
        values = []
        for i in range(3):
            span = (everything.frames_us[[i, i + 1]] + shift_us).tolist()
            part = events.between(*span)
            counts = np.zeros((HEIGHT, WIDTH))
            np.add.at(counts, (part.y, part.x), part.p.astype(float) * 2 - 1)
            hit = counts != 0
            change = (grey[i + 1] - grey[i])[hit]
            values.append(float(np.sum(change * counts[hit])))
        return sum(values)

    shifts = [ms * 1000 for ms in (-80, -60, -40, -20, 0, 20, 40, 60, 80)]
    assert max(shifts, key=agreement) == 0
    assert agreement(0) > 2_000


def test_tasks_in_any_order_give_the_same_pairs(sample: Path) -> None:
    source = DavisSource((sample,), WindowingConfig((50_000, 60_000), step_us=5_000, event_bins=2, max_gap_us=60_000))
    tasks = source.tasks()
    forwards = [list(source.pairs(task)) for task in tasks]
    backwards = [list(source.pairs(task)) for task in reversed(tasks)][::-1]
    assert sum(len(part) for part in forwards) == 15 + 13
    for one, other in zip(chain(*forwards), chain(*backwards), strict=True):
        assert isinstance(one, RawPair)
        assert isinstance(other, RawPair)
        assert one.t_start_us == other.t_start_us
        assert np.array_equal(one.event_HWC, other.event_HWC)
        assert np.array_equal(one.target_HWC, other.target_HWC)


def test_a_reader_forgets_what_is_behind(sample: Path) -> None:
    reader = Reader(sample)
    whole = Reader(sample).excerpt(Window(0, 2**62))
    for start_us in range(int(whole.frames_us[0]), int(whole.frames_us[-1]), 10_000):
        window = Window(start_us, start_us + 20_000)
        mine, theirs = (
            events_in(excerpt).between(start_us, start_us + 20_000) for excerpt in (reader.excerpt(window), whole)
        )
        assert all(np.array_equal(a, b) for a, b in zip(columns_of(mine), columns_of(theirs), strict=True))
    assert sum(packet.stop - packet.first for packet in reader._events) < 3_000
    assert len(reader._frames) <= 2


def test_windows_with_few_events_or_a_gap_are_rejected_with_the_reason(sample: Path) -> None:
    found = everything(DavisSource((sample,), replace(SHORT, max_gap_us=2_000)))
    assert all("--max-gap allows 2ms" in item.reason for item in found if isinstance(item, RejectedPair))
    assert any(isinstance(item, RejectedPair) for item in found)
    (few, *_) = everything(DavisSource((sample,), WindowingConfig((50_000,), event_bins=64, event_window_us=100)))
    assert isinstance(few, RejectedPair)
    assert "events cannot be drawn as 64 images" in few.reason
    excerpt = Reader(sample).excerpt(Window(0, 2**62))
    times_us = events_in(excerpt).t_us
    for a, b in ((0, 1), (100, 101), (3_000, 3_001)):
        low, high = times_us[[a, b]].tolist()
        assert excerpt.silence(low, high + 1, high - low) is None
        if high - low > 1:
            assert excerpt.silence(low, high + 1, high - low - 1) == (low, high)


def test_a_frame_that_shows_a_part_or_another_format_is_refused(sample: Path) -> None:
    whole = Reader(sample).excerpt(Window(0, 2**62))
    colour = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)

    def frame(**changes: Any) -> NDArray[np.uint8]:
        if "pixels" in changes:
            changes["pixels"] = Spool().put(changes["pixels"])
        return replace(whole, frames=[whole.frames[0] | changes]).frame(0)

    with pytest.raises(InputError, match=r"shows 346 x 260 pixels from \(4, 0\) on; a pair needs the sensor's whole"):
        frame(offset_x=4)
    with pytest.raises(InputError, match="shows 320 x 260 pixels"):
        frame(width=320)
    with pytest.raises(InputError, match="format I;16; it must be L, RGB or RGBA"):
        frame(format="I;16", pixels=np.zeros((HEIGHT, WIDTH), np.uint16))
    for format_, channels in (("RGB", 3), ("RGBA", 4)):
        assert np.array_equal(frame(format=format_, pixels=colour[..., :channels]), colour[..., :3])


def test_every_truncation_is_refused_and_says_how_far_the_recording_goes(sample: Path, tmp_path: Path) -> None:
    whole = sample.read_bytes()
    cut = tmp_path / "cut.aedat4"
    data_end = 428_314  # behind it is an index of the file, which nothing here reads
    for size in [1, 14, 100, 2_000, *range(5_000, data_end, data_end // 40), data_end - 1]:
        cut.write_bytes(whole[:size])
        error = decoded_to_the_end(cut)["error"]
        assert re.search(r"cut\.aedat4 is (truncated or damaged|no readable AEDAT4)", error)
    cut.write_bytes(whole[: data_end + 7])
    assert decoded_to_the_end(cut) == decoded_to_the_end(sample)
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"after \d+ events and \d frames, the last at 15891631474\d+ µs"):
        DavisSource((cut,), SHORT).tasks()


def test_damage_is_an_error_and_never_a_crash(sample: Path, tmp_path: Path) -> None:
    whole = sample.read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.aedat4"
    reasons = []
    for trial in range(8):
        data = bytearray(whole)
        place = int(rng.integers(20_000, len(data))) if trial % 2 else int(rng.integers(14, 80))
        data[place : place + 200] = rng.bytes(200)
        damaged.write_bytes(data)
        try:
            frame_span(damaged)
        except InputError as error:
            reasons.append(str(error))
    assert all("damaged.aedat4" in reason for reason in reasons)
    assert len(reasons) >= 4


def test_a_decoder_that_takes_its_process_with_it_is_an_error(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aedat.py").write_text("import os\nDecoder = lambda path: os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)  # for the process that decodes; here the library is loaded already
    with pytest.raises(InputError, match=r"sample\.aedat4 is truncated or damaged: the decoder broke down on it"):
        DavisSource((sample,), SHORT).tasks()


def test_a_reader_that_broke_off_is_not_resumed(sample: Path, tmp_path: Path) -> None:
    file = tmp_path / "sample.aedat4"
    shutil.copy(sample, file)
    source = DavisSource((file,), SHORT)
    (task,) = source.tasks()
    file.write_bytes(sample.read_bytes()[:200_000])
    for _ in range(2):
        with pytest.raises(InputError, match="is truncated or damaged"):
            list(source.pairs(task))


def test_what_is_no_such_recording_is_refused(sample: Path, tmp_path: Path, shared_data: Path) -> None:
    empty = tmp_path / "empty.aedat4"
    empty.write_bytes(b"")
    for path, message in (
        (empty, "is no readable AEDAT4 recording"),
        (shared_data / "events" / "000099.npy", "is no readable AEDAT4 recording"),
        (tmp_path / "nothing.aedat4", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            DavisSource((path,), SHORT).tasks()
    data = sample.read_bytes()
    assert data.count(b">FRME<") == 1
    (tmp_path / "other.aedat4").write_bytes(data.replace(b">FRME<", b">IMUS<"))
    with pytest.raises(InputError, match="has 0 frame streams; `prepare davis` needs one of events and one"):
        DavisSource((tmp_path / "other.aedat4",), SHORT).tasks()
    with pytest.raises(InputError, match="no recording has frames over 1s"):
        DavisSource((sample,), WindowingConfig((50_000, 1_000_000))).tasks()


def test_events_that_run_backwards_over_packets_are_refused(sample: Path) -> None:
    file = Aedat4(sample)
    packets = [packet for packet in file if isinstance(packet, Events)]
    with pytest.raises(InputError, match=r"event times do not rise: \d+ µs after 6676 events and 4 frames"):
        file._events(np.rec.fromarrays(columns_of(packets[0]), names=["x", "y", "t", "on"]))


def test_a_machine_without_the_library_learns_what_to_install(sample: Path) -> None:
    script = (
        "import sys; sys.modules['aedat'] = None\n"
        "from pathlib import Path\n"
        "from ray_app.errors import InputError\n"
        "from ray_app.sources.davis.aedat4 import frame_span\n"
        "try:\n    frame_span(Path(sys.argv[1]))\n"
        "except InputError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script, str(sample)], capture_output=True, text=True, check=True)
    assert "`pip install 'ray-app[davis]'` brings it" in said.stdout


class Synthetic:
    """In place of Aedat4: 64 s with a packet of events every 10 ms and a frame every 40 ms, made as asked for."""

    width, height = WIDTH, HEIGHT
    num_events = 0
    events_until_us = frames_until_us = -1

    def __init__(self, path: Path) -> None:
        del path

    def __iter__(self) -> Iterator[Events | tuple[int, dict[str, Any]]]:
        frame = {"pixels": np.full((HEIGHT, WIDTH), 7, np.uint8), "format": "L", "width": WIDTH, "height": HEIGHT}
        for start_us in range(0, 64_000_000, 10_000):
            rng = np.random.default_rng(start_us)
            x, y = rng.integers(0, WIDTH, 1000).astype(np.uint16), rng.integers(0, HEIGHT, 1000).astype(np.uint16)
            events = Events(x, y, start_us + 10 * np.arange(1000), (x % 2).astype(np.uint8), WIDTH, HEIGHT)
            self.num_events, self.events_until_us = self.num_events + 1000, int(events.t_us[-1])
            yield events
            if start_us % 40_000 == 0:
                self.frames_until_us = start_us
                yield start_us, {**frame, "offset_x": 0, "offset_y": 0}


def test_memory_does_not_grow_with_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(davis, "Aedat4", Synthetic)
    monkeypatch.setattr(davis, "frame_span", lambda _: (0, 63_960_000))
    peaks = []
    for seconds in (2, 20):
        file = tmp_path / f"{seconds}.aedat4"
        file.write_bytes(b"1")
        source = DavisSource((file,), WindowingConfig((seconds * 1_000_000,), pairs_per_window="all"))
        (task, *_) = source.tasks()
        tracemalloc.start()
        pairs = [item.num_events for item in islice(source.pairs(task), 5) if isinstance(item, RawPair)]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        davis._LEFT_OPEN.clear()
        assert pairs == [seconds * 100_000] * 5
    assert peaks[1] < peaks[0] + 3e6 < 8e6  # 20 s are 26 MB of events and 45 MB of frames; a note a packet stays


@pytest.mark.usefixtures("ray_cluster")
def test_one_and_two_workers_prepare_the_same_store(sample: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "sample.aedat4"
    other.parent.mkdir()
    shutil.copy(sample, other)
    results = []
    for num_workers in (1, 2):
        flags = PrepareDavis(
            out=tmp_path / str(num_workers),
            files=(sample, other),
            durations=("50ms", "100ms"),
            num_workers=num_workers,
        )
        results.append(run_prepare(flags))
    one, two = results
    assert one["fingerprint"] == two["fingerprint"]
    assert (one["pairs"], one["sequences"], one["rejected"]) == (8, 2, 0)
    store = PairStore.open(tmp_path / "1")
    about = store.manifest.source
    assert [entry["sequence"] for entry in about["recordings"]] == ["sample", "sample-2"]
    assert (about["events"], about["align"]) == ("recorded", "same pixels")


def test_flags_make_the_source_that_they_name() -> None:
    words = "a.aedat4 b.aedat4 --out s --durations 50ms 1s --step 100ms --max-gap 1s"
    words += " --pairs-per-window all --event-bins 3"
    flags = cli.parse("prepare davis", cli.COMMANDS["prepare davis"], None, words.split())
    assert isinstance(flags, PrepareDavis)
    assert source_from_config(flags) == DavisSource(
        (Path.cwd() / "a.aedat4", Path.cwd() / "b.aedat4"),
        WindowingConfig(
            (50_000, 1_000_000), step_us=100_000, pairs_per_window="all", event_bins=3, max_gap_us=1_000_000
        ),
    )
