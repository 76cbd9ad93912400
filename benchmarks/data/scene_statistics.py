"""Statistics of rendered scenes against those of real recordings, and the core-seconds of a pair.

    python -m benchmarks.data.scene_statistics

Builds 1,020 pairs of 60 drives with the source's defaults, in two processes of one thread each, keeps the features
(224 x 224, bilinear, as `ray-app prepare` stores them) in memory, and writes
benchmarks/results/scene_statistics.json. Nothing is stored: writing a pair store is timed by reference_job.py.
`mean_target` is taken under the default sequence split, and under nineteen more, which show how far that number
hangs on which drives are in the test part.
"""

import argparse
import json
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: a core-second is then a second of one core

import numpy as np
from numpy.typing import NDArray

from benchmarks.provenance import RESULTS, provenance, require_commit
from ray_app.commands.prepare.store_builder import resized
from ray_app.config.base import SplitConfig
from ray_app.events.render import event_image
from ray_app.scenes.scene import Scene
from ray_app.sources.base import SourceTask
from ray_app.sources.scenes import ScenesSource
from ray_app.store.manifest import PIXELS
from ray_app.store.pair_store import PairIndex
from ray_app.store.split import split_pairs

RESULT = RESULTS / "scene_statistics.json"
THETA = 0.8
WANTED = {
    "cos_sim_mean": (0.60, 0.70),
    "cos_sim_std": (0.08, 0.12),
    "mean_target_accept_rate": (0.30, 0.70),
    "events_median": (165_000, 1_550_000),
    "active_share_median": (0.10, 0.30),
    "positive_share_mean": (0.50, 0.65),
}
"""From 40,298 real windows of 50 ms (events), real event images (active, positive) and the reference's 5,208 pairs
(cosine before: 0.648 ± 0.097)."""


class Stopwatch:
    """Core-seconds by stage."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    def run(self, stage: str, call: Any, *args: Any) -> Any:
        began = time.process_time()
        result = call(*args)
        self.spent[stage] += time.process_time() - began
        return result


class TimedScene:
    """A scene whose grey pictures are timed apart from the simulator that asks for them."""

    def __init__(self, scene: Scene, watch: Stopwatch) -> None:
        self._scene, self._watch = scene, watch

    def grey(self, t_s: float) -> NDArray[np.float32]:
        return self._watch.run("render_grey_frames", self._scene.grey, t_s)


def measure(source: ScenesSource, task: SourceTask) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Each pair of a task, as `source.pairs` builds it, with counts of its events; core-seconds."""
    watch = Stopwatch()
    drive, first = task.spec["drive"], task.spec["first"]
    scene = watch.run("bake_textures", source.scene, drive)
    timed = TimedScene(scene, watch)
    rows = []
    for window in range(first, first + task.num_pairs):
        start_us = window * source.step_us
        middle_s = (start_us + source.duration_us // 2) * 1e-6
        events = watch.run("simulate", source.events, timed, drive, window)
        event_HWC = watch.run("draw_events", event_image, events)
        target_HWC = watch.run("render_target", scene.rgb, middle_s)
        event, target = (watch.run("resize", resized, image_HWC, PIXELS) for image_HWC in (event_HWC, target_HWC))
        rows.append(
            {
                "sequence": task.spec["sequence"],
                "t_start_us": start_us,
                "place": scene.world.place,
                "daytime": scene.world.daytime,
                "standing": scene.speed(middle_s) < 0.1,
                "events": len(events),
                "active": float((event_HWC != 255).any(2).mean()),
                "positive": float(events.p.mean()) if len(events) else float("nan"),
                "event": event.ravel(),
                "target": target.ravel(),
            }
        )
    watch.spent["simulate"] -= watch.spent["render_grey_frames"]
    return rows, watch.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pairs", type=int, default=1020)
    parser.add_argument("--num-sequences", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    source = ScenesSource(args.num_pairs, args.num_sequences, args.seed)
    rows: list[dict[str, Any]] = []
    spent: Counter[str] = Counter()
    began = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        for some, seconds in pool.map(partial(measure, source), source.tasks()):
            rows += some
            spent += seconds
            print(f"\r{len(rows)}/{args.num_pairs} pairs", end="", flush=True)
    result = {
        "provenance": provenance(),
        "source": {"name": source.name, **source.describe()},
        "pairs": len(rows),
        **statistics(rows),
        "core_seconds_per_pair": {stage: round(total / len(rows), 4) for stage, total in spent.most_common()},
        "core_seconds_per_pair_total": round(spent.total() / len(rows), 4),
        "wall_seconds_two_processes": round(time.perf_counter() - began, 1),
    }
    result["checks"] = {
        name: {"value": result[name], "wanted": wanted, "holds": wanted[0] <= result[name] <= wanted[1]}
        for name, wanted in WANTED.items()
    }
    args.result.parent.mkdir(exist_ok=True)
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    print()
    for name, check in result["checks"].items():
        print(
            f"{name:26} {check['value']:12,.3f}   wanted {check['wanted']}   {'ok' if check['holds'] else 'MISSED'}"
        )
    print(f"{result['core_seconds_per_pair_total']} core-seconds a pair: {result['core_seconds_per_pair']}")


def statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the statistics of the pairs for the result."""
    target_ND = np.stack([row["target"] for row in rows])
    event_ND = np.stack([row["event"] for row in rows])
    cos_N = cosines(event_ND, target_ND)
    index = PairIndex(
        sample_id=np.array([f"{row['sequence']}-{row['t_start_us']}" for row in rows]),
        sequence=np.array([row["sequence"] for row in rows]),
        t_start_us=np.array([row["t_start_us"] for row in rows]),
        t_end_us=np.array([row["t_start_us"] + 1_000_000 for row in rows]),
        duration=np.full(len(rows), "1s"),
        file=np.zeros(len(rows), np.int64),
        row=np.arange(len(rows)),
    )
    accepts = [mean_target_accepts(index, target_ND, seed) for seed in (42, *range(19))]
    column = {name: np.array([row[name] for row in rows]) for name in rows[0] if name not in ("event", "target")}
    return {
        "sequences": len(np.unique(index.sequence)),
        "cos_sim_mean": round(float(cos_N.mean()), 4),
        "cos_sim_std": round(float(cos_N.std()), 4),
        "mean_target_accept_rate": round(accepts[0], 4),
        "mean_target_accept_rate_other_splits": sorted(round(rate, 3) for rate in accepts[1:]),
        "events_median": int(np.median(column["events"])),
        "events_p5_p25_p50_p75_p95": np.percentile(column["events"], [5, 25, 50, 75, 95]).astype(int).tolist(),
        "windows_without_events": int((column["events"] == 0).sum()),
        "active_share_median": round(float(np.median(column["active"])), 4),
        "active_share_p5_p95": np.percentile(column["active"], [5, 95]).round(4).tolist(),
        "positive_share_mean": round(float(np.nanmean(column["positive"])), 4),
        "standing_share": round(float(column["standing"].mean()), 4),
        "by_daytime": grouped(column["daytime"], column, cos_N),
        "by_place": grouped(column["place"], column, cos_N),
    }


def grouped(labels: NDArray[Any], column: dict[str, NDArray[Any]], cos_N: NDArray[Any]) -> dict[str, Any]:
    return {
        str(label): {
            "pairs": int((labels == label).sum()),
            "cos_sim_mean": round(float(cos_N[labels == label].mean()), 4),
            "events_median": int(np.median(column["events"][labels == label])),
            "active_share_median": round(float(np.median(column["active"][labels == label])), 4),
        }
        for label in np.unique(labels)
    }


def mean_target_accepts(index: PairIndex, target_ND: NDArray[np.uint8], seed: int) -> float:
    """Share of test targets whose cosine with the mean training target is above theta."""
    split = split_pairs(index, SplitConfig(seed=seed))
    mean_D = np.zeros(target_ND.shape[1])
    for i in split.train:
        mean_D += target_ND[i]
    return float(
        (cosines(np.broadcast_to(mean_D, (len(split.test), len(mean_D))), target_ND[split.test]) > THETA).mean()
    )


def cosines(a_ND: NDArray[Any], b_ND: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each row, in float64."""
    pairs = ((a.astype(np.float64), b.astype(np.float64)) for a, b in zip(a_ND, b_ND, strict=True))
    return np.array([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs])


if __name__ == "__main__":
    require_commit()
    main()
