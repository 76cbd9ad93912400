"""Drafters that see no word: EventGPT's states alone say what the target will answer, place by place.

The nearest state of another sequence's answer (cosine) lends its token. `hidden_state` compares EventGPT's states
with EventGPT's; `adapter` carries them into the target's space first and compares with the target's own.
Shapes: N = states learnt, T = tokens, D = width of a state.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt, States
from ray_app.drafters.base import Draft, Drafter
from ray_app.errors import InputError


class StateDrafter(Drafter):
    """Base of both: a list of states, each with the target's token at its place."""

    needs_event_tokens: ClassVar[bool] = True
    needs_states: ClassVar[bool] = True

    def __init__(self) -> None:
        self._keys_ND: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._tokens_N: NDArray[np.int64] = np.zeros(0, np.int64)
        self._found: tuple[Prompt, tuple[int, ...]] | None = None

    @abstractmethod
    def key_states(self, each: AnsweredPrompt) -> States | None:
        """States of an answer that is learnt from."""

    @abstractmethod
    def query_states(self, prompt: Prompt) -> States | None:
        """States of a prompt that is drafted for."""

    def fit(self, answered: Sequence[AnsweredPrompt]) -> None:
        keys: list[States] = []
        tokens: list[int] = []
        for each in answered:
            states_TD = self.key_states(each)
            if states_TD is not None:
                places = min(len(states_TD), len(each.answer))
                keys.append(unit(states_TD[:places]))
                tokens += each.answer[:places]
        if keys:
            self._keys_ND, self._tokens_N = np.concatenate(keys), np.asarray(tokens, np.int64)

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:
        if self._found is None or self._found[0] is not prompt:
            self._found = (prompt, self.tokens(prompt))
        return Draft(self._found[1][len(accepted) : len(accepted) + num_tokens])

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the nearest state's token for each place; of equally near ones the first. InputError: width."""
        query_TD = self.query_states(prompt)
        if query_TD is None or not len(self._keys_ND) or not len(query_TD):
            return ()
        if query_TD.shape[1] != self._keys_ND.shape[1]:
            raise InputError(
                f"drafter '{self.name}': states of width {query_TD.shape[1]} cannot be compared with those of width "
                f"{self._keys_ND.shape[1]}; they come from another model."
            )
        nearest_T = (unit(query_TD) @ self._keys_ND.T).argmax(axis=1)
        return tuple(self._tokens_N[nearest_T].tolist())


class HiddenStateDrafter(StateDrafter):
    """The token where another answer's EventGPT had the nearest state."""

    name = "hidden_state"

    def key_states(self, each: AnsweredPrompt) -> States | None:
        return each.prompt.event_states

    def query_states(self, prompt: Prompt) -> States | None:
        return prompt.event_states


class AdapterDrafter(StateDrafter):
    """The token where the target had the state nearest to the aligned one."""

    name = "adapter"

    def key_states(self, each: AnsweredPrompt) -> States | None:
        return each.target_states

    def query_states(self, prompt: Prompt) -> States | None:
        return prompt.aligned_states


def unit(states_TD: States) -> States:
    """Rows of length one; a row of zeros stays."""
    length_T1 = np.linalg.norm(states_TD, axis=1, keepdims=True)
    return np.asarray(states_TD / np.maximum(length_T1, np.finfo(np.float32).tiny), np.float32)
