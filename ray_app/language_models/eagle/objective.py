"""Training of an `eagle_head` by a target's own answers: each step of a draft from every position, along the answer.

Shapes: B = pairs, L = positions of an answer, D = width, I = ids of the head, T = width of a row, S = steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.draft_losses import GAMMA, DraftWeights, Positions, draft_loss
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.speculative.teacher_forced import num_passes_by_runs
from ray_app.language_models.draft_objective import draft_weights
from ray_app.language_models.draft_rows import DraftLayout, DraftRows, unpack
from ray_app.language_models.eagle.network import EagleNetwork, frozen_model


class EagleObjective(AlignmentObjective):
    """Losses of a head's distributions in the first `num_steps` of drafts, and of the states that it predicts.

    `cos_sim` and `mse` compare the states of the first step with the target's. In evaluation mode the answers'
    `tokens` and target `passes` are there too, both (B,), with drafts of `GAMMA` tokens.
    """

    def __init__(
        self,
        adapter: EagleHead,
        weights: LossWeights,
        draft_weights: DraftWeights,
        layout: DraftLayout,
        network: EagleNetwork,
        num_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(adapter, weights)
        self.draft_weights, self.layout, self.network, self.num_steps = draft_weights, layout, network, num_steps
        self._place_V = layout.places().to(device)
        self.to(device)

    def losses(self, aligned_BD: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """Return the losses of rows (B, T); what the adapter made of events is not used."""
        rows = unpack(self.layout, target_BD)
        if not len(rows.ids_BL):  # a worker without pairs has a gradient all the same
            zero_B = aligned_BD.sum(dim=1) + 0.0 * sum(each.sum() for each in self.adapter.parameters())
            return {"loss": zero_B, "mse": zero_B.detach(), "cos_sim": zero_B.detach()}
        wanted, most = self.num_steps if self.training else GAMMA, max(rows.ids_BL.shape[1] - 1, 1)
        steps = self.network.unrolled(rows.states_BLD, rows.ids_BL, min(wanted, most))
        each = [self._positions(rows, self.network.logits(states), step) for step, states in enumerate(steps)]
        mse_B, cos_B = self._states(rows, steps[0])
        loss_B = self.weights.mse * mse_B + self.weights.cosine * (1.0 - cos_B)
        if self.draft_weights.needs_drafter and rows.ids_BL.shape[1] > 1:
            drafted = [draft_loss(positions, self.draft_weights) for positions in each[: self.num_steps]]
            loss_B = loss_B + torch.stack(drafted).mean(dim=0)
        found = {"loss": loss_B, "mse": mse_B.detach(), "cos_sim": cos_B.detach()}
        if not self.training:
            found |= {"tokens": rows.used_BL.sum(dim=1), "passes": passes(each, rows.used_BL)}
        return found

    def _positions(self, rows: DraftRows, logits_BLI: Tensor, step: int) -> Positions:
        """Return the distributions of one step, for tokens 1 + step and later."""
        behind = 1 + step
        return Positions(
            logits_BLI[:, : logits_BLI.shape[1] - behind].log_softmax(dim=2),
            rows.p_BLI[:, behind:],
            self._place_V[rows.ids_BL[:, behind:]],
            rows.used_BL[:, behind:],
        )

    def _states(self, rows: DraftRows, predicted_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared error and the mean cosine of predicted states, both (B,)."""
        own_BLD, used_BL = rows.states_BLD[:, 1:], rows.used_BL[:, 1:]
        predicted_BLD = predicted_BLD[:, :-1]
        num_B = used_BL.sum(dim=1).clamp(min=1)
        mse_BL = (predicted_BLD - own_BLD).square().mean(dim=2)
        cos_BL = torch.cosine_similarity(predicted_BLD, own_BLD, dim=2)
        mse_B, cos_B = ((each_BL * used_BL).sum(dim=1) / num_B for each_BL in (mse_BL, cos_BL))
        return mse_B, cos_B


def eagle_objective(cfg: Any, adapter: EagleHead, layout: DraftLayout, device: torch.device) -> EagleObjective:
    """Join a head with the losses and the target of a run, by a `DraftTrainConfig`."""
    network = EagleNetwork(frozen_model(cfg.language_model, device), adapter)
    weights = LossWeights(mse=cfg.mse_weight, cosine=cfg.cosine_weight)
    return EagleObjective(adapter, weights, draft_weights(cfg), layout, network, cfg.draft_steps, device)


def passes(steps: list[Positions], used_BL: Tensor) -> Tensor:
    """Return the target passes of each answer, (B,), with drafts of `GAMMA` tokens."""
    length = used_BL.shape[1]
    right_SBL = torch.stack([F.pad(each.right_BL, (0, length - each.right_BL.shape[1])) for each in steps])
    runs_BL = right_SBL.long().cumprod(dim=0).sum(dim=0).cpu()
    lengths = used_BL.sum(dim=1).tolist()
    return torch.tensor(
        [num_passes_by_runs(row[:n].tolist(), GAMMA) for row, n in zip(runs_BL, lengths, strict=True)]
    )
