"""Which proxy ranks image tokens of events as a drafter does? Many trainings, tokens per target pass, and proxies.

    python -m benchmarks.speculative.event_proxies models/demo --work runs/event_drafter

After `benchmarks.speculative.event_drafter`, whose --work this is. Image tokens are trained for the frozen drafter of
seed 0 with drawn losses, ranks, learning rates and epochs, and measured on the drives that nothing was trained on.
What is trained is kept in --work: a repeated command continues. One thread. Writes
benchmarks/results/event_proxies.json; with --trials other than the default it only prints.

Shapes: N = pictures, X = numbers of a picture's image tokens, T = trials, U = drives, C = columns of sums,
P = proxies, R = resamples.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.provenance import require_commit, save
from benchmarks.speculative.event_drafter import RECIPE, SEED, Part, trained
from ray_app.commands.demo.draft_training import EVENT_START, START, TEST, TRAIN, FrozenDrafter, event_settings
from ray_app.config.train import DraftTrainConfig
from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.adapters.sequences import sequence_cosine
from ray_app.core.bootstrap import RESAMPLES, interval95, resampled_units
from ray_app.core.draft_losses import acceptance_rate, kl
from ray_app.core.metrics import THETA, rate_key
from ray_app.core.speculative.correlation import spearman
from ray_app.language_models.draft_objective import GAMMA
from ray_app.runs.run_dir import RunDir
from ray_app.store.checkpoint import load_checkpoint, read_tensors, save_verifiable, tensor_shapes

TRIALS = 30
LOSSES = DraftTrainConfig.LOSSES
ROUND = len(LOSSES) + 2
"""Trials of a round: each loss alone, then mixtures of two."""
RANKS, LEARNING_RATES, EPOCHS, WEIGHTS = (4, 64), (1e-4, 5e-3), (1, 4), (0.1, 10.0)
"""Ends of what is drawn: log-uniform, but for the epochs; the weight is that of a mixture's second loss."""

ACCEPTED = {f"cosine_accept_rate_{rate_key(theta)}": theta for theta in (THETA, 0.95)}
COLUMNS = ("tokens", "passes", "pictures", *ACCEPTED, "cosine", "centred", "first", "kl", "acceptance")
"""Sums over pictures; `kl` and `acceptance` are summed over the tokens of their answers."""
PROXIES: Mapping[str, tuple[str, str]] = {
    **{name: (name, "pictures") for name in ACCEPTED},
    "cosine": ("cosine", "pictures"),
    "centred_cosine": ("centred", "pictures"),
    "R@1": ("first", "pictures"),
    "kl": ("kl", "tokens"),
    "acceptance": ("acceptance", "tokens"),
}
"""Sum and what it is divided by; `kl` and `acceptance` are of the drafter's distributions, the others of tokens."""
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings of one training."""

    losses: Mapping[str, float]
    """Weight of each loss."""
    rank: int
    """Dimensions of the principal subspaces."""
    learning_rate: float
    """AdamW learning rate."""
    epochs: int
    """Rounds over all rows."""


def drawn_trials(number: int, most_rank: int) -> Iterator[Trial]:
    """Draw trials; fewer are the first of more."""
    rng = np.random.default_rng(SEED)

    def log_uniform(ends: tuple[float, float]) -> float:
        return float(np.exp(rng.uniform(*np.log(ends))))

    for n in range(number):
        losses = {LOSSES[n % ROUND]: 1.0} if n % ROUND < len(LOSSES) else {}
        if not losses:
            one, other = rng.choice(LOSSES, 2, replace=False)
            losses = {str(one): 1.0, str(other): round(log_uniform(WEIGHTS), 2)}
        rank = min(round(log_uniform(RANKS)), most_rank)
        epochs = int(rng.integers(EPOCHS[0], EPOCHS[1] + 1))
        yield Trial(losses, rank, float(f"{log_uniform(LEARNING_RATES):.2g}"), epochs)


def main() -> None:
    """Train, measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=TRIALS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    language_model, work = asked.target.absolute() / "language_model", asked.work.absolute()
    best = RunDir(work / f"seed_{SEED}" / "exit").best()
    if best is None:
        parser.error(f"{work} has no drafter; run benchmarks.speculative.event_drafter with this --work first.")
    drafter = load_checkpoint(best).adapter
    assert isinstance(drafter, EarlyExitLayers)
    train, test = Part.of(work / TRAIN), Part.of(work / TEST)
    frozen, mean_X = FrozenDrafter(drafter, language_model, test.layout), train.image_NX.mean(dim=0)
    most_rank = tensor_shapes(work / START / EVENT_START)["map.event_basis"][1]
    trials = list(drawn_trials(asked.trials, most_rank))
    began, columns = time.monotonic(), []
    for n, trial in enumerate(trials):
        adapter = trained_trial(trial, work / "proxies", f"trial_{n:02d}", language_model, best, train)
        columns.append(columns_of(adapter, frozen, test, mean_X))
        seconds = time.monotonic() - began
        tokens, passes = columns[-1].sum(axis=0)[:2]
        left = seconds / (n + 1) * (len(trials) - n - 1) / 60
        print(f"{n + 1} of {len(trials)}, {tokens / passes:.2f} tokens per target pass, {left:.0f} min left: {trial}")
    result = {"target": train.layout.target, **numbers(trials, np.stack(columns), test.store.index.sequence.tolist())}
    if asked.trials == TRIALS:
        save("event_proxies", result)
    else:
        print(json.dumps(result, indent=1))


def trained_trial(trial: Trial, folder: Path, name: str, language_model: Path, drafter: Path, train: Part) -> Adapter:
    """Train a trial's image tokens, or resume. `folder`: of all trials, in --work."""
    start, work = folder / f"start_rank_{trial.rank}", folder.parent
    if not start.exists():
        tensors = read_tensors(work / START / EVENT_START)
        cut = {key: x if key.endswith("_mean") else x[..., : trial.rank].contiguous() for key, x in tensors.items()}
        save_verifiable(start, {EVENT_START: cut}, {})
    recipe = replace(RECIPE, event_epochs=trial.epochs, event_learning_rate=trial.learning_rate)
    places = {"out": str(folder / name), "drafter": drafter, "language_model": language_model, "seed": SEED}
    cfg = event_settings(recipe, work, trial.losses, **places)
    return trained(cfg.model_copy(update={"rank": trial.rank, "projector_start": start / EVENT_START}), train)


@torch.no_grad()
def columns_of(adapter: Adapter, frozen: FrozenDrafter, test: Part, mean_X: Tensor) -> Numbers:
    """Return `COLUMNS` of each picture, (N, C). `mean_X`: mean image tokens of the training part."""
    shown_NX, own_NX, width = adapter(test.event_NE.float()), test.image_NX, test.layout.width
    drafted = frozen.along(test.rows_NT, shown_NX)
    through = [
        torch.stack([(each(positions) * positions.used_BL).sum(dim=1) for each in (kl, acceptance_rate)], dim=1)
        for _, _, positions in frozen.positions(test.rows_NT, shown_NX)
    ]
    cos_N = sequence_cosine(shown_NX, own_NX, width)
    of_tokens = [
        torch.ones(len(own_NX)),
        *(cos_N > theta for theta in ACCEPTED.values()),
        cos_N,
        sequence_cosine(shown_NX - mean_X, own_NX - mean_X, width),
        own_is_nearest(shown_NX - mean_X, own_NX - mean_X),
    ]
    return np.column_stack([drafted.tokens_N, drafted.passes_N, *of_tokens, torch.cat(through)])


def own_is_nearest(shown_NX: Tensor, own_NX: Tensor) -> Tensor:
    """Mark the rows whose own is the most alike of all, (N,), bool, as `core.metrics.retrieval` counts them."""
    unit = torch.nn.functional.normalize
    similarity_NN = unit(shown_NX, dim=1) @ unit(own_NX, dim=1).T
    return (similarity_NN >= similarity_NN.diagonal()[:, None]).sum(dim=1) == 1


def numbers(trials: Sequence[Trial], columns_TNC: Numbers, sequences: Sequence[str]) -> dict[str, Any]:
    """Return all numbers of the result."""
    unit, unit_N = resampled_units(sequences)
    sums_TUC = np.stack([columns_TNC[:, unit_N == u].sum(axis=1) for u in range(unit_N.max() + 1)], axis=1)
    tokens_T, proxies_TP = values_of(sums_TUC.sum(axis=1))
    return {
        "gamma": GAMMA,
        "pictures": len(sequences),
        "resampled": f"trials and {unit}",
        "resamples": RESAMPLES,
        "seed": SEED,
        "trials": [
            asdict(trial) | {"tokens_per_target_pass": tokens, **dict(zip(PROXIES, proxies, strict=True))}
            for trial, tokens, proxies in zip(trials, tokens_T.tolist(), proxies_TP.tolist(), strict=True)
        ],
        "spearman": {"all": correlations(sums_TUC, half=False), "better half": correlations(sums_TUC, half=True)},
    }


def values_of(sums_TC: Numbers) -> tuple[Numbers, Numbers]:
    """Return tokens per target pass (T,) and proxies (T, P) of sums over pictures."""
    at = dict(zip(COLUMNS, sums_TC.T, strict=True))
    return at["tokens"] / at["passes"], np.stack([at[over] / at[under] for over, under in PROXIES.values()], axis=1)


def correlations(sums_TUC: Numbers, *, half: bool) -> dict[str, dict[str, Any]]:
    """Return Spearman's ρ of every proxy with tokens per target pass, 95 % over trials and drives.

    Both are drawn again, each on its own. `half`: of the trials with more tokens, chosen in every draw. None where a
    proxy is the same for all trials; a draw in which it is shows no order: 0.
    """

    def of(trials_T: NDArray[np.int64], weights_U: NDArray[np.int64]) -> list[float]:
        tokens_T, proxies_TP = values_of(np.einsum("u,tuc->tc", weights_U, sums_TUC[trials_T]))
        if half:
            best = np.argsort(-tokens_T, kind="stable")[: (len(tokens_T) + 1) // 2]
            tokens_T, proxies_TP = tokens_T[best], proxies_TP[best]
        return [spearman(proxy_T, tokens_T) for proxy_T in proxies_TP.T]

    num_trials, num_units, _ = sums_TUC.shape
    rng = np.random.default_rng(SEED)
    drawn = (
        of(rng.integers(num_trials, size=num_trials), rng.multinomial(num_units, np.full(num_units, 1 / num_units)))
        for _ in range(RESAMPLES)
    )
    rho_PR = np.nan_to_num(np.array(list(drawn))).T
    point_P = of(np.arange(num_trials), np.ones(num_units, np.int64))
    return {
        name: {"rho": None, "interval95": None} if np.isnan(rho) else {"rho": rho, "interval95": interval95(rho_R)}
        for name, rho, rho_R in zip(PROXIES, point_P, rho_PR, strict=True)
    }


if __name__ == "__main__":
    require_commit()
    main()
