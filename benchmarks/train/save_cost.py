"""Cost of safe checkpoints: checksums, fsync, golden answers and renames against a bare write of the same bytes.

    python -m benchmarks.train.save_cost --folder /tmp/save-cost

The lightweight adapter at 150,528 and hidden 512 with AdamW's state, saved in turn by `RunDir.save` and by
`safetensors.save_file` alone, in one run. The difference is what safety costs; it is set against the time of the
3-epoch reference job in benchmarks/results/reference_job.json. Writes benchmarks/results/save_cost.json.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.provenance import RESULTS, require_commit, save
from ray_app.commands.train.state import TrainState
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter, num_parameters
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import make_optimizer
from ray_app.runs.run_dir import RunDir, checkpoint_name
from ray_app.store.atomic import verify_folder
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.manifest import PIXELS, Features

WIDTH, HIDDEN, EPOCHS = 150_528, 512, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder; about 8 GB, removed at the end")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    adapter = build_adapter(AdapterConfig("lightweight", WIDTH, WIDTH, HIDDEN), 0)
    objective = AlignmentObjective(adapter, LossWeights())
    optimizer = make_optimizer(objective, 1e-3, 0.01)
    for parameter in objective.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    state = TrainState(objective, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    run, features = RunDir(args.folder / "run"), Features(event=PIXELS, target=PIXELS)
    bare, ours = [], []
    for number in range(1, args.rounds + 1):
        began = time.perf_counter()
        save_file(dict(adapter.state_dict()), args.folder / "weights.safetensors")
        save_file(state.tensors(), args.folder / "state.safetensors")
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        run.save(
            checkpoint_name(number),
            adapter,
            features=features,
            metrics={},
            provenance={},
            tensors=state.tensors(),
            meta=state.meta(),
            best_epoch=number,
        )
        ours.append(time.perf_counter() - began)
    newest = run.checkpoint(checkpoint_name(args.rounds))
    began = time.perf_counter()
    verify_folder(newest)
    verify_s = time.perf_counter() - began
    began = time.perf_counter()
    load_checkpoint(newest)
    load_s = time.perf_counter() - began
    shutil.rmtree(args.folder)
    job = json.loads((RESULTS / "reference_job.json").read_text())["splits"]["sequence"]["train"]["result"]
    extra = [b - a for a, b in zip(bare, ours, strict=True)]
    save(
        "save_cost",
        {
            "parameters": num_parameters(adapter),
            "bytes": 3 * 4 * num_parameters(adapter),
            "bare_write_s": [round(s, 2) for s in bare],
            "safe_save_s": [round(s, 2) for s in ours],
            "extra_s": round(statistics.median(extra), 2),
            "verify_weights_s": round(verify_s, 2),
            "load_verified_s": round(load_s, 2),
            "three_epoch_run_s": job["seconds"],
            "share_of_three_epoch_run": round(EPOCHS * statistics.median(extra) / job["seconds"], 4),
            "wanted": "at most 0.05",
        },
    )


if __name__ == "__main__":
    require_commit()
    main()
