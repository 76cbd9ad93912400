"""Training of image tokens and LoRA factors by a frozen language model: the cross-entropy of true answers.

A target feature is a row of token ids: those of the question as they are, each plus one; those of the answer negative
likewise; zeros behind the end. It is as exact in float32 as ids are below 2^24.

Shapes: B = pairs, N = image tokens, D = width of the language model, Q = tokens of a question, A = of an answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.core.adapters.lora import LanguageModelShape
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.encoders.library import transformers
from ray_app.errors import InputError
from ray_app.language_models.loading import read_weights
from ray_app.language_models.lora import LowRankLayers


def pack_row(question_ids: Sequence[int], answer_ids: Sequence[int], length: int) -> NDArray[np.float32]:
    """Return a target feature of `length` numbers. InputError: it holds fewer tokens."""
    if (needed := len(question_ids) + len(answer_ids)) > length:
        raise InputError(f"a question and its answer have {needed} tokens, and rows hold {length}.")
    row = np.zeros(length, np.float32)
    row[: len(question_ids)] = np.array(question_ids) + 1
    row[len(question_ids) : needed] = -np.array(answer_ids) - 1
    return row


def unpack_row(row_L: Tensor) -> tuple[Tensor, int]:
    """Return the ids of question and answer, (Q + A,), and A."""
    ids = row_L[row_L != 0]
    return ids.abs().long() - 1, int((ids < 0).sum())


def shape_of(folder: Path) -> LanguageModelShape:
    """Return the sizes of the language model in a folder. InputError: it is not of Llama's kind."""
    try:
        config = transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return LanguageModelShape(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads * head,
            config.num_key_value_heads * head,
            config.intermediate_size,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} is no language model of Llama's kind: {str(error).splitlines()[0]}") from error


class AnswerObjective(AlignmentObjective):
    """Image tokens and LoRA factors with the cross-entropy of answers, through a frozen language model.

    `loss` of a pair is the mean over its answer's tokens. `cos_sim` is the cosine of the likeliest and the true
    tokens as one-hot rows, which is the share of tokens that are right.
    """

    adapter: ImageTokens

    def __init__(self, adapter: ImageTokens, folder: Path, device: torch.device) -> None:
        super().__init__(adapter, LossWeights())
        kind = transformers().AutoModelForCausalLM
        model = read_weights(folder, kind, "float32", str(device)).requires_grad_(False)
        self._layers = LowRankLayers(model.model.layers, LanguageModelShape(*adapter.config.language_model))
        self._model: tuple[Any, ...] = (model,)  # a tuple, so that its weights are none of this module's

    def losses(self, aligned_BD: Tensor, target_BD: Tensor) -> dict[str, Tensor]:
        """Return `loss`, `cos_sim` and an `mse` of zero, each (B,), of image tokens and rows of ids."""
        self._layers.use(self.adapter.down, self.adapter.up)
        found = [self._answered(tokens, row) for tokens, row in zip(aligned_BD, target_BD, strict=True)]
        if not found:
            empty_B = aligned_BD.sum(dim=1)
            return {"loss": empty_B, "mse": empty_B.detach(), "cos_sim": empty_B.detach()}
        loss_B = torch.stack([loss for loss, _ in found])
        cos_B = torch.stack([cos for _, cos in found])
        return {"loss": loss_B, "mse": torch.zeros_like(cos_B), "cos_sim": cos_B}

    def _answered(self, image_ND: Tensor, row_L: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of one pair and the share of right tokens: pairs one by one need no padding."""
        (model,) = self._model
        ids, num_answer = unpack_row(row_L)
        text_TD = model.get_input_embeddings()(ids[:-1])
        inputs = torch.cat([image_ND.reshape(-1, text_TD.shape[1]), text_TD])[None]
        logits_AV = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=num_answer).logits[0]
        answer = ids[-num_answer:]
        return F.cross_entropy(logits_AV, answer), (logits_AV.argmax(dim=1) == answer).float().mean()
