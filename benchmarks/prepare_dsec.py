"""`ray-app prepare dsec` end to end on a long drive in the true format, and the per-event loop on the same windows.

    .venv/bin/python benchmarks/prepare_dsec.py --folder FOLDER

FOLDER keeps the drive (about 2.5 GB, written once) and gets a store for each run. Two numbers are told apart: events
*covered* are those that lie in the windows; events *drawn* are those that were read and drawn, with `--pick middle`
a fifth of them. Writes benchmarks/results/prepare_dsec.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dsec_drive import write_drive
from numpy.typing import NDArray
from provenance import save
from render_events import per_event

from ray_app.events.recording import Events
from ray_app.events.render import Drawing, equal_counts
from ray_app.sources.dsec import DsecSource
from ray_app.sources.dsec_events import HEIGHT, WIDTH, DsecEvents
from ray_app.sources.dsec_files import sequence_in
from ray_app.sources.images import resized
from ray_app.sources.recorded import Cut
from ray_app.sources.sweep import Slice, swept

SECOND_US = 1_000_000
DSEC_WINDOWS = 5_208
"""Windows of 1 s of the reference's training set: 41 sequences, 36.7 billion events, so 14 million a second."""
MIDDLE, ALL = ("--pick", "middle", "--step", "90ms"), ("--pick", "all")
"""Steps by which the drive's windows fill four tasks, for one and for two workers."""


def prepare(root: Path, folder: Path, num_workers: int, *flags: str) -> dict[str, Any]:
    """The --json object of one run, with rates for each worker."""
    out = folder / f"store-{uuid.uuid4().hex[:8]}"
    words = ["prepare", "dsec", str(root), "--out", str(out), "--num-workers", str(num_workers), *flags, "--json"]
    done = subprocess.run([sys.executable, "-m", "ray_app", *words], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    core_seconds = result["seconds"] * result["workers"]
    kept = ("pairs", "quarantined", "windows", "events_covered", "events_drawn", "seconds", "workers", "fingerprint")
    return {
        "flags": " ".join(flags),
        **{name: result[name] for name in kept},
        "worker_peak_mib": round(result["worker_peak_bytes"] / 2**20),
        "windows_per_s_per_core": round(result["windows"] / core_seconds, 2),
        "million_events_covered_per_s_per_core": round(result["events_covered"] / core_seconds / 1e6, 2),
        "million_events_drawn_per_s_per_core": round(result["events_drawn"] / core_seconds / 1e6, 2),
    }


def against_the_loop(root: Path, name: str, num_windows: int) -> dict[str, Any]:
    """Windows of 1 s by EventGPT's loop and by ours, in turn, in one process."""
    sequence = sequence_in(root / "train" / name, name)
    times_us = sequence.times_us()
    sources = {pick: DsecSource(root, Cut((SECOND_US,), pick=pick)) for pick in ("middle", "all")}
    (task, *_) = sources["middle"].tasks()
    starts_us = [int(times_us[0]) + 3 * (number + 1) * SECOND_US for number in range(num_windows)]
    windows = [[start_us, start_us + SECOND_US] for start_us in starts_us]
    mine = type(task)(task.name, num_windows, {**task.spec, "windows": windows})
    ours_s = {pick: timed(ours, source, mine)[0] / num_windows for pick, source in sources.items()}
    rounds: list[dict[str, float]] = []
    with DsecEvents(sequence.events) as reader:
        for start_us in starts_us:
            first, stop = reader.index(start_us), reader.index(start_us + SECOND_US)
            found: dict[str, float] = {"events": stop - first}
            found["loop_reading_s"], events = timed(read, reader, first, stop)
            found["loop_drawing_s"], images = timed(loop, events)
            found["drawing_s"], _ = timed(draw, events)
            fifth = (stop - first) // 5
            middle = (first + 2 * fifth, first + 3 * fifth)
            found["read_and_drawn_s"], image = timed(drawn_alone, reader, middle)
            assert np.array_equal(image, images[2]), "the same picture, to the byte"
            rounds.append(found)
    slow = [r["loop_reading_s"] + r["loop_drawing_s"] for r in rounds]
    return {
        "what": "the loop reads a window, draws its five images event by event and keeps the middle one, as EventGPT "
        "does. It decodes no frame: events_side is ours without frames too, whole_pair is with everything that ours "
        "does (frame decoded, aligned, both resized)",
        "windows": rounds,
        "ours_s_per_window": ours_s,
        "loop_million_events_per_s": round(sum(r["events"] for r in rounds) / sum(slow) / 1e6, 3),
        "ratio_events_side": median([a / r["read_and_drawn_s"] for a, r in zip(slow, rounds, strict=True)]),
        "ratio_whole_pair": median([a / ours_s["middle"] for a in slow]),
        "ratio_five_whole_pairs": median([a / ours_s["all"] for a in slow]),
        "ratio_drawing_alone": median([r["loop_drawing_s"] / r["drawing_s"] for r in rounds]),
    }


def floor(root: Path, name: str, num_events: int = 2_800_000) -> dict[str, Any]:
    """What cannot be left out: columns decompressed, events drawn, frames decoded; medians of five."""
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
    decompress_ns, draw_ns = (statistics.median(times) / num_events * 1e9 for times in (raw, drawn))
    return {
        "decompress_ns_per_event": round(decompress_ns, 2),
        "decompress_and_check_ns_per_event": round(statistics.median(checked) / num_events * 1e9, 2),
        "draw_ns_per_event": round(draw_ns, 2),
        "million_events_per_s_decompressed_and_drawn": round(1e3 / (decompress_ns + draw_ns), 1),
        "decode_png_ms_per_frame": round(statistics.median(decoded) * 1e3, 1),
        "align_ms_per_frame": round(statistics.median(aligned) * 1e3, 1),
    }


def whole_dsec(run: dict[str, Any]) -> dict[str, Any]:
    """Arithmetic, not a measurement: the reference's windows at this run's speed, as if cores added up."""
    hours = DSEC_WINDOWS / run["windows_per_s_per_core"] / 3600
    return {f"hours_on_{cores}_cores": round(hours / cores, 4) for cores in (1, 8, 64)}


def ours(source: DsecSource, task: Any) -> list[bytes]:
    """A window's pairs as they are stored."""
    pairs = list(source.pairs(task))
    return [resized(image, 224, 224).tobytes() for pair in pairs for image in (pair.event_HWC, pair.target_HWC)]


def drawn_alone(reader: DsecEvents, middle: Slice) -> NDArray[np.uint8]:
    """One image, without its frame."""
    (sketch,) = swept(reader, [middle])
    return sketch.image()


def read(reader: DsecEvents, first: int, stop: int) -> Events:
    parts = list(reader.parts(first, stop))
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "y", "t_us", "p"))
    return Events(*joined, WIDTH, HEIGHT)


def columns(reader: DsecEvents, first: int, stop: int) -> None:
    for name in ("x", "y", "p", "t"):
        reader._read(name, first, stop)


def draw(events: Events) -> None:
    drawing = Drawing(WIDTH, HEIGHT)
    drawing.add(events)
    drawing.image()


def loop(events: Events) -> list[NDArray[np.uint8]]:
    """All five images of a window, event by event."""
    return [per_event(part) for part in equal_counts(events, 5)]


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """(seconds, what it returned)"""
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def median(values: list[float]) -> float:
    return round(statistics.median(values), 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=24)
    parser.add_argument("--events-per-s", type=int, default=14_000_000)
    parser.add_argument("--loop-windows", type=int, default=3)
    parser.add_argument("--only-write", action="store_true", help="write the drive and end")
    args = parser.parse_args()
    root = args.folder.resolve() / "dsec"
    files = write_drive(root, "drive_00", args.seconds, args.events_per_s)
    if args.only_write:
        return
    with DsecEvents(files.events) as reader:
        num_events = len(reader)
    runs = {
        f"{pick}_{workers}_workers": prepare(root, args.folder, workers, "--durations", "1s", *flags)
        for pick, flags in (("middle", MIDDLE), ("all", ALL))
        for workers in (1, 2)
    }
    longest = prepare(root, args.folder, 1, "--durations", "20s", "--pick", "all")
    save(
        "prepare_dsec",
        {
            "what": "one made-up drive in the true format; Blosc zstd chunks, PNG frames of 1440 x 1080 at 20 Hz, "
            "--align infinite; end to end: read, drawn, aligned, resized, compressed, hashed, written",
            "drive": {
                "events": num_events,
                "seconds": args.seconds,
                "event_bytes": round(files.events.stat().st_size / num_events, 2),
                "mb_per_frame": round(
                    sum(p.stat().st_size for p in files.images.iterdir()) / 1e6 / 20 / args.seconds, 2
                ),
            },
            "runs": runs,
            "window_of_20s": longest,
            "against_the_loop": against_the_loop(root, "drive_00", args.loop_windows),
            "floor": floor(root, "drive_00"),
            "whole_dsec_arithmetic": {name: whole_dsec(run) for name, run in runs.items()},
        },
    )


if __name__ == "__main__":
    main()
