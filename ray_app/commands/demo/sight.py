"""Sight of a target, measured on pictures of drives that it was not trained on: what it says, and what it needs.

Shapes: N = pictures, P = positions of a prompt, D = width of the language model, A = tokens of an answer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ray_app.commands.demo.answers import Picture
from ray_app.core.bootstrap import interval95, resampled_means, resampled_units
from ray_app.language_models.answers import greedy_batch
from ray_app.language_models.model import LanguageModel
from ray_app.scenes.captions import FACTS, KEY_ELEMENTS, answer

MAX_NEW_TOKENS = 160
BATCH_PICTURES = 52
LEAST_LOSS_RATIO = 1.1
"""A target looks at its picture if another one makes its loss this much larger."""


@dataclass(frozen=True, slots=True)
class Said:
    """Answers of a target to one question, one for each picture."""

    tokens: list[list[int]]
    """Tokens, without the end."""
    texts: list[str]
    """Texts."""


def ask(target: LanguageModel, some: Sequence[Picture], question: str) -> Said:
    """Return the target's greedy answers, in batches: all prompts of a question have one length."""
    tokens: list[list[int]] = []
    for at in range(0, len(some), BATCH_PICTURES):
        batch = some[at : at + BATCH_PICTURES]
        prefix_BPD = torch.stack([target.prefix(target.prompt(each.image_HWC[None], question)) for each in batch])
        tokens += greedy_batch(target.model, prefix_BPD, target.end_token, MAX_NEW_TOKENS)
    return Said(tokens, [target.tokenizer.decode(each) for each in tokens])


def judge(
    target: LanguageModel,
    some: Sequence[Picture],
    majority: dict[str, str],
    probed: dict[str, list[str]],
    seed: int,
) -> dict[str, Any]:
    """Return how well a target sees, as JSON values.

    `majority`: most frequent value of each kind of fact in the training part; `probed`: a linear probe's values for
    these pictures. Intervals are 95 % over drives.
    """
    said = {question: ask(target, some, question) for question in dict.fromkeys(f.question for f in FACTS.values())}
    _, units = resampled_units([each.sequence for each in some])
    kinds: dict[str, Any] = {}
    for kind, fact in FACTS.items():
        true = [fact.true(each.facts) for each in some]
        right = [fact.said(text) == value for text, value in zip(said[fact.question].texts, true, strict=True)]
        resampled = resampled_means(units, [np.array(right, float)], seed)[:, 0]
        kinds[kind] = {
            "right": float(np.mean(right)),
            "interval95": interval95(resampled),
            "majority": float(np.mean([value == majority[kind] for value in true])),
            "probe": float(np.mean([one == other for one, other in zip(probed[kind], true, strict=True)])),
        }
    key = said[KEY_ELEMENTS]
    losses = _losses(target, some, seed)
    return {
        "pictures": len(some),
        "drives": len({each.sequence for each in some}),
        "kinds": kinds,
        "above_majority": float(np.mean([each["right"] - each["majority"] for each in kinds.values()])),
        "loss": losses,
        "loss_ratio_other": losses["other"] / losses["own"],
        "distinct_texts": len(set(key.texts)),
        "tokens_mean": float(np.mean([len(each) for each in key.tokens])),
        "entropy_bits": entropy_by_position(key.tokens),
        "looks": losses["other"] >= LEAST_LOSS_RATIO * losses["own"] and len(set(key.texts)) > 1,
        "examples": key.texts[:3],
    }


def entropy_by_position(answers: Sequence[list[int]]) -> list[float]:
    """Return the entropy in bits of the tokens at each position, up to the median length."""
    length = int(np.median([len(each) for each in answers]))
    bits = []
    for place in range(length):
        counts = np.array(list(Counter(each[place] for each in answers if len(each) > place).values()), float)
        share = counts / counts.sum()
        bits.append(float(-(share * np.log2(share)).sum()))
    return bits


@torch.inference_mode()
def _losses(target: LanguageModel, some: Sequence[Picture], seed: int) -> dict[str, float]:
    """Return the mean loss of true answers with the own picture, with that of another drive, and without one."""
    sums = {"own": 0.0, "other": 0.0, "none": 0.0}
    drives = [each.sequence for each in some]
    for number, each in enumerate(some):
        said = answer(each.facts, KEY_ELEMENTS, seed + number)
        ids = [*target.tokenizer(said, add_special_tokens=False)["input_ids"], target.end_token]
        other = next(
            at % len(some) for at in range(number, number + len(some)) if drives[at % len(some)] != drives[number]
        )
        for name, image in (("own", each.image_HWC), ("other", some[other].image_HWC), ("none", None)):
            prompt = target.prompt(None if image is None else image[None], KEY_ELEMENTS)
            sums[name] += float(_loss(target, target.prefix(prompt), ids))
    return {name: total / len(some) for name, total in sums.items()}


def _loss(target: LanguageModel, prefix_PD: Tensor, ids: list[int]) -> Tensor:
    ids_A = torch.tensor(ids, device=prefix_PD.device)
    whole_TD = torch.cat([prefix_PD, target.model.get_input_embeddings()(ids_A[:-1])])
    logits_AV = target.model(inputs_embeds=whole_TD[None], use_cache=False, logits_to_keep=len(ids)).logits[0]
    return F.cross_entropy(logits_AV.float(), ids_A)
