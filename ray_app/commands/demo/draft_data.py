"""Rows for drafters of the demo's target: its own answers about rendered drives, next to features of event images.

The target answers in chunks of drives, each of which is kept in a folder of its own, so that an interrupted command
continues. From all chunks a pair store is made: event = feature of the event image, target = a row of
`language_models.draft_rows`.

Shapes: N = pictures, E = width of an event feature, X = numbers of a picture's image tokens, D = width of the
language model, A = tokens of an answer, V = vocabulary, I = ids of the reduced vocabulary, R = rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_app.commands.demo.answers import Picture, pictures
from ray_app.commands.demo.sight import MAX_NEW_TOKENS
from ray_app.data.array_store import write_store
from ray_app.encoders.base import VisionModel
from ray_app.language_models.answers import greedy_batch
from ray_app.language_models.draft_rows import KEY, DraftLayout, pack
from ray_app.language_models.joined import CHECKSUMS, PICTURE_PLACE
from ray_app.language_models.model import LanguageModel
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.scenes.scene import RENDERER
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import load_training_state, save_training_state

DRIVES_PER_CHUNK = 12
MIN_VARIANCE_SHARE = 1e-4
"""A direction whose spread is below this share of the first one's does not vary."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The target's answers about some pictures."""

    sequences: list[str]
    """Name of each picture's drive."""
    times_us: list[int]
    """Time of each picture."""
    event_NE: Tensor
    """Features of the event images, float16."""
    image_NX: Tensor
    """Image tokens of the pictures, as the target reads them."""
    answers: list[list[int]]
    """Tokens of the answers, with their ends."""
    states: list[Tensor]
    """Input of the target's head at each token of an answer, (A, D)."""
    normalisers: list[Tensor]
    """Logarithm of the sum over all tokens of the exponentials of the head's outputs, (A,)."""

    def probabilities(self, head_ID: Tensor) -> Iterator[Tensor]:
        """Yield the target's probabilities of some ids at each token of each answer, (A, I)."""
        for states_AD, normaliser_A in zip(self.states, self.normalisers, strict=True):
            yield (states_AD @ head_ID.T - normaliser_A[:, None]).exp()


def digest_of(target: Path) -> str:
    """Return the digest of a joined folder: that of its list of checksums."""
    return sha256_file(target / CHECKSUMS)


def answered_chunks(
    work: Path,
    target: LanguageModel,
    encoder: VisionModel,
    *,
    seed: int,
    part: int,
    num_drives: int,
    per_drive: int,
    progress: Callable[[str], None],
) -> list[Chunk]:
    """Return the chunks of some drives, each answered here unless its folder is there.

    `encoder` reads the event images. CheckpointError: a damaged folder.
    """
    chunks = []
    for first in range(0, num_drives, DRIVES_PER_CHUNK):
        number = min(DRIVES_PER_CHUNK, num_drives - first)
        folder = work / f"part_{part}_drives_{first:04d}_{number}"
        if not folder.exists():
            some = list(pictures(seed, part, number, per_drive, first_drive=first, with_events=True))
            _save(folder, some, _event_features(encoder, some), *_answered(target, some))
        chunks.append(_load(folder))
        progress(f"{first + number} of {num_drives} drives are answered")
    return chunks


def _event_features(encoder: VisionModel, some: Sequence[Picture]) -> Tensor:
    """Return the features of event images, (N, E), rounded as they are stored."""
    images = [each.event_HWC for each in some if each.event_HWC is not None]
    assert len(images) == len(some)
    rows = [encoder.encode([[image] for image in images[at : at + 16]]) for at in range(0, len(images), 16)]
    return torch.cat(rows).flatten(1).to(torch.float16)


@torch.inference_mode()
def _answered(target: LanguageModel, some: Sequence[Picture]) -> tuple[Tensor, list[list[int]], Tensor, Tensor]:
    """Return image tokens (N, X), answers, and of each step the head's input (A, N, D) and normaliser (A, N)."""
    prompts = [target.prompt(each.image_HWC[None], KEY_ELEMENTS) for each in some]
    images = []
    for prompt in prompts:
        assert prompt.pixels_TCHW is not None
        images.append(target.picture_embeddings(prompt.pixels_TCHW.to(target.device, target.model.dtype)))
    prefix_NPD = torch.stack([target.prefix(*each) for each in zip(prompts, images, strict=True)])
    states: list[Tensor] = []
    normalisers: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor], logits_NAV: Tensor) -> None:
        states.append(inputs[0][:, -1].float())
        normalisers.append(logits_NAV[:, -1].float().logsumexp(dim=1))

    hook = target.model.get_output_embeddings().register_forward_hook(keep)
    try:
        answers = greedy_batch(target.model, prefix_NPD, target.end_token, MAX_NEW_TOKENS)
    finally:
        hook.remove()
    ended = [[*each, target.end_token] if len(each) < MAX_NEW_TOKENS else each for each in answers]
    return torch.stack(images).flatten(1), ended, torch.stack(states), torch.stack(normalisers)


def _save(
    folder: Path,
    some: Sequence[Picture],
    event_NE: Tensor,
    image_NX: Tensor,
    answers: list[list[int]],
    states_AND: Tensor,
    normalisers_AN: Tensor,
) -> None:
    """Write a chunk; answers one behind the other."""
    tensors = {
        "event": event_NE,
        "image": image_NX,
        "states": torch.cat([states_AND[: len(each), row] for row, each in enumerate(answers)]),
        "normalisers": torch.cat([normalisers_AN[: len(each), row] for row, each in enumerate(answers)]),
    }
    about = {
        "sequences": [each.sequence for each in some],
        "times_us": [each.t_us for each in some],
        "answers": answers,
    }
    save_training_state(folder, tensors, about)


def _load(folder: Path) -> Chunk:
    tensors, about = load_training_state(folder)
    lengths = [len(each) for each in about["answers"]]
    return Chunk(
        sequences=about["sequences"],
        times_us=about["times_us"],
        event_NE=tensors["event"],
        image_NX=tensors["image"],
        answers=about["answers"],
        states=list(tensors["states"].split(lengths)),
        normalisers=list(tensors["normalisers"].split(lengths)),
    )


def ids_of(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """Return the ids that occur in answers, in order."""
    return tuple(sorted({token for chunk in chunks for answer in chunk.answers for token in answer}))


def head_of(target: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Return the rows of the target's head for some ids, (I, D)."""
    weight: Tensor = target.model.get_output_embeddings().weight
    return weight.detach()[list(ids)].float().cpu()


def write_draft_store(
    folder: Path,
    chunks: Sequence[Chunk],
    target: LanguageModel,
    vocabulary: Sequence[int],
    seed: int,
    *,
    states: bool = False,
) -> DraftLayout:
    """Write the pair store of some chunks with the distributions over a vocabulary; return its layout.

    `states`: with the target's states too.
    """
    head_ID, known = head_of(target, vocabulary), set(vocabulary)
    distributions = [p_AI for chunk in chunks for p_AI in chunk.probabilities(head_ID)]
    answers = [answer for chunk in chunks for answer in chunk.answers]
    prompt = target.prompt(None, KEY_ELEMENTS)
    before, after = _around_pictures(target)
    assert prompt.token_ids == (*before, *after)
    num_tokens = sum(map(len, answers))
    layout = DraftLayout(
        target=digest_of(target.folder),
        question=KEY_ELEMENTS,
        before=before,
        after=after,
        vocabulary=tuple(vocabulary),
        vocabulary_size=target.vocabulary_size,
        end_token=target.end_token,
        image_tokens=chunks[0].image_NX.shape[1] // head_ID.shape[1],
        width=head_ID.shape[1],
        length=max(map(len, answers)),
        mass_outside=sum(float((1.0 - p_AI.sum(dim=1)).sum()) for p_AI in distributions) / num_tokens,
        tokens_outside=sum(token not in known for answer in answers for token in answer) / num_tokens,
        states=states,
    )
    probabilities = iter(distributions)
    write_store(
        folder,
        (
            {
                "event": chunk.event_NE[row].numpy(),
                "target": pack(
                    layout,
                    chunk.image_NX[row].numpy(),
                    answer,
                    next(probabilities).numpy(),
                    chunk.states[row].numpy(),
                ),
                "sequence": chunk.sequences[row],
                "t_start_us": chunk.times_us[row],
                "t_end_us": chunk.times_us[row] + 1_000_000,
            }
            for chunk in chunks
            for row, answer in enumerate(chunk.answers)
        ),
        source={"name": "draft rows", "renderer": RENDERER, "seed": seed, KEY: layout.model_dump(mode="json")},
    )
    return layout


def _around_pictures(target: LanguageModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the prompt before and behind a picture."""
    blank = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    ids = target.prompt(blank[None], KEY_ELEMENTS).token_ids
    place = ids.index(PICTURE_PLACE)
    return ids[:place], ids[place + 1 :]


def event_start(event_NE: Tensor, image_NX: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the tensors that `event_tokens` starts from: means and principal subspaces of both sides."""
    start: dict[str, Tensor] = {}
    for side, x_NW in (("event", event_NE), ("target", image_NX)):
        mean_W, basis_WR, scale_R = subspace(x_NW.float(), rank)
        start |= {f"map.{side}_mean": mean_W, f"map.{side}_basis": basis_WR, f"map.{side}_scale": scale_R}
    return start


def subspace(x_NW: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (W,), principal directions (W, R) and deviations along them (R,) of some rows.

    Directions that do not vary are zero, with a deviation of 1.
    """
    mean_W = x_NW.mean(dim=0)
    _, values_K, directions_KW = torch.linalg.svd(x_NW - mean_W, full_matrices=False)
    varying = min(rank, int((values_K > MIN_VARIANCE_SHARE * values_K[0]).sum()))
    basis_WR, scale_R = torch.zeros(x_NW.shape[1], rank), torch.ones(rank)
    basis_WR[:, :varying] = directions_KW[:varying].T
    scale_R[:varying] = values_K[:varying] / len(x_NW) ** 0.5
    return mean_W, basis_WR, scale_R
