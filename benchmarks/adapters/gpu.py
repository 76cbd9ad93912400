"""The adapter on a GPU, from uint8 pairs in device memory: throughput in bf16, and the reference's training.

    python -m benchmarks.adapters.gpu [--pairs 5208]

Needs only torch and ray_app/core. Each time comes with its lower bound: the bytes that must move over the copy
bandwidth, the operations over the rate of a large bf16 product, both measured in the same run. Without a GPU
the result says "not run". Writes benchmarks/results/gpu_adapter.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import require_commit, save
from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter, num_parameters
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import decode, make_optimizer, training_step

WIDTH, HIDDEN, BATCH, EPOCHS, SCALE = 150_528, 512, 32, 3, 1 / 255
TRAIN_SHARE = 0.8
FORWARD_BATCH = 2048
ROUNDS = 5


def scores(adapter: Adapter, event_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Cosines of some stored pairs, (B,): bf16 features, float32 sums. The aligned features are not kept."""
    aligned_BD = adapter(event_BD.to(torch.bfloat16) * SCALE)
    target_BD = target_BD.to(torch.bfloat16)
    dot_B = (aligned_BD * target_BD).sum(1, dtype=torch.float32)
    norm_B = aligned_BD.square().sum(1, dtype=torch.float32) * target_BD.square().sum(1, dtype=torch.float32)
    return dot_B * norm_B.rsqrt()


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Median wall time of an action with everything it started on the device, after one round to warm up."""
    found = []
    for _ in range(ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


@torch.no_grad()
def throughput(
    adapter: Adapter, event_ND: Tensor, target_ND: Tensor, batch: int, device: torch.device, *, compiled: bool
) -> float:
    """Pairs a second over all pairs at hand."""
    function = torch.compile(scores, dynamic=False) if compiled else scores
    whole = len(event_ND) // batch * batch

    def pass_over_all() -> None:
        for start in range(0, whole, batch):
            function(adapter, event_ND[start : start + batch], target_ND[start : start + batch])

    return whole / seconds(pass_over_all, device)


def train(event_ND: Tensor, target_ND: Tensor, hidden: int, epochs: int, device: torch.device) -> dict[str, float]:
    """Return the reference's training from device memory: seconds, steps and the last mean cosine."""
    config = AdapterConfig("lightweight", event_ND.shape[1], target_ND.shape[1], hidden)
    objective = AlignmentObjective(build_adapter(config, 0), LossWeights()).to(device).train()
    optimizer = make_optimizer(objective, 1e-3, 0.01)
    order = torch.Generator().manual_seed(0)
    step = 0

    def one(at: Tensor) -> float:
        event, target = decode(event_ND[at], SCALE, device), decode(target_ND[at], SCALE, device)
        noise = BatchNoise(0, step, 0, len(at), len(at))
        return training_step(
            objective, optimizer, event, target, noise, global_pairs=len(at), precision="bf16"
        ).cos_sum

    one(torch.arange(min(BATCH, len(event_ND)), device=device))  # load kernels before the clock starts
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    cosine = 0.0
    for _ in range(epochs):
        for at in torch.randperm(len(event_ND), generator=order).to(device).split(BATCH):
            cosine = one(at) / len(at)
            step += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, "steps": step, "cos_sim_last_batch": cosine}


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a large copy (read plus written), and bf16 operations a second of a large product."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device).random_()
    into = torch.empty_like(source)
    copy_s = seconds(lambda: into.copy_(source), device)
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds(lambda: a @ b, device)
    return {"bytes_per_s": 2 * source.numel() / copy_s, "flop_per_s": 2 * side**3 / product_s}


def floors(parameters: int, train_pairs: int, steps: int, limits: dict[str, float]) -> dict[str, float]:
    """Least seconds: one pair forward, and the whole training."""
    pair_bytes, pair_flop = 2 * WIDTH, 2 * parameters
    # A step reads the weights twice (forward, backward) and writes gradients; AdamW reads four and writes three.
    step_bytes = parameters * 4 * (2 + 1 + 7)
    return {
        "pairs_per_s_by_bytes": limits["bytes_per_s"] / pair_bytes,
        "pairs_per_s_by_operations": limits["flop_per_s"] / pair_flop,
        "training_s_by_bytes": steps * step_bytes / limits["bytes_per_s"],
        "training_s_by_operations": EPOCHS * train_pairs * 3 * pair_flop / limits["flop_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5208)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        save("gpu_adapter", {"status": "not run", "reason": "torch finds no CUDA device on this machine"})
        return
    device = torch.device("cuda")
    limits = ceilings(device)
    generator = torch.Generator(device).manual_seed(0)
    event, target = (
        torch.randint(1, 256, (args.pairs, WIDTH), dtype=torch.uint8, device=device, generator=generator)
        for _ in range(2)
    )
    adapter = build_adapter(AdapterConfig("lightweight", WIDTH, WIDTH, HIDDEN), 0).to(device, torch.bfloat16).eval()
    parameters = num_parameters(adapter)
    torch.cuda.reset_peak_memory_stats()
    speeds = {
        name: throughput(adapter, event, target, FORWARD_BATCH, device, compiled=compiled)
        for name, compiled in (("eager", False), ("compiled", True))
    }
    forward_peak = torch.cuda.max_memory_allocated()
    del adapter
    torch.cuda.reset_peak_memory_stats()
    count = int(TRAIN_SHARE * args.pairs)
    training = train(event[:count], target[:count], HIDDEN, EPOCHS, device)
    save(
        "gpu_adapter",
        {
            "status": "run",
            "gpu": torch.cuda.get_device_name(),
            "pairs": args.pairs,
            "data": "random uint8",
            "ceilings_measured": limits,
            "pairs_per_s": speeds,
            "forward_peak_gib": forward_peak / 2**30,
            "training": training,
            "training_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "floors": floors(parameters, count, int(training["steps"]), limits),
            "targets": {"pairs_per_s_on_h200": 1_000_000, "training_s": 3.0, "reference_pairs_per_s": 48_249},
        },
    )


if __name__ == "__main__":
    require_commit()
    main()
