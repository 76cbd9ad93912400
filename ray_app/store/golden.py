"""Golden answers: a few inputs, and what an adapter made of them when it was saved.

Checksums hold the bytes; this holds the meaning. Other weights, another formula or another config.json answer
otherwise, and that is found before an adapter is promoted or served. The inputs are noise, drawn once and
stored as they are, so that no generator has to draw the same again.

Shapes: G = golden rows, E = event width, D = target width.
"""

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import meta_adapter
from ray_app.store.manifest import FeatureSpec

NUM_ROWS = 2
"""Golden inputs in a checkpoint."""
SEED = 20_259
"""Of the noise; any would do."""
TOLERANCE = 1e-4
"""Largest error of one number, relative to the root mean square of its row.

Threads, kernels, batch sizes and float64 differ by 5e-6 at full width (150,528 → 512 → 150,528), bfloat16 by
1.5e-2. The largest error rather than the row's norm, since one changed output weight moves one number in
150,528.
"""


def assembled(config: AdapterConfig, tensors: dict[str, Tensor]) -> Adapter:
    """An adapter in evaluation mode whose weights are these very tensors: no memory of its own."""
    adapter = meta_adapter(config)
    adapter.load_state_dict(tensors, assign=True)
    return adapter.eval()


def golden_answers(adapter: Adapter, event: FeatureSpec) -> dict[str, Tensor]:
    """Noise over the range of an event feature as a store holds it (G, E), and the adapter's answers (G, D).

    uint8: every value it has; floats: [−1, 1). The adapter is in evaluation mode and on the CPU.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (NUM_ROWS, adapter.config.event_dim)
    if event.dtype == "uint8":
        event_GE = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        event_GE = (2 * torch.rand(shape, generator=generator) - 1).to(getattr(torch, event.dtype))
    return {"event": event_GE, "aligned": run_golden(adapter, event_GE, event.scale)}


def run_golden(adapter: Adapter, event_GE: Tensor, scale: float) -> Tensor:
    """What the adapter makes of stored inputs, in fp32 whatever surrounds the call, without a gradient."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return adapter(event_GE.to(torch.float32) * scale)


def relative_errors(aligned_GD: Tensor, golden_GD: Tensor) -> Tensor:
    """The largest error of each row, relative to the golden row's root mean square, shape (G,), float64.

    NaN where a number is not finite or where all of a row's golden numbers are 0 and the answer is too.
    """
    error_G = (aligned_GD.double() - golden_GD.double()).abs().amax(dim=1)
    return error_G / golden_GD.double().square().mean(dim=1).sqrt()
