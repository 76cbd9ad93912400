"""An `eagle_head` that drafts live from the states of the target's own passes.

Shapes: B = rows, L = positions, P = positions of a pass, K = positions that are seen, D = width, I = ids of the head,
V = the target's vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.speculative.decoding import Proposal, Sampled
from ray_app.language_models.drafting import choose
from ray_app.language_models.eagle.network import EagleNetwork, Seen
from ray_app.language_models.model import Context, LanguageModel


class EagleModel:
    """A head and its target."""

    def __init__(self, head: EagleHead, target: LanguageModel) -> None:
        self.network, self.target = EagleNetwork(target.model, head.eval()), target
        self.ids_I = torch.tensor(head.config.vocabulary, device=target.device)

    def first_logits(self, state_1D: Tensor) -> Tensor:
        """Return the target's logits of the answer's first token, (1, V)."""
        head = self.target.model.get_output_embeddings()
        return F.linear(state_1D, head.weight, head.bias)

    def weight_bytes(self) -> int:
        """Return the memory of the layer and its head; embeddings are the target's."""
        return sum(each.nbytes for each in self.network.head.parameters())


class EagleProposer:
    """A head that drafts for one answer, in the target's context, which has not read the prompt yet."""

    def __init__(self, model: EagleModel, context: Context, sampled: Sampled | None) -> None:
        self._model, self._sampled = model, sampled
        self._passes = context.keep_states()
        self._states_LD: Tensor | None = None
        self._seen, self._num_read = Seen(), 0

    @torch.inference_mode()
    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        model, network = self._model, self._model.network
        states_LD = self._take_states(len(accepted))
        tokens: list[int] = []
        rows: list[NDArray[np.float64]] = []

        def add(token: int, q_V: NDArray[np.float64] | None) -> bool:
            tokens.append(token)
            if q_V is not None:
                rows.append(q_V)
            return len(tokens) == num_tokens or token == model.target.end_token

        if accepted:
            unread, done = list(accepted[self._num_read :]), False
        else:
            done = add(*choose(model.first_logits(states_LD), self._sampled))
            unread = tokens[:1]
        state_1LD = self._read(unread, states_LD[None, self._num_read :])
        self._num_read = len(accepted)
        num_kept = len(self._seen.keys) if accepted else 0
        while not done:
            chosen, q_I = choose(network.logits(state_1LD[:, -1:])[0], self._sampled)
            done = add(int(model.ids_I[chosen]), None if q_I is None else self._spread(q_I))
            if not done:
                state_1LD = self._read(tokens[-1:], state_1LD[:, -1:])
        del self._seen.keys[num_kept:], self._seen.values[num_kept:]
        return Proposal(tuple(tokens), np.stack(rows) if rows else None)

    def _take_states(self, num_accepted: int) -> Tensor:
        """Return the target's states that chose the accepted tokens; before the first, the one behind the prompt."""
        passes = self._passes
        if self._states_LD is None:
            self._states_LD = passes.pop(0)[-1:]
        if passes:  # the first verified a draft, of which a part was accepted; those after it had none
            num_first = num_accepted - len(self._states_LD) - (len(passes) - 1)
            self._states_LD = torch.cat([self._states_LD, passes[0][:num_first], *passes[1:]])
            passes.clear()
        return self._states_LD

    def _read(self, tokens: list[int], states_1LD: Tensor) -> Tensor:
        device, num = states_1LD.device, len(tokens)
        before = sum(each.shape[2] for each in self._seen.keys)
        places_L = torch.arange(before, before + num, device=device)
        sees_LK = places_L[:, None] >= torch.arange(before + num, device=device)
        ids_1L = torch.tensor([tokens], device=device)
        return self._model.network.read(ids_1L, states_1LD, places_L, self._seen, sees_LK)

    def _spread(self, q_I: NDArray[np.float64]) -> NDArray[np.float64]:
        q_V = np.zeros(self._model.target.vocabulary_size)
        q_V[self._model.ids_I.cpu().numpy()] = q_I
        return q_V
