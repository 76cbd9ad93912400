"""The model of one replica in float32 and in bfloat16: time of a forward pass, memory, and how far answers differ.

    python -m benchmarks.serve.precision --folder /tmp/precision

An untrained `lightweight` adapter of the reference's width, loaded as a replica loads it (`load_served`), in one
process for each precision. They compute in turn, a few passes each, on the same random pixels; the other one waits.
Memory is what is resident before and after loading, and the most so far. HTTP is left out: it is the same for both.
Writes benchmarks/results/serve_precision.json.
"""

import argparse
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import require_commit, save
from benchmarks.serve.process import checkpoint_of
from serve.model.loaded_model import LIMITS, load_served
from serve.model.model_source import model_source

PRECISIONS = ("fp32", "bf16")
BATCHES = (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder; 1 GB, removed at the end")
    parser.add_argument("--width", type=int, default=150_528)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--passes", type=int, default=5, help="of each batch in a round")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    checkpoint = checkpoint_of(args.folder / "checkpoint", args.width, args.hidden)
    replicas = {precision: Replica(checkpoint, precision, args.threads) for precision in PRECISIONS}
    seconds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in PRECISIONS}
    for _ in range(args.rounds):
        for batch in BATCHES:
            for name, replica in replicas.items():
                seconds[name][batch] += replica.ask(batch, args.passes)
    answers = {name: replica.ask(max(BATCHES), 0) for name, replica in replicas.items()}
    memory = {name: replica.ask(0, 0) for name, replica in replicas.items()}
    for each in replicas.values():
        each.ours.close()
        each.process.join()
    shutil.rmtree(args.folder)
    pairs = {
        str(batch): [a / b for a, b in zip(seconds["fp32"][batch], seconds["bf16"][batch], strict=True)]
        for batch in BATCHES
    }
    save(
        "serve_precision",
        {
            "settings": vars(args) | {"folder": str(args.folder)},
            "precisions": {
                name: {
                    "p50_ms": {str(b): round(1e3 * statistics.median(seconds[name][b]), 2) for b in BATCHES},
                    "p95_ms": {str(b): round(1e3 * float(np.quantile(seconds[name][b], 0.95)), 2) for b in BATCHES},
                    **memory[name],
                }
                for name in PRECISIONS
            },
            "times_fp32": {batch: round(statistics.median(ratios), 2) for batch, ratios in pairs.items()},
            **differences(*(torch.from_numpy(answers[name]) for name in PRECISIONS)),
        },
    )


def differences(exact_BD: torch.Tensor, narrow_BD: torch.Tensor) -> dict[str, float]:
    """Compare answers: least cosine of a row, and the largest error of a number in units of its row's RMS."""
    error_B = (narrow_BD - exact_BD).abs().amax(dim=1) / exact_BD.square().mean(dim=1).sqrt()
    return {
        "least_cosine": float(torch.cosine_similarity(exact_BD.double(), narrow_BD.double()).min()),
        "largest_relative_error": float(error_B.max()),
        "limit_of_golden_answers": LIMITS["bf16"],
    }


class Replica:
    """A process with the model in one precision; it computes when it is asked."""

    def __init__(self, checkpoint: Path, precision: str, threads: int) -> None:
        self.ours, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(
            target=replica, args=(theirs, checkpoint, precision, threads), daemon=True
        )
        self.process.start()
        self.ours.recv()

    def ask(self, batch: int, passes: int) -> Any:
        """Seconds of so many passes; the answers for 0 passes, the memory for 0 pairs."""
        self.ours.send((batch, passes))
        return self.ours.recv()


def replica(theirs: Connection, checkpoint: Path, precision: str, threads: int) -> None:
    """Load the model and answer until the pipe is closed."""
    torch.set_num_threads(threads)
    before = memory_mib("VmRSS")
    began = time.perf_counter()
    identity = model_source(str(checkpoint), None).current()
    model = load_served(checkpoint, identity, precision, use_gpu=False, max_batch=max(BATCHES))
    loading = {
        "load_s": round(time.perf_counter() - began, 1),
        "mib_before": before,
        "mib_loaded": memory_mib("VmRSS"),
        "mib_most": memory_mib("VmHWM"),
        "weights_mib": round(sum(weight_bytes(module) for module in model.adapter.modules()) / 2**20),
    }
    pixels_BE = torch.rand(max(BATCHES), model.config.event_dim, generator=torch.Generator().manual_seed(0))
    theirs.send("ready")
    with torch.inference_mode():
        for batch, passes in asked(theirs):
            if not batch:
                theirs.send(loading | {"mib_after_passes": memory_mib("VmRSS")})
            elif not passes:
                theirs.send(model.forward(pixels_BE[:batch]).numpy())
            else:
                seconds = []
                for _ in range(passes):
                    start = time.perf_counter()
                    model.forward(pixels_BE[:batch])
                    seconds.append(time.perf_counter() - start)
                theirs.send(seconds)


def asked(theirs: Connection) -> Iterator[tuple[int, int]]:
    """Yield what is asked until the other end is closed."""
    with suppress(EOFError):
        while True:
            yield theirs.recv()


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of the tensors that a module has itself, packed ones included."""
    own = {id(value): value for value in vars(module).values() if isinstance(value, torch.Tensor)}
    own |= {id(value): value for value in module.parameters(recurse=False)}
    return sum(value.nbytes for value in own.values())


def memory_mib(field: str) -> int:
    """One line of this process's /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1024


if __name__ == "__main__":
    require_commit()
    main()
