"""Statistics of the training part for an adapter's first step: means, principal subspaces, a ridge solution.

Every pass over the data adds sums over pairs: any division into batches gives the same result, up to rounding.
Subspaces come from a randomized SVD (Halko, Martinsson, Tropp, arXiv 0909.4061): a random basis, power iterations
with a QR after each, and the eigenvectors in that basis.

Names of the statistics: `target_mean` (D,), `event_mean` (E,), and for subspaces `target_basis` (D, R),
`target_scale` (R,), `event_basis` (E, R), `event_scale` (R,). Bases are orthonormal, scales are standard deviations
along them.

Shapes: B = pairs of a batch, N = training pairs, E, D = widths, W = either of them, R = rank, K = R + spare,
T = positions of a sequence.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ray_app.core.adapters.base import InitRequirement, InitStats
from ray_app.core.adapters.sequences import mask_of
from ray_app.errors import ConfigError

OVERSAMPLING = 16
"""Directions searched beyond the rank, and dropped: they make the last ones exact."""
POWER_ITERATIONS = 2
"""Number of passes that sharpen the subspace."""
MIN_VARIANCE_SHARE = 1e-5
"""A direction whose spread is below this share of the first one's does not vary."""
SIDES = ("event", "target")

Sums = Mapping[str, Tensor]
Part = Callable[[Tensor, Tensor], Sums]
"""Sums over one batch of features: event (B, E) and target (B, D), float32."""
Passes = Callable[[Part], Sums]
"""Passes once over the training part and adds the sums of a `Part` over the batches."""


def compute_stats(
    passes: Passes, needs: InitRequirement, rank: int, pairs: int, seed: int, token_width: int | None = None
) -> InitStats:
    """Compute means, and subspaces if they are needed. `token_width`: features are sequences of such tokens.

    ConfigError: rank above the number of pairs, a side that is constant or varies in fewer directions than the
    rank, a mean target of zeros.
    """
    if needs == "subspaces":
        check_rank(rank, pairs)
    sums = passes(ColumnSums(token_width))
    stats = {f"{side}_mean": mean_of(sums[side], sums[f"{side}_count"]) for side in SIDES}
    if not stats["target_mean"].any():
        raise ConfigError(
            "the mean training target is zero everywhere: there is nothing to start from, and its cosine has no "
            "meaning; look at the pairs with `ray-app inspect`"
        )
    if needs != "subspaces":
        return stats
    generator = torch.Generator().manual_seed(seed)
    basis = {}
    for side in SIDES:
        width = len(stats[f"{side}_mean"])
        columns = min(rank + OVERSAMPLING, width, pairs - 1)
        basis[side] = orthonormal(torch.randn(width, columns, generator=generator))
    for _ in range(POWER_ITERATIONS):
        sums = passes(PowerSums(stats, basis))
        basis = {side: orthonormal(sums[side]) for side in SIDES}
    sums = passes(GramSums(stats, basis))
    for side in SIDES:
        stats[f"{side}_basis"], stats[f"{side}_scale"] = leading(basis[side], sums[side], rank, pairs, side)
    return stats


def check_rank(rank: int, pairs: int) -> None:
    """Raise ConfigError if so many pairs cannot span a subspace of this rank."""
    if rank >= pairs:
        raise ConfigError(
            f"--rank ({rank}) is not below the number of training pairs ({pairs}), which span {pairs - 1} directions "
            f"about their mean; try --rank {max(1, (pairs - 1) // 2)}"
        )


class ColumnSums:
    """Sums of both sides, float64, and counts: of pairs (1,), or of the sequences that reach each position (T,)."""

    def __init__(self, token_width: int | None) -> None:
        self.token_width = token_width

    def __call__(self, event_BE: Tensor, target_BD: Tensor) -> Sums:
        sums = {}
        for side, x_BW in (("event", event_BE), ("target", target_BD)):
            present = mask_of(x_BW, self.token_width) if self.token_width else torch.ones(len(x_BW), 1)
            sums[side] = x_BW.sum(dim=0, dtype=torch.float64)
            sums[f"{side}_count"] = present.sum(dim=0, dtype=torch.float64)
        return sums


def mean_of(sum_W: Tensor, count_T: Tensor) -> Tensor:
    """Divide sums by counts, (W,); zero where the count is."""
    return (sum_W.view(len(count_T), -1) / count_T.clamp(min=1.0)[:, None]).float().flatten()


class PowerSums:
    """Sums of Xᵀ X · basis of each side, means taken off, (W, K)."""

    def __init__(self, stats: InitStats, basis: Mapping[str, Tensor]) -> None:
        self.stats, self.basis = dict(stats), dict(basis)

    def __call__(self, event_BE: Tensor, target_BD: Tensor) -> Sums:
        sums = {}
        for side, x_BW in (("event", event_BE), ("target", target_BD)):
            mean_W = self.stats[f"{side}_mean"]
            coordinates_BK = coordinates(x_BW, mean_W, self.basis[side])
            sums[side] = x_BW.T @ coordinates_BK - torch.outer(mean_W, coordinates_BK.sum(dim=0))
        return sums


class GramSums:
    """Sums of (X · basis)ᵀ (X · basis) of each side, means taken off, (K, K), float64."""

    def __init__(self, stats: InitStats, basis: Mapping[str, Tensor]) -> None:
        self.stats, self.basis = dict(stats), dict(basis)

    def __call__(self, event_BE: Tensor, target_BD: Tensor) -> Sums:
        sums = {}
        for side, x_BW in (("event", event_BE), ("target", target_BD)):
            coordinates_BK = coordinates(x_BW, self.stats[f"{side}_mean"], self.basis[side]).double()
            sums[side] = coordinates_BK.T @ coordinates_BK
        return sums


def coordinates(x_BW: Tensor, mean_W: Tensor, basis_WK: Tensor) -> Tensor:
    """Coordinates of features about their mean in a basis, (B, K)."""
    return x_BW @ basis_WK - mean_W @ basis_WK


def orthonormal(columns_WK: Tensor) -> Tensor:
    """Orthonormalise columns, in float64: a power iteration spreads their lengths widely."""
    return torch.linalg.qr(columns_WK.double())[0].float()


def leading(basis_WK: Tensor, gram_KK: Tensor, rank: int, pairs: int, side: str) -> tuple[Tensor, Tensor]:
    """Return the principal directions (W, R), the largest component of each positive, and their deviations (R,).

    ConfigError: fewer than R directions vary.
    """
    squares_K, vectors_KK = torch.linalg.eigh(gram_KK)
    scale_R = (squares_K.flip(0)[:rank].clamp(min=0.0) / pairs).sqrt().float()
    varying = int((scale_R > MIN_VARIANCE_SHARE * scale_R[0]).sum()) if scale_R[0] > 0 else 0
    if varying < rank:
        remedy = f"try --rank {varying}" if varying else "there is nothing to learn from them"
        raise ConfigError(
            f"the {side} features of the training part vary in {varying} directions only, fewer than --rank "
            f"({rank}): the rest of them is constant; {remedy}"
        )
    basis_WR = (basis_WK.double() @ vectors_KK.flip(1)[:, :rank]).float()
    largest_R = basis_WR.abs().argmax(dim=0)
    return basis_WR * basis_WR[largest_R, torch.arange(rank)].sign(), scale_R


GRID = tuple(10.0**exponent for exponent in range(-4, 4))
"""Regularisation that `ridge` chooses from, relative to the mean eigenvalue of its kernel."""


def solve_ridge(
    stats: InitStats,
    event: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    units: tuple[float, float],
    grid: Sequence[float] = GRID,
) -> tuple[InitStats, dict[float, float]]:
    """Solve `Ridge` with the λ of the grid whose mean cosine on validation is best; return also the cosine of each.

    `event` and `target`: features of the training and the validation part, as stored; `units`: their scales.
    ConfigError: constant event features.
    """
    (train_x, val_x), (train_y, val_y) = (
        tuple(part.float() * unit - stats[f"{side}_mean"] for part in parts)
        for side, parts, unit in zip(SIDES, (event, target), units, strict=True)
    )
    kernel_NN = (train_x @ train_x.T).double()
    size = float(kernel_NN.diagonal().mean())
    if size == 0.0:
        raise ConfigError(
            "the event features of the training part are all the same: there is nothing to learn from them"
        )
    across_VN = (val_x @ train_x.T).double()
    mean_D = stats["target_mean"]
    # a = mean + w Y, w = across · inverse: its products follow from these.
    target_NN, target_NV = (train_y @ train_y.T).double(), (train_y @ val_y.T).double()
    on_mean_N, on_mean_V = (train_y @ mean_D).double(), (val_y @ mean_D).double()
    mean_sq = float(mean_D.double().square().sum())
    norm_V = (val_y + mean_D).double().norm(dim=1)
    eigen_N, vectors_NN = torch.linalg.eigh(kernel_NN)
    cosines, inverses = {}, {}
    for relative in grid:
        inverse_NN = (vectors_NN / (eigen_N.clamp(min=0.0) + relative * size)) @ vectors_NN.T
        w_VN = across_VN @ inverse_NN
        dot_V = mean_sq + on_mean_V + w_VN @ on_mean_N + (w_VN * target_NV.T).sum(dim=1)
        square_V = mean_sq + 2.0 * w_VN @ on_mean_N + (w_VN @ target_NN * w_VN).sum(dim=1)
        cosines[relative] = float((dot_V / (square_V.sqrt() * norm_V)).mean())
        inverses[relative] = inverse_NN
    best = max(cosines, key=lambda relative: cosines[relative])
    solved = {
        "inverse": inverses[best].float(),
        "event_pairs": event[0],
        "target_pairs": target[0],
        "event_unit": torch.tensor([units[0]]),
        "target_unit": torch.tensor([units[1]]),
    }
    return {**stats, **solved}, cosines
