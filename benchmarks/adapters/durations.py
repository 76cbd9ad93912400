"""Window length against alignment: the same drives cut at 50 ms to 4 s, as features of MobileNetV2.

    ray-app demo fetch mobilenet_v2
    python -m benchmarks.adapters.durations --folder runs/durations

An event image is the middle fifth of its window, as EventGPT takes it; windows overlap by half. Stores and runs lie
in the folder; what is finished is not repeated. Writes benchmarks/results/durations.json.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.adapters.comparison import measured, spread
from benchmarks.provenance import require_commit, save
from ray_app.cluster.connection import cluster
from ray_app.commands.demo.command import cache_folder
from ray_app.commands.prepare.command import run_prepare
from ray_app.config.prepare import PrepareScenes
from ray_app.store.manifest import MANIFEST

DURATIONS_MS = (50, 100, 250, 500, 1000, 2000, 4000)
NUM_DRIVES, WINDOWS = 60, 4
STRATEGY = "token_bottleneck, features"


def prepared(folder: Path, duration_ms: int) -> Path:
    """Return the store of a window length."""
    store = folder / f"{duration_ms}ms"
    if not (store / MANIFEST).is_file():
        model = cache_folder() / "mobilenet_v2"
        cfg = {
            "out": str(store),
            "num_pairs": NUM_DRIVES * WINDOWS,
            "num_sequences": NUM_DRIVES,
            "duration": f"{duration_ms}ms",
            "event_span": f"{duration_ms // 5}ms",
            "event_encoder": model,
            "target_encoder": model,
            "pool": ("3x3",),
        }
        run_prepare(PrepareScenes.model_validate(cfg))
    return store


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds."""
    return {
        "pairs": runs[0]["split"],
        "baselines": runs[0]["baselines"],
        "cos_sim_mean": spread([run["cos_sim_mean"] for run in runs]),
        "centred_cos_sim": spread([run["centred_cos_sim"] for run in runs]),
        "R@1_over_chance": spread([run["retrieval"]["R@1"] / run["retrieval"]["chance_R@1"] for run in runs]),
        "accept": {theta: spread([run["accept"][theta] for run in runs]) for theta in runs[0]["accept"]},
        "lift": {theta: spread([run["lift"][theta] for run in runs]) for theta in runs[0]["lift"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for stores and runs")
    parser.add_argument("--durations-ms", type=int, nargs="+", default=DURATIONS_MS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {folder / f"{ms}ms-{seed}.json": (ms, seed) for ms in args.durations_ms for seed in args.seeds}
    with nullcontext() if all(path.is_file() for path in wanted) else cluster(None):
        for path, (ms, seed) in wanted.items():
            if not path.is_file():
                store, runs = prepared(folder, ms), folder / f"{ms}ms-runs"
                runs.mkdir(exist_ok=True)
                path.write_text(json.dumps(measured(store, runs, STRATEGY, seed, use_gpu=False)))
    found = {
        str(ms): [json.loads((folder / f"{ms}ms-{seed}.json").read_text()) for seed in args.seeds]
        for ms in args.durations_ms
    }
    save("durations", {"strategy": STRATEGY, "durations": {ms: summary(runs) for ms, runs in found.items()}})


if __name__ == "__main__":
    require_commit()
    main()
