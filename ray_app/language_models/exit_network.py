"""A target's first layers with a trained head for some ids: along whole answers in training, and live with a cache.

Shapes: B = rows, N = image tokens, D = width of the language model, X = N · D, Q = tokens of the prompt on one side
of the picture, L = positions of an answer, P = all positions, K = positions of a step, I = ids of the head, V = the
target's vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.adapters.lora import LanguageModelShape
from ray_app.core.adapters.registry import num_parameters
from ray_app.encoders.library import transformers
from ray_app.language_models.loading import read_weights
from ray_app.language_models.lora import LowRankLayers, merge_changes
from ray_app.language_models.model import Context, LanguageModel


def first_layers(folder: Path, num_layers: int, dtype: str, device: str) -> Any:
    """Return the body of a language model of Llama's kind with its first layers only, frozen."""
    model = read_weights(folder, transformers().AutoModelForCausalLM, dtype, device).requires_grad_(False)
    body = model.get_decoder()
    body.layers = body.layers[:num_layers]
    body.config.num_hidden_layers = num_layers
    if getattr(body.config, "layer_types", None):
        body.config.layer_types = body.config.layer_types[:num_layers]
    return body


class ExitNetwork:
    """The layers with the factors and the head of an `EarlyExitLayers`, trained here or frozen."""

    def __init__(self, folder: Path, exit_layers: EarlyExitLayers, device: torch.device, *, frozen: bool) -> None:
        """`folder`: the language model whose first layers it has. A frozen one has its changes merged."""
        shape = LanguageModelShape(*exit_layers.config.language_model)
        self._body = first_layers(folder, shape.layers, "float32", str(device))
        self._exit = exit_layers.to(device)
        self._factors: LowRankLayers | None = None
        if frozen:
            self._exit.requires_grad_(False)
            merge_changes(self._body.layers, exit_layers.changes())
        else:
            self._factors = LowRankLayers(self._body.layers, shape)

    @property
    def num_parameters(self) -> int:
        """Numbers in the layers and the head; embeddings are the target's."""
        return num_parameters(self._body.layers) + self._exit.head.numel()

    def log_probabilities(
        self, image_BX: Tensor, before: Sequence[int], after: Sequence[int], ids_BL: Tensor
    ) -> Tensor:
        """Return the logarithms of the probabilities at each position of the answers, (B, L, I).

        Positions behind an answer's end mean nothing; those before it do not see them.
        """
        if self._factors is not None:
            self._factors.use(self._exit.down, self._exit.up)
        rows, length = ids_BL.shape
        embed, device = self._body.get_input_embeddings(), ids_BL.device
        before_BQD, after_BQD = (
            embed(torch.tensor(list(ids), dtype=torch.long, device=device)).expand(rows, -1, -1)
            for ids in (before, after)
        )
        image_BND = image_BX.unflatten(1, (-1, before_BQD.shape[2])) if image_BX.shape[1] else before_BQD[:, :0]
        inputs_BPD = torch.cat([before_BQD, image_BND, after_BQD, embed(ids_BL[:, :-1])], dim=1)
        states_BPD = self._body(inputs_embeds=inputs_BPD, use_cache=False).last_hidden_state
        return F.linear(states_BPD[:, -length:], self._exit.head).log_softmax(dim=2)


class ExitModel:
    """The same as a model that drafts live: logits of the whole vocabulary, −∞ for ids that it cannot say."""

    def __init__(self, folder: Path, exit_layers: EarlyExitLayers, target: LanguageModel) -> None:
        """`folder`: the target's own language model."""
        config, device = exit_layers.config, target.device
        self._body = first_layers(folder, config.language_model[0], "float32", str(device))
        merge_changes(self._body.layers, exit_layers.to(device).changes())
        self._body = self._body.to(target.model.dtype)
        self._head_ID = exit_layers.head.detach().to(target.model.dtype)
        self._ids_I = torch.tensor(config.vocabulary, device=device)
        self._target = target
        self.config, self.device = self._body.config, device
        self.max_positions, self.end_token = target.max_positions, target.end_token

    def __call__(self, *, logits_to_keep: int = 0, **inputs: Any) -> SimpleNamespace:
        """Read more positions; return `logits`, (1, K, V), of the last `logits_to_keep` of them, 0 for all."""
        states_1KD = self._body(**inputs).last_hidden_state[:, -logits_to_keep:]
        logits_1KI = F.linear(states_1KD, self._head_ID)
        logits_1KV = logits_1KI.new_full((*logits_1KI.shape[:2], self._target.vocabulary_size), -torch.inf)
        return SimpleNamespace(logits=logits_1KV.index_copy_(2, self._ids_I, logits_1KI))

    def require_room(self, num_positions: int, max_new_tokens: int) -> None:
        """InputError if a prompt and its answer outgrow the target."""
        self._target.require_room(num_positions, max_new_tokens)

    def context(self) -> Context:
        """Return an empty context."""
        return Context(self, "the drafter")

    def weight_bytes(self) -> int:
        """Return the memory of its layers and its head; embeddings are the target's."""
        layers = self._body.layers.parameters()
        return sum(weight.numel() * weight.element_size() for weight in (*layers, self._head_ID))
