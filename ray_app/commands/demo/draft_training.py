"""Settings of a drafter's training, and what it drafts: the same for `demo draft` and for measurements.

Shapes: N = rows, T = width of a row, X = numbers of a picture's image tokens, A = tokens of an answer, I = ids of the
drafter's head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.commands.demo.answers import HELD_OUT, TRAINING
from ray_app.commands.demo.draft_data import answered_chunks, event_start, head_of, ids_of, write_draft_store
from ray_app.commands.demo.target import demo_encoder
from ray_app.config.train import DraftTrainConfig
from ray_app.core.adapters.drafting import EagleHead, EarlyExitLayers
from ray_app.core.adapters.sequences import sequence_cosine
from ray_app.core.draft_losses import DraftWeights, Positions
from ray_app.core.losses import LossWeights
from ray_app.language_models.draft_objective import DraftObjective, counts
from ray_app.language_models.draft_rows import DraftLayout, DraftRows, unpack
from ray_app.language_models.eagle.network import EagleNetwork, eagle_start, frozen_model
from ray_app.language_models.eagle.objective import EagleObjective
from ray_app.language_models.exit_network import ExitNetwork
from ray_app.language_models.model import LanguageModel
from ray_app.store.checkpoint import save_verifiable, tensor_shapes
from ray_app.store.manifest import MANIFEST

TRAIN, TEST, START = "train", "test", "start"
STATES = "_states"
"""End of the names of the three where rows hold the target's states too."""
EXIT_START, EVENT_START, EAGLE_START = "exit.safetensors", "event.safetensors", "eagle.safetensors"
ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class DraftRecipe:
    """Amounts of a drafter's training."""

    drives: int = 150
    """Drives of the training part that the target answers about."""
    per_drive: int = 4
    """Pictures of each."""
    exit_layers: int = 2
    """Layers of the target that the drafter has."""
    exit_rank: int = 32
    """Rank of its LoRA factors."""
    exit_epochs: int = 8
    """Rounds over all rows."""
    exit_learning_rate: float = 3e-3
    """AdamW learning rate of the drafter."""
    eagle_epochs: int = 3
    """Rounds over all rows."""
    eagle_learning_rate: float = 1e-3
    """AdamW learning rate of a head on the target's states."""
    eagle_batch_size: int = 4
    """Rows of one of its steps: it has more to learn than factors, and needs many."""
    event_rank: int = 64
    """Dimensions of the principal subspaces of event features and image tokens."""
    event_epochs: int = 4
    """Rounds over all rows."""
    event_learning_rate: float = 2e-3
    """AdamW learning rate of the event adapter."""
    batch_size: int = 16
    """Rows of a step."""


def write_draft_stores(
    target: LanguageModel,
    work: Path,
    recipe: DraftRecipe,
    num_test_drives: int,
    seed: int,
    progress: Callable[[str], None],
    *,
    states: bool = False,
) -> None:
    """Answer about both parts, unless that is done, and write their stores and what training starts from.

    In `work`: `answers`, `train`, `test` and, last of all, `start`. `states`: for heads on the target's states, in
    `train_states`, `test_states` and `start_states`.
    """
    end = STATES if states else ""
    if (work / (START + end)).exists():
        return
    encoder = demo_encoder(target.folder / "encoder")
    chunks = {
        name: answered_chunks(
            work / "answers",
            target,
            encoder,
            seed=seed,
            part=part,
            num_drives=drives,
            per_drive=recipe.per_drive,
            progress=progress,
        )
        for name, part, drives in ((TRAIN, TRAINING, recipe.drives), (TEST, HELD_OUT, num_test_drives))
    }
    for name, some in chunks.items():
        if not (work / (name + end) / MANIFEST).is_file():
            write_draft_store(work / (name + end), some, target, ids_of(chunks[TRAIN]), seed, states=states)
    head_ID = head_of(target, ids_of(chunks[TRAIN]))
    if states:
        starts = {EAGLE_START: eagle_start(target.model, head_ID)}
        save_verifiable(work / (START + end), starts, {})
        return
    event_NE, image_NX = (
        torch.cat([getattr(chunk, side) for chunk in chunks[TRAIN]]) for side in ("event_NE", "image_NX")
    )
    starts = {
        EXIT_START: {"head": head_ID},
        EVENT_START: event_start(event_NE, image_NX, min(recipe.event_rank, len(event_NE) - 1)),
    }
    save_verifiable(work / START, starts, {})


def exit_settings(recipe: DraftRecipe, work: Path, **places: Any) -> DraftTrainConfig:
    """Return the settings of a drafter: KL to the target with the target's own picture.

    `places`: `out`, `language_model`, `seed` and other settings of `train`.
    """
    return DraftTrainConfig(
        strategy="early_exit",
        exit_layers=recipe.exit_layers,
        rank=recipe.exit_rank,
        kl_weight=1.0,
        store=str(work / TRAIN),
        projector_start=work / START / EXIT_START,
        **_shared(recipe.exit_epochs, recipe.exit_learning_rate, recipe.batch_size),
        **places,
    )


def eagle_settings(recipe: DraftRecipe, work: Path, **places: Any) -> DraftTrainConfig:
    """Return the settings of a head on the target's states: KL to the target at the first tokens of drafts.

    `places`: `out`, `language_model`, `seed` and other settings of `train`.
    """
    return DraftTrainConfig(
        strategy="eagle_head",
        kl_weight=1.0,
        store=str(work / (TRAIN + STATES)),
        projector_start=work / (START + STATES) / EAGLE_START,
        **_shared(recipe.eagle_epochs, recipe.eagle_learning_rate, recipe.eagle_batch_size),
        **places,
    )


def event_settings(
    recipe: DraftRecipe, work: Path, weights: Mapping[str, float], *, constant: bool = False, **places: Any
) -> DraftTrainConfig:
    """Return the settings of image tokens for a frozen drafter, by the weight of each loss.

    `places`: `out`, `drafter`, `language_model`, `seed` and other settings of `train`.
    """
    start = work / START / EVENT_START
    return DraftTrainConfig(
        strategy="constant_tokens" if constant else "event_tokens",
        exit_layers=recipe.exit_layers,
        rank=tensor_shapes(start)["map.event_basis"][1],
        store=str(work / TRAIN),
        projector_start=start,
        **{f"{name}_weight": weight for name, weight in weights.items()},
        **_shared(recipe.event_epochs, recipe.event_learning_rate, recipe.batch_size),
        **places,
    )


def _shared(num_epochs: int, learning_rate: float, batch_size: int) -> dict[str, Any]:
    return {
        "num_epochs": num_epochs,
        "early_stop_patience": num_epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "schedule": "cosine",
        "test_share": 0.01,
        "val_share": 0.1,
        "cpus_per_worker": 1.0,
        "experiment": "demo",
    }


@dataclass(frozen=True, slots=True)
class Drafted:
    """Outcome of a drafter along some answers."""

    tokens_N: NDArray[np.float64]
    """Tokens of each answer."""
    passes_N: NDArray[np.float64]
    """Target passes that it takes."""
    cos_N: NDArray[np.float64]
    """Mean cosine of the shown and the target's image tokens; 0 where none are shown."""


class FrozenDrafter:
    """A trained drafter that is shown one thing or another."""

    def __init__(self, exit_layers: EarlyExitLayers, language_model: Path, layout: DraftLayout) -> None:
        device = torch.device("cpu")
        network = ExitNetwork(language_model, exit_layers, device, frozen=True)
        self.num_parameters = network.num_parameters
        self._objective = DraftObjective(exit_layers, LossWeights(), DraftWeights(), layout, network, device)
        self._layout = layout

    @torch.no_grad()
    def along(self, rows_NT: Tensor, shown_NX: Tensor | None) -> Drafted:
        """Draft along answers while these image tokens are shown; None: no picture is."""
        parts = []
        for rows, shown_BX, positions in self.positions(rows_NT, shown_NX):
            tokens_B, passes_B = counts(positions)
            cos_B = torch.zeros(len(shown_BX))
            if shown_NX is not None:
                cos_B = sequence_cosine(shown_BX, rows.image_BX, self._layout.width)
            parts.append(torch.stack([tokens_B.double(), passes_B.double(), cos_B.double()]))
        return Drafted(*torch.cat(parts, dim=1).numpy())

    @torch.no_grad()
    def probabilities(self, rows_NT: Tensor, shown_NX: Tensor | None) -> Iterator[NDArray[np.float64]]:
        """Yield the drafter's probabilities of its ids at each token of each answer, (A, I)."""
        for rows, _, positions in self.positions(rows_NT, shown_NX):
            for log_q_LI, used_L in zip(positions.log_q_BLI, rows.used_BL, strict=True):
                yield log_q_LI[used_L].double().exp().numpy()

    @torch.no_grad()
    def positions(self, rows_NT: Tensor, shown_NX: Tensor | None) -> Iterator[tuple[DraftRows, Tensor, Positions]]:
        """Yield some rows at a time, the image tokens shown, and the distributions along the answers."""
        for at in range(0, len(rows_NT), ROWS_AT_ONCE):
            rows = unpack(self._layout, rows_NT[at : at + ROWS_AT_ONCE].float())
            shown_BX = rows.image_BX[:, :0] if shown_NX is None else shown_NX[at : at + ROWS_AT_ONCE]
            yield rows, shown_BX, self._objective.positions(shown_BX, rows)


@torch.no_grad()
def drafted_by_eagle(head: EagleHead, language_model: Path, layout: DraftLayout, rows_NT: Tensor) -> Drafted:
    """Draft along answers from the target's states, which the rows hold; it is shown no image tokens."""
    device = torch.device("cpu")
    network = EagleNetwork(frozen_model(language_model, device), head)
    objective = EagleObjective(head, LossWeights(), DraftWeights(), layout, network, 1, device).eval()
    parts = []
    for rows_BT in rows_NT.split(ROWS_AT_ONCE):
        found = objective.losses(rows_BT[:, :0].float(), rows_BT.float())
        parts.append(torch.stack([found["tokens"].double(), found["passes"].double()]))
    tokens_N, passes_N = torch.cat(parts, dim=1).numpy()
    return Drafted(tokens_N, passes_N, np.zeros(len(rows_NT)))
