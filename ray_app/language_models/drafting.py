"""Language models as drafters: a small model with the target's tokens, and the target's own first layers.

Shapes: P = positions of a prompt, G = drafted tokens (γ), V = the target's vocabulary, I = ids that may be drafted,
D = width.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ray_app.core.speculative.decoding import Proposal, Sampled
from ray_app.core.speculative.product import product
from ray_app.core.speculative.verification import draw
from ray_app.encoders.library import transformers
from ray_app.errors import InputError
from ray_app.language_models.loading import tokenizer_difference
from ray_app.language_models.model import Context, LanguageModel


def require_same_tokens(drafter: LanguageModel, target: LanguageModel) -> None:
    """InputError, naming both and a token that differs, unless a drafted token means the same to the target."""
    if difference := tokenizer_difference(drafter.tokenizer, target.tokenizer):
        raise InputError(
            f"{drafter.folder} cannot draft for {target.folder}: their tokenizers differ ({difference}). Name a "
            "drafter with the target's tokenizer."
        )


class DraftModel(Protocol):
    """A model that drafts from a context of its own."""

    @property
    def max_positions(self) -> int | None:
        """Most positions of a prompt and its answer; None: any number."""
        ...

    @property
    def end_token(self) -> int:
        """Token that ends an answer."""
        ...

    def require_room(self, num_positions: int, max_new_tokens: int) -> None:
        """InputError if a prompt and its answer outgrow the model."""
        ...

    def context(self) -> Context:
        """Return an empty context."""
        ...


class ModelProposer:
    """A language model that drafts for one answer: it keeps a context of its own, cropped to what was accepted."""

    def __init__(
        self, model: DraftModel, prefix: Callable[[], Tensor], vocabulary_size: int, sampled: Sampled | None
    ) -> None:
        """`prefix` gives the prompt (P, D) when the first draft is asked for; `sampled`: draw as the target does."""
        self._model, self._prefix, self._size, self._sampled = model, prefix, vocabulary_size, sampled
        self._context: Context | None = None
        self._first_1V = torch.empty(0)
        self._read: list[int] = []

    @torch.inference_mode()
    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        """Draft tokens. InputError: the prompt outgrows the drafter."""
        if self._context is None:
            prefix_PD = self._prefix()
            self._model.require_room(len(prefix_PD), num_tokens)
            self._context = self._model.context()
            self._first_1V = self._context.prefill(prefix_PD)
        limit = self._model.max_positions
        if limit is not None and self._context.length + len(accepted) - len(self._read) + num_tokens > limit:
            return Proposal()
        tokens: list[int] = []
        rows: list[NDArray[np.float64]] = []
        while True:
            token, q_V = choose(self._logits([*accepted, *tokens]), self._sampled)
            tokens.append(token)
            if q_V is not None:
                rows.append(np.pad(q_V, (0, self._size - len(q_V))))
            if len(tokens) == num_tokens or token == self._model.end_token:
                return Proposal(tuple(tokens), np.stack(rows) if rows else None)

    def _logits(self, text: list[int]) -> Tensor:
        """Return the logits behind a text, (1, V), after all else was forgotten; its last token is read again."""
        assert self._context is not None
        same = 0
        while same < min(len(self._read), len(text)) and self._read[same] == text[same]:
            same += 1
        same = min(same, max(len(text) - 1, 0))
        self._context.crop(len(self._read) - same)
        self._read[same:] = text[same:]
        logits_1V = self._context.step(text[same:])[-1:] if text else self._first_1V
        return logits_1V[:, : self._size]


class ProductProposer(ModelProposer):
    """A language model whose distribution is multiplied with that of `hybrid`, which is asked first."""

    def __init__(
        self,
        model: DraftModel,
        prefix: Callable[[], Tensor],
        vocabulary_size: int,
        sampled: Sampled | None,
        *,
        ids: Sequence[int],
        expected: Callable[[Sequence[int]], Mapping[int, float]],
    ) -> None:
        """`ids`: tokens that the model can say. `expected`: probabilities of the token behind a text."""
        super().__init__(model, prefix, vocabulary_size, sampled)
        self._ids, self._expected = list(ids), expected

    def _logits(self, text: list[int]) -> Tensor:
        """Return the log of the product, −∞ for tokens that neither side names, (1, V)."""
        scores = product(self._expected(text), lambda: self._probabilities(text))
        scores_1V = torch.zeros(1, self._size, dtype=torch.double)
        scores_1V[0, list(scores)] = torch.tensor(list(scores.values()), dtype=torch.double)
        return scores_1V.log()

    def _probabilities(self, text: list[int]) -> dict[int, float]:
        q_I = super()._logits(text)[0, self._ids].double().softmax(dim=0)
        return dict(zip(self._ids, q_I.tolist(), strict=True))


class EarlyExit:
    """The target's first layers with its own norm and head, the head for some ids only: it has no own weights."""

    def __init__(self, target: LanguageModel, num_layers: int, ids: Sequence[int]) -> None:
        """`ids`: tokens that may be drafted, such as those of earlier answers. InputError: no such layers."""
        body, head = target.model.get_decoder(), target.model.get_output_embeddings()
        layers = getattr(body, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not 0 < num_layers < len(layers):
            has = f"has {len(layers)} layers" if isinstance(layers, nn.ModuleList) else "does not list its layers"
            raise InputError(f"an early exit after {num_layers} layers: {target.folder} {has}; take fewer.")
        self._body = copy.copy(body)
        self._body.__dict__ = {**body.__dict__, "_modules": {**body._modules, "layers": layers[:num_layers]}}
        self._body.config = copy.deepcopy(body.config)
        self._body.config.num_hidden_layers = num_layers
        if getattr(self._body.config, "layer_types", None):
            self._body.config.layer_types = self._body.config.layer_types[:num_layers]
        self.ids_I = torch.tensor(sorted(set(ids)), device=head.weight.device)
        self._weight_ID = head.weight[self.ids_I]
        self._bias_I = None if head.bias is None else head.bias[self.ids_I]
        self.vocabulary_size, self.end_token = target.vocabulary_size, target.end_token

    def logits(self, cache: Any, **inputs: Tensor) -> Tensor:
        """Read more positions; return the logits of `ids_I` behind the last, shape (1, I)."""
        states_1PD: Tensor = self._body(**inputs, cache=cache, use_cache=True).last_hidden_state
        return F.linear(states_1PD[:, -1], self._weight_ID, self._bias_I)

    def cache(self, context: Context, num_dropped: int) -> Any:
        """Return the target's own cache of these layers, without its last positions. The target's stays as it is."""
        cache = transformers().DynamicCache(config=self._body.config)
        for mine, theirs in zip(cache.layers, context.cache.layers, strict=False):
            mine.lazy_initialization(theirs.keys, theirs.values)
            until = theirs.keys.shape[-2] - num_dropped
            mine.keys, mine.values = theirs.keys[..., :until, :], theirs.values[..., :until, :]
        return cache


class EarlyExitProposer:
    """An early exit that drafts for one answer, from the target's own cache of it."""

    def __init__(self, early: EarlyExit, context: Context, prefix_PD: Tensor, sampled: Sampled | None) -> None:
        self._early, self._context, self._sampled = early, context, sampled
        self._last_1D = prefix_PD[-1:]

    @torch.inference_mode()
    def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
        # The target has read all but the last accepted token; before the first, all of the prompt.
        early = self._early
        cache = early.cache(self._context, 0 if accepted else 1)
        if accepted:
            logits_1I = early.logits(cache, input_ids=self._tensor(accepted[-1]))
        else:
            logits_1I = early.logits(cache, inputs_embeds=self._last_1D[None])
        tokens: list[int] = []
        rows: list[NDArray[np.float64]] = []
        while True:
            chosen, q_I = choose(logits_1I, self._sampled)
            tokens.append(int(early.ids_I[chosen]))
            if q_I is not None:
                q_V = np.zeros(early.vocabulary_size)
                q_V[early.ids_I.cpu().numpy()] = q_I
                rows.append(q_V)
            if len(tokens) == num_tokens or tokens[-1] == early.end_token:
                return Proposal(tuple(tokens), np.stack(rows) if rows else None)
            logits_1I = early.logits(cache, input_ids=self._tensor(tokens[-1]))

    def _tensor(self, token: int) -> Tensor:
        return torch.tensor([[token]], device=self._last_1D.device)


def choose(logits_1V: Tensor, sampled: Sampled | None) -> tuple[int, NDArray[np.float64] | None]:
    """Return the most likely token; or one that was drawn, with the distribution that it is from, shape (V,)."""
    if sampled is None:
        return int(logits_1V.argmax()), None
    q_V = sampled.probabilities(logits_1V)[0]
    return draw(q_V, sampled.rng), q_V
