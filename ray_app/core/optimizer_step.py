"""One optimizer step, the same for one worker and for many.

Shapes: B = pairs of this worker, G = pairs of the global batch, D = feature width.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.errors import TrainingError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over this worker's pairs, to be added over workers; the gradient's norm is global already."""

    pairs: int
    """B."""
    loss_sum: float
    """Sum of the pairs' losses."""
    cos_sum: float
    """Sum of the pairs' cosines, dropout on."""
    grad_norm: float
    """Norm of the global gradient before it is clipped."""


def decode(stored: Tensor, scale: float, device: torch.device) -> Tensor:
    """Decode stored features to float32 on `device`; the stored type is copied, a quarter of the bytes."""
    wide = stored.to(device, non_blocking=True).to(torch.float32)
    return wide.mul(scale) if wide is stored else wide.mul_(scale)


def make_optimizer(objective: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW (arXiv 1711.05101), fused: one pass over weights, gradients and both moments."""
    # One group, since a solved adapter has nothing to train: torch takes an empty group, but no empty list.
    return AdamW([{"params": list(objective.parameters())}], lr=learning_rate, weight_decay=weight_decay, fused=True)


class CosineByEpoch:
    """Half a cosine from the learning rate to zero over the epochs; the same in every step of an epoch."""

    def __init__(self, optimizer: AdamW, learning_rate: float, num_epochs: int) -> None:
        self.optimizer, self.learning_rate, self.num_epochs = optimizer, learning_rate, num_epochs
        self.last_epoch = 0

    def step(self, _: float) -> None:
        """End an epoch; its loss has no influence."""
        self.last_epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 + math.cos(math.pi * self.last_epoch / self.num_epochs)) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the epochs of a state."""
        self.last_epoch = state["last_epoch"]


def training_step(
    objective: nn.Module,
    optimizer: AdamW,
    event_BE: Tensor,
    target_BD: Tensor,
    noise: BatchNoise | None,
    *,
    global_pairs: int,
    world_size: int = 1,
    grad_clip: float = 1.0,
    precision: Precision = "fp32",
    where: str = "",
) -> StepResult:
    """Forward, backward, clip, step. `objective` is an `AlignmentObjective`, wrapped by DDP or not.

    Each worker's loss is its sum times world_size / G, so that DDP's mean over workers is the mean over
    the global batch, whatever the division; a worker may hold no pair of a last batch.

    TrainingError, before any weight has changed and on every worker alike, if the gradient is not finite:
    its norm is taken after the all-reduce. `where` names the step in that message.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(event_BE.device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = objective(event_BE, target_BD, noise)
    loss = losses["loss"].sum() * (world_size / global_pairs)
    if loss.requires_grad:  # not so where an adapter is solved and nothing is trained
        loss.backward()
    inner: Any = objective.module if isinstance(objective, DistributedDataParallel) else objective
    norm = inner.gradient_norm()
    nn.utils.clip_grads_with_norm_(objective.parameters(), grad_clip, norm)
    grad_norm = float(norm)
    if not torch.isfinite(torch.tensor(grad_norm)):
        raise TrainingError(
            f"The gradient is not finite ({grad_norm}){f' at {where}' if where else ''}; the weights are as "
            "they were before this step. Try a smaller --learning-rate or --precision fp32, or look for pairs "
            "without content with `ray-app inspect`."
        )
    optimizer.step()
    return StepResult(len(event_BE), float(losses["loss"].detach().sum()), float(losses["cos_sim"].sum()), grad_norm)
