"""Latency of one pair, as `compare` and sweeps report it: one protocol, so that the numbers can be compared."""

import time

import numpy as np
import torch

from ray_app.core.adapters.base import Adapter

WARM_UP = 2
"""Forward passes before timing starts."""
TIMED_CALLS = 20
"""Timed forward passes, of which the median is the latency."""


def latency_ms(adapter: Adapter) -> float:
    """Median milliseconds of one forward pass of one pair, on one core or the GPU. Sets evaluation mode."""
    device = next(iter(adapter.eval().state_dict().values())).device
    event_1E = torch.full((1, adapter.config.event_dim), 0.5, device=device)
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(WARM_UP + TIMED_CALLS):
                started = time.perf_counter()
                adapter(event_1E)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 1e3 * float(np.median(seconds[WARM_UP:]))
