"""Training of a drafter, or of the image tokens that it is shown, by a target's own answers.

An `EarlyExitLayers` learns with the target's own image tokens. An `EventTokens` learns through such a drafter that is
frozen, so that it makes what gets tokens accepted; its losses on the image tokens themselves need no drafter.

Shapes: B = pairs, E = width of an event feature, T = width of a row, X = numbers of all image tokens.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.adapters.sequences import sequence_cosine, sequence_mse
from ray_app.core.draft_losses import GAMMA, DraftWeights, Positions, draft_loss
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.speculative.teacher_forced import num_passes
from ray_app.errors import ConfigError
from ray_app.language_models.draft_rows import DraftLayout, DraftRows, unpack
from ray_app.language_models.exit_network import ExitNetwork
from ray_app.store.checkpoint import load_checkpoint


class DraftObjective(AlignmentObjective):
    """Losses of a drafter's distributions, and of the image tokens that it is shown.

    `cos_sim` is the mean cosine of the shown and the target's image tokens. In evaluation mode the answers' `tokens`
    and target `passes` are there too, both (B,).
    """

    def __init__(
        self,
        adapter: Adapter,
        weights: LossWeights,
        draft_weights: DraftWeights,
        layout: DraftLayout,
        network: ExitNetwork,
        device: torch.device,
    ) -> None:
        super().__init__(adapter, weights)
        self.draft_weights, self.layout = draft_weights, layout
        self.network = network
        self._place_V = layout.places().to(device)
        self.to(device)

    def losses(self, aligned_BD: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """Return the losses of image tokens (B, X) and rows (B, T)."""
        rows = unpack(self.layout, target_BD)
        shown_BX = rows.image_BX if isinstance(self.adapter, EarlyExitLayers) else aligned_BD
        cos_B = sequence_cosine(shown_BX, rows.image_BX, self.layout.width)
        mse_B = sequence_mse(shown_BX, rows.image_BX, self.layout.width)
        loss_B = self.weights.mse * mse_B + self.weights.cosine * (1.0 - cos_B)
        found = {"mse": mse_B.detach(), "cos_sim": cos_B.detach()}
        if len(rows.ids_BL) and (self.draft_weights.needs_drafter or not self.training):
            positions = self.positions(shown_BX, rows)
            loss_B = loss_B + draft_loss(positions, self.draft_weights)
            if not self.training:
                tokens_B, passes_B = counts(positions)
                found |= {"tokens": tokens_B, "passes": passes_B}
        elif isinstance(self.adapter, EarlyExitLayers):
            loss_B = loss_B + 0.0 * self.adapter.head.sum()  # a worker without pairs has a gradient all the same
        return {"loss": loss_B, **found}

    def positions(self, shown_BX: Tensor, rows: DraftRows) -> Positions:
        """Return what the drafter expects along the answers when it is shown these image tokens; X may be 0."""
        log_q_BLI = self.network.log_probabilities(shown_BX, self.layout.before, self.layout.after, rows.ids_BL)
        return Positions(log_q_BLI, rows.p_BLI, self._place_V[rows.ids_BL], rows.used_BL)


def counts(positions: Positions) -> tuple[Tensor, Tensor]:
    """Return the tokens of each answer and the target passes that it takes, (B,) each."""
    right_BL, used_BL = positions.right_BL.cpu(), positions.used_BL.cpu()
    passes = [num_passes(row[used].tolist(), GAMMA) for row, used in zip(right_BL, used_BL, strict=True)]
    return used_BL.sum(dim=1), torch.tensor(passes)


def draft_objective(cfg: Any, adapter: Adapter, layout: DraftLayout, device: torch.device) -> DraftObjective:
    """Join an adapter with the losses and the drafter of a run, by a `DraftTrainConfig`.

    CheckpointError, ConfigError: the frozen drafter is damaged, or does not fit the rows.
    """
    if isinstance(adapter, EarlyExitLayers):
        network = ExitNetwork(cfg.language_model, adapter, device, frozen=False)
    else:
        network = ExitNetwork(cfg.language_model, frozen_drafter(cfg.drafter, layout), device, frozen=True)
    weights = LossWeights(mse=cfg.mse_weight, cosine=cfg.cosine_weight)
    return DraftObjective(adapter, weights, draft_weights(cfg), layout, network, device)


def draft_weights(cfg: Any) -> DraftWeights:
    """Return the weights of a `DraftTrainConfig`."""
    return DraftWeights(
        kl=cfg.kl_weight,
        reverse_kl=cfg.reverse_kl_weight,
        acceptance=cfg.acceptance_weight,
        lk=cfg.lk_weight,
        accepted_length=cfg.accepted_length_weight,
        cross_entropy=cfg.cross_entropy_weight,
    )


def frozen_drafter(folder: Path, layout: DraftLayout) -> EarlyExitLayers:
    """Return a trained drafter. CheckpointError: it is damaged. ConfigError: it is none, or does not fit the rows."""
    adapter = load_checkpoint(folder).adapter
    if not isinstance(adapter, EarlyExitLayers):
        raise ConfigError(f"{folder} is an adapter '{adapter.config.strategy}', no drafter; name one of early_exit.")
    width = adapter.config.language_model[1]
    if width != layout.width:
        raise ConfigError(f"{folder} reads tokens of width {width}, the store holds some of width {layout.width}.")
    if adapter.config.vocabulary != layout.vocabulary:
        missing = len(set(layout.vocabulary) - set(adapter.config.vocabulary))
        raise ConfigError(
            f"{folder} drafts {len(adapter.config.vocabulary)} tokens, the store's answers have "
            f"{len(layout.vocabulary)}, and {missing} of these it cannot say; train it on this store."
        )
    return adapter
