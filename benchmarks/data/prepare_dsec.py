"""`ray-app prepare dsec` end to end on a long drive in the true format, and the per-event loop on the same windows.

    python -m benchmarks.data.prepare_dsec --folder FOLDER

FOLDER keeps the drive (about 2.5 GB, written once) and, while it runs, a store. Everything is timed --rounds times,
in turn; the result has medians and ranges. It counts events twice: *covered* are those in the windows, *drawn* those
in event images, with `--pairs-per-window middle` a fifth of them. What several windows of a task draw is read once.
Writes benchmarks/results/prepare_dsec.json; about 20 minutes on two free cores.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.dsec_drive import write_drive
from benchmarks.data.render_events import per_event
from benchmarks.provenance import require_commit, save
from ray_app.events.recording import Events
from ray_app.events.render import EventCanvas, equal_counts
from ray_app.sources.dsec.events_file import HEIGHT, WIDTH, DsecEvents
from ray_app.sources.dsec.layout import sequence_in
from ray_app.sources.dsec.source import DsecSource
from ray_app.sources.event_stream import Slice, render_slices
from ray_app.sources.images import resized
from ray_app.sources.recorded import WindowingConfig

SECOND_US = 1_000_000
DSEC_WINDOWS = 5_208
"""Windows of 1 s of the reference's training set: 41 sequences, 36.7 billion events, so 14 million a second."""
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "middle_1_worker": (1, ("--durations", "1s", "--pairs-per-window", "middle", "--step", "180ms")),
    "middle_2_workers": (2, ("--durations", "1s", "--pairs-per-window", "middle", "--step", "180ms")),
    "all_1_worker": (1, ("--durations", "1s", "--pairs-per-window", "all", "--step", "1s")),
    "all_2_workers": (2, ("--durations", "1s", "--pairs-per-window", "all", "--step", "1s")),
    "window_of_20s": (1, ("--durations", "20s", "--pairs-per-window", "all")),
    "four_durations_in_one": (1, ("--durations", "500ms", "1s", "2s", "4s")),
    **{f"of_four_{name}_alone": (1, ("--durations", name)) for name in ("500ms", "1s", "2s", "4s")},
}
"""Workers and flags. By these steps the drive's windows fill two tasks, and what they draw overlaps by a tenth
(`middle`) or not at all (`all`): the rates are those of reading too."""
SAME = ("pairs", "rejected", "windows", "events_covered", "events_drawn", "workers", "fingerprint")
"""What every round must give alike."""


def prepare(root: Path, folder: Path, num_workers: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """Run the command once and return its --json object."""
    out = folder / f"store-{uuid.uuid4().hex[:8]}"
    words = ["prepare", "dsec", str(root), "--out", str(out), "--num-workers", str(num_workers), *flags, "--json"]
    done = subprocess.run([sys.executable, "-m", "ray_app", *words], check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    return json.loads(done.stdout)


def summary(flags: tuple[str, ...], results: list[dict[str, Any]]) -> dict[str, Any]:
    """One configuration's rounds, with rates for each worker."""
    first = results[0]
    assert all(result[name] == first[name] for result in results for name in SAME)

    def rate(name: str, unit: float = 1.0) -> dict[str, Any]:
        return spread([r[name] / (r["seconds"] * r["workers"]) / unit for r in results])

    return {
        "flags": " ".join(flags),
        **{name: first[name] for name in SAME},
        "seconds": spread([r["seconds"] for r in results]),
        "worker_peak_mib": spread([r["worker_peak_bytes"] / 2**20 for r in results]),
        "windows_per_s_per_core": rate("windows"),
        "million_events_covered_per_s_per_core": rate("events_covered", 1e6),
        "million_events_drawn_per_s_per_core": rate("events_drawn", 1e6),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range."""
    return {"median": round(statistics.median(values), 3), "range": [round(min(values), 3), round(max(values), 3)]}


def four_durations(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Four durations in one sweep against one after the other: seconds from the first task on, medians."""
    alone = [run["seconds"]["median"] for name, run in runs.items() if name.startswith("of_four")]
    together = runs["four_durations_in_one"]["seconds"]["median"]
    return {"together_s": together, "one_by_one_s": round(sum(alone), 3), "share": round(together / sum(alone), 3)}


def against_the_loop(root: Path, name: str, num_windows: int, num_rounds: int) -> dict[str, Any]:
    """Windows of 1 s by EventGPT's loop and by ours, in turn, in one process."""
    sequence = sequence_in(root / "train" / name, name)
    first_us = int(sequence.times_us()[0])
    sources = {
        pick: DsecSource(root, WindowingConfig((SECOND_US,), pairs_per_window=pick)) for pick in ("middle", "all")
    }
    (task, *_) = sources["middle"].tasks()
    starts_us = [first_us + 3 * (number + 1) * SECOND_US for number in range(num_windows)]
    mine = type(task)(
        task.name, num_windows, {**task.spec, "windows": [[start_us, start_us + SECOND_US] for start_us in starts_us]}
    )
    measured: list[dict[str, float]] = []
    with DsecEvents(sequence.events) as reader:
        for _ in range(num_rounds):
            ours_s = {pick: timed(ours, source, mine)[0] / num_windows for pick, source in sources.items()}
            for start_us in starts_us:
                found = by_the_loop(reader, start_us)
                measured.append(found | {f"whole_{pick}_s": seconds for pick, seconds in ours_s.items()})
    slow = [m["loop_reading_s"] + m["loop_drawing_s"] for m in measured]
    return {
        "what": "the loop reads a window, draws its five images event by event and keeps the middle one, as EventGPT "
        "does. It decodes no frame: events_side is ours without frames too, whole_pair is with everything that ours "
        "does (frame decoded, aligned, both resized)",
        "windows": measured,
        "loop_million_events_per_s": spread([m["events"] / s / 1e6 for m, s in zip(measured, slow, strict=True)]),
        "ratio_events_side": spread([s / m["read_and_drawn_s"] for m, s in zip(measured, slow, strict=True)]),
        "ratio_whole_pair": spread([s / m["whole_middle_s"] for m, s in zip(measured, slow, strict=True)]),
        "ratio_five_whole_pairs": spread([s / m["whole_all_s"] for m, s in zip(measured, slow, strict=True)]),
        "ratio_drawing_alone": spread([m["loop_drawing_s"] / m["drawing_s"] for m in measured]),
    }


def by_the_loop(reader: DsecEvents, start_us: int) -> dict[str, float]:
    """Seconds that the loop and ours take for a window's events, without frames."""
    first, stop = reader.index(start_us), reader.index(start_us + SECOND_US)
    found: dict[str, float] = {"events": stop - first}
    found["loop_reading_s"], events = timed(read, reader, first, stop)
    found["loop_drawing_s"], images = timed(loop, events)
    found["drawing_s"], _ = timed(draw, events)
    fifth = (stop - first) // 5
    found["read_and_drawn_s"], image = timed(drawn_alone, reader, (first + 2 * fifth, first + 3 * fifth))
    assert np.array_equal(image, images[2]), "the same picture, to the byte"
    return found


def floor(root: Path, name: str, num_events: int = 2_800_000) -> dict[str, Any]:
    """Time the unavoidable parts: columns decompressed, events drawn, frames decoded; five of each."""
    sequence = sequence_in(root / "train" / name, name)
    view = sequence.view()
    with DsecEvents(sequence.events) as reader:
        firsts = [10_000_000 * (i + 1) for i in range(5)]
        parts = [read(reader, first, first + num_events) for first in firsts]
        raw = [timed(columns, reader, f, f + num_events)[0] for f in firsts]
        checked = [timed(read, reader, f, f + num_events)[0] for f in firsts]
    drawn = [timed(draw, part)[0] for part in parts]
    frames = [sequence.frame(i) for i in range(5)]
    decoded = [timed(sequence.frame, i)[0] for i in range(5, 10)]
    aligned = [timed(view.target, frame)[0] for frame in frames]
    raw_ns, checked_ns, draw_ns = (spread([t / num_events * 1e9 for t in times]) for times in (raw, checked, drawn))
    return {
        "decompress_ns_per_event": raw_ns,
        "decompress_and_check_ns_per_event": checked_ns,
        "draw_ns_per_event": draw_ns,
        "million_events_per_s_decompressed_and_drawn": round(1e3 / (raw_ns["median"] + draw_ns["median"]), 1),
        "decode_png_ms_per_frame": spread([t * 1e3 for t in decoded]),
        "align_ms_per_frame": spread([t * 1e3 for t in aligned]),
    }


def whole_dsec(run: dict[str, Any]) -> dict[str, Any]:
    """Arithmetic, not a measurement: the reference's windows at this run's speed, as if cores added up."""
    hours = DSEC_WINDOWS / run["windows_per_s_per_core"]["median"] / 3600
    return {f"hours_on_{cores}_cores": round(hours / cores, 4) for cores in (1, 8, 64)}


def ours(source: DsecSource, task: Any) -> list[bytes]:
    """Return a window's pairs as they are stored."""
    pairs = list(source.pairs(task))
    return [resized(image, 224, 224).tobytes() for pair in pairs for image in (pair.event_HWC, pair.target_HWC)]


def drawn_alone(reader: DsecEvents, middle: Slice) -> NDArray[np.uint8]:
    """One image, without its frame."""
    (sketch,) = render_slices(reader, [middle])
    return sketch.image()


def read(reader: DsecEvents, first: int, stop: int) -> Events:
    parts = list(reader.parts(first, stop))
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "y", "t_us", "p"))
    return Events(*joined, WIDTH, HEIGHT)


def columns(reader: DsecEvents, first: int, stop: int) -> None:
    for name in ("x", "y", "p", "t"):
        reader._read(name, first, stop)


def draw(events: Events) -> None:
    drawing = EventCanvas(WIDTH, HEIGHT)
    drawing.add(events)
    drawing.image()


def loop(events: Events) -> list[NDArray[np.uint8]]:
    """All five images of a window, event by event."""
    return [per_event(part) for part in equal_counts(events, 5)]


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Return (seconds, result) of a call."""
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=24)
    parser.add_argument("--events-per-s", type=int, default=14_000_000)
    parser.add_argument("--loop-windows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-write", action="store_true", help="write the drive and end")
    args = parser.parse_args()
    root = args.folder.resolve() / "dsec"
    files = write_drive(root, "drive_00", args.seconds, args.events_per_s)
    if args.only_write:
        return
    with DsecEvents(files.events) as reader:
        num_events = len(reader)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for _ in range(args.rounds):
        for name, (workers, flags) in RUNS.items():
            rounds[name].append(prepare(root, args.folder, workers, flags))
    runs = {name: summary(flags, rounds[name]) for name, (_, flags) in RUNS.items()}
    save(
        "prepare_dsec",
        {
            "what": "one made-up drive in the true format; Blosc zstd chunks, PNG frames of 1440 x 1080 at 20 Hz, "
            "--align far-field; end to end: read, drawn, aligned, resized, compressed, hashed, written",
            "drive": {
                "events": num_events,
                "seconds": args.seconds,
                "event_bytes": round(files.events.stat().st_size / num_events, 2),
                "mb_per_frame": round(
                    sum(p.stat().st_size for p in files.images.iterdir()) / 1e6 / 20 / args.seconds, 2
                ),
            },
            "rounds": args.rounds,
            "runs": runs,
            "four_durations": four_durations(runs),
            "against_the_loop": against_the_loop(root, "drive_00", args.loop_windows, args.rounds),
            "floor": floor(root, "drive_00"),
            "whole_dsec_arithmetic": {
                name: whole_dsec(runs[name]) for name in ("middle_1_worker", "middle_2_workers")
            },
        },
    )


if __name__ == "__main__":
    require_commit()
    main()
