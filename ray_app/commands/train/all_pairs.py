"""Rows of all workers, with gradients: what the contrastive loss compares a worker's pairs with.

Shapes: B = rows of this worker (may be 0), G = rows of all workers, D = width of a row.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_pairs(group: dist.ProcessGroup | None, own_BD: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all workers of a group by rank, (G, D), and the place of this worker's first one."""
    rank = dist.get_rank(group)
    sizes_W = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=own_BD.device)
    sizes_W[rank] = len(own_BD)
    dist.all_reduce(sizes_W, group=group)
    sizes = sizes_W.tolist()
    first = sum(sizes[:rank])
    return _GatheredRows.apply(own_BD, first, sum(sizes), group), first


class _GatheredRows(torch.autograd.Function):
    """A sum of rows with zeros around them: workers may hold different numbers, which `all_gather` does not take."""

    @staticmethod
    def forward(ctx: Any, own_BD: Tensor, first: int, total: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.own = group, slice(first, first + len(own_BD))
        all_GD = own_BD.new_zeros(total, own_BD.shape[1])
        all_GD[ctx.own] = own_BD
        dist.all_reduce(all_GD, group=group)
        return all_GD

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None, None, None]:
        """Add what the losses of all workers have to say about this worker's rows."""
        grad_GD = grad_GD.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_GD, group=ctx.group)
        return grad_GD[ctx.own], None, None, None
