"""Greedy answers of one model with the time of each stage, and what verification of drafts would cost it.

Shapes: T = tokens of an answer, D = width of a model's last hidden state, B = prompts of a batch,
P = positions of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_app.core.speculative.decoding import FixedGamma, Greedy, decode
from ray_app.encoders.library import transformers
from ray_app.language_models.model import Context, Frames, LanguageModel

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """One model's answer to one question about some frames."""

    tokens: list[int]
    """With the end token, where the model came to it."""
    text: str
    """The same without special tokens."""
    prefill_ms: float
    """From the prompt to the first token, pictures included."""
    step_ms: float | None
    """Mean time of each later token; None where there is one token only."""
    verify_ms: dict[int, float]
    """A pass over so many drafted tokens behind the last accepted one, by γ."""
    num_verified: int
    """Tokens that these passes chose once more..."""
    num_verified_otherwise: int
    """...and how many of them came out otherwise than step by step: rounding, where it is not 0."""
    states_TD: Tensor | None
    """Last hidden state before the head for each token's choice, bfloat16, on the CPU."""


@torch.inference_mode()
def answer(
    model: LanguageModel,
    frames_THWC: Frames | None,
    question: str,
    *,
    max_new_tokens: int,
    verify: tuple[int, ...] = (),
    with_states: bool = False,
    pictures: Callable[[Frames], Tensor] | None = None,
) -> ModelAnswer:
    """Decode greedily, a token at a time. Preparing the prompt on the CPU is in no time.

    `pictures` makes the embeddings of the frames (N, D) in the model's place.
    """
    prompt = model.prompt(frames_THWC, question)
    began = model.now()
    prefix_PD = model.prefix(prompt, pictures(frames_THWC) if pictures and frames_THWC is not None else None)
    encode_s = model.now() - began
    model.require_room(len(prefix_PD), max_new_tokens)
    context = model.context()
    states = context.keep_states() if with_states else []
    made = decode(
        context,
        prefix_PD,
        None,
        choice=Greedy(),
        gamma=FixedGamma(0),
        max_new_tokens=max_new_tokens,
        end_token=model.end_token,
        clock=model.now,
    )
    states_TD = torch.cat(states).to("cpu", torch.bfloat16) if with_states else None
    tokens = list(made.tokens)
    passes = [_verify(model, context, tokens, gamma) for gamma in verify if gamma + 1 < len(tokens)]
    return ModelAnswer(
        tokens=tokens,
        text=model.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        prefill_ms=1e3 * (encode_s + made.prefill_s),
        step_ms=1e3 * (made.total_s - made.prefill_s) / (len(tokens) - 1) if len(tokens) > 1 else None,
        verify_ms={gamma: ms for gamma, ms, _ in passes},
        num_verified=sum(gamma + 1 for gamma, _, _ in passes),
        num_verified_otherwise=sum(otherwise for _, _, otherwise in passes),
        states_TD=states_TD,
    )


@torch.inference_mode()
def greedy_batch(model: Any, prefix_BPD: Tensor, end_token: int, max_new_tokens: int) -> list[list[int]]:
    """Return the greedy answers to prompts of one length, without the end token, by a model of transformers."""
    cache = transformers().DynamicCache(config=model.config)
    logits_BV = model(inputs_embeds=prefix_BPD, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    chosen: list[Tensor] = []
    ended_B = torch.zeros(len(prefix_BPD), dtype=torch.bool, device=prefix_BPD.device)
    while len(chosen) < max_new_tokens:
        chosen.append(logits_BV.argmax(dim=1))
        ended_B |= chosen[-1] == end_token
        if bool(ended_B.all()):
            break
        logits_BV = model(input_ids=chosen[-1][:, None], cache=cache, use_cache=True).logits[:, -1]
    answers: list[list[int]] = torch.stack(chosen, dim=1).tolist()
    return [tokens[: tokens.index(end_token)] if end_token in tokens else tokens for tokens in answers]


def warm_up(model: LanguageModel, frames_THWC: Frames | None, question: str, verify: tuple[int, ...]) -> None:
    """Answer once: the first answer of a process is slow, since kernels are chosen and memory is claimed."""
    answer(model, frames_THWC, question, max_new_tokens=max((*verify, WARM_UP_TOKENS)) + 2, verify=verify)


def _verify(model: LanguageModel, context: Context, tokens: list[int], gamma: int) -> tuple[int, float, int]:
    """(γ, milliseconds, tokens chosen otherwise) of one pass over the last accepted and γ drafted tokens.

    The answer's own end serves as draft; the context is as long afterwards as before.
    """
    size = gamma + 1
    context.crop(size)
    began = model.now()
    chosen = context.step(tokens[-size - 1 : -1]).argmax(dim=-1).tolist()
    ms = 1e3 * (model.now() - began)
    return gamma, ms, sum(a != b for a, b in zip(chosen, tokens[-size:], strict=True))
