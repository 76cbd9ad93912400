"""Prompts of both models and the target's answers to them: tokens, and hidden states where they were captured."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.float32]
"""A model's last hidden state for each token of its answer, shape (T, D): what the token was chosen from."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Question to both models, and EventGPT's answer to it."""

    question: str
    """Question as asked."""
    event_tokens: tuple[int, ...]
    """EventGPT's own output."""
    event_states: States | None = field(default=None, compare=False, repr=False)
    """EventGPT's states, where they were captured."""
    aligned_states: States | None = field(default=None, compare=False, repr=False)
    """The same after an adapter: in the target's space."""
    sequence: str = ""
    """The continuous drive that the window is from, where it is named."""


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt with the target's answer."""

    prompt: Prompt
    """Prompt of the answer."""
    answer: tuple[int, ...]
    """The target's tokens."""
    target_states: States | None = field(default=None, compare=False, repr=False)
    """The target's states, where they were captured."""
