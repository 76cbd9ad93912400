"""Golden answers: a few inputs, and an adapter's outputs for them when it was saved.

Checksums protect the bytes, golden answers the meaning: other weights, another formula or another config.json give
other answers, which is found before an adapter is promoted or served. The inputs are noise that is stored with them,
so that no generator has to draw the same again.

Shapes: G = golden rows, E = event width, D = target width.
"""

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import meta_adapter
from ray_app.core.adapters.slices import WHOLE, FeatureSlice
from ray_app.store.manifest import FeatureSpec

NUM_ROWS = 2
"""Golden inputs in a checkpoint."""
SEED = 20_259
"""Seed of the noise."""
TOLERANCE = 1e-4
"""Largest error of one number, relative to the root mean square of its row.

Threads, kernels, batch sizes and float64 differ by 5e-6 at full width (150,528 → 512 → 150,528), bfloat16 by
1.5e-2. The largest error rather than the row's norm, since one changed output weight moves one number in
150,528.
"""


def assembled(config: AdapterConfig, tensors: dict[str, Tensor], part: FeatureSlice = WHOLE) -> Adapter:
    """Return an adapter, or one that works on a part of the features, in evaluation mode; without a copy."""
    adapter = meta_adapter(config, part)
    adapter.load_state_dict(tensors, assign=True)
    return adapter.eval()


def golden_answers(adapter: Adapter, event: FeatureSpec) -> dict[str, Tensor]:
    """Return noise over the range of stored event features (G, E), and the adapter's answers (G, D).

    The range is 0 to 255 for uint8, [−1, 1) for floats. The adapter is in evaluation mode and on the CPU.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (NUM_ROWS, adapter.config.event_dim)
    if event.dtype == "uint8":
        event_GE = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        event_GE = (2 * torch.rand(shape, generator=generator) - 1).to(getattr(torch, event.dtype))
    return {"event": event_GE, "aligned": run_golden(adapter, event_GE, event.scale)}


def run_golden(adapter: Adapter, event_GE: Tensor, scale: float) -> Tensor:
    """Return the adapter's outputs for stored inputs, in fp32 also under autocast, without a gradient."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return adapter(event_GE.to(torch.float32) * scale)


def relative_errors(aligned_GD: Tensor, golden_GD: Tensor) -> Tensor:
    """Return each row's largest error relative to the golden row's root mean square, shape (G,), float64.

    NaN if a number is not finite, or if all of a row's golden numbers and of its answers are 0.
    """
    error_G = (aligned_GD.double() - golden_GD.double()).abs().amax(dim=1)
    return error_G / golden_GD.double().square().mean(dim=1).sqrt()
