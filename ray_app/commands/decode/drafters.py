"""Drafters of a run: rules that learn from answers, language models with their pictures, parts of the target.

Each is one way to decode every row, next to plain decoding, which has no drafter.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from ray_app.commands.decode.inputs import RowPictures
from ray_app.config.decode import DecodeConfig, Sees
from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.speculative.decoding import Proposal, Proposer, Sampled
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.base import Drafter
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.drafters.replay import DRAFTERS
from ray_app.encoders.registry import encoder_class
from ray_app.errors import ConfigError, InputError
from ray_app.language_models.aligned import AlignedPictures, event_encoder_of
from ray_app.language_models.answers import answer
from ray_app.language_models.drafter_folder import EAGLE_HEAD, EventDrafter, is_drafter, read_drafter, require_target
from ray_app.language_models.drafting import (
    EarlyExit,
    EarlyExitProposer,
    ModelProposer,
    ProductProposer,
    require_same_tokens,
)
from ray_app.language_models.eagle.live import EagleModel, EagleProposer
from ray_app.language_models.exit_network import ExitModel
from ray_app.language_models.kinds import load, loader
from ray_app.language_models.model import Context, Frames, LanguageModel
from ray_app.store.checkpoint import load_checkpoint

EARLY_EXIT = "early_exit"
NEED_ANSWERS = ("constant", "positional", "ngram")
"""Drafters that know nothing but what they learn before the first row."""
WITH_HYBRID = "hybrid+"
"""Prefix of a folder of `demo draft` whose drafter is mixed with `hybrid`."""
GREY = 127


@dataclass(frozen=True, slots=True)
class RowToDraft:
    """Facts that a drafter may know of a row before its answer."""

    prompt: Prompt
    """Question, and the event model's answer where the source has it."""
    pictures: RowPictures
    """Pictures of the row."""
    other: RowPictures | None
    """Pictures of another drive, where they are asked for."""
    context: Context
    """The target's own context of this row."""
    prefix_PD: Tensor
    """The prompt as the target reads it."""
    sampled: Sampled | None
    """How the target draws its tokens; None: greedily."""


class RunDrafter(Protocol):
    """One way to draft."""

    name: str
    """Its name in tables and files."""

    def proposer(self, row: RowToDraft) -> Proposer:
        """Start on a row. InputError: the row lacks the picture that is to be shown."""
        ...

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """Learn from an answer that is whole."""
        ...

    def own_answer(self, row: RowToDraft, max_new_tokens: int) -> tuple[list[int], dict[str, float]]:
        """Return what it says by itself, before anything is verified, and the milliseconds of the stages."""
        ...

    def weight_bytes(self) -> int:
        """Return the memory of weights that only it needs."""
        ...


class RuleDrafter:
    """A drafter of `replay`."""

    def __init__(self, name: str, drafter: Drafter) -> None:
        self.name, self._drafter = name, drafter

    def proposer(self, row: RowToDraft) -> Proposer:
        drafter = self._drafter

        class Rule:
            def propose(self, accepted: Sequence[int], num_tokens: int) -> Proposal:
                return Proposal(tuple(drafter.draft(row.prompt, accepted, num_tokens).tokens))

        return Rule()

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        self._drafter.update(prompt, answer)

    def own_answer(self, row: RowToDraft, max_new_tokens: int) -> tuple[list[int], dict[str, float]]:
        return list(self._drafter.draft(row.prompt, (), max_new_tokens).tokens), {}

    def weight_bytes(self) -> int:
        return 0


class ModelDrafter:
    """A language model with the target's tokens, and one picture."""

    def __init__(
        self, name: str, model: LanguageModel, sees: Sees, vocabulary_size: int, aligned: AlignedPictures | None
    ) -> None:
        """`aligned` makes image tokens of the events for a drafter that sees `adapter`."""
        self.name, self._model, self._sees, self._vocabulary_size = name, model, sees, vocabulary_size
        self._aligned = aligned if sees == "adapter" else None

    def proposer(self, row: RowToDraft) -> Proposer:
        frames_THWC = self._shown(row)
        model, question = self._model, row.prompt.question

        def prefix() -> Tensor:
            asked = model.prompt(frames_THWC, question)
            return model.prefix(asked, None if self._aligned is None else self._pictures(frames_THWC))

        return ModelProposer(model, prefix, self._vocabulary_size, row.sampled)

    def _pictures(self, events_THWC: Frames | None) -> Tensor:
        """Return the embeddings of event images through the adapter."""
        assert self._aligned is not None
        assert events_THWC is not None
        return self._model.embed_pictures(self._aligned.tokens(events_THWC))

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        pass

    def own_answer(self, row: RowToDraft, max_new_tokens: int) -> tuple[list[int], dict[str, float]]:
        pictures = self._pictures if self._aligned else None
        said = answer(
            self._model, self._shown(row), row.prompt.question, max_new_tokens=max_new_tokens, pictures=pictures
        )
        times = {"draft_prefill": said.prefill_ms}
        return said.tokens, times | ({"draft_per_token": said.step_ms} if said.step_ms else {})

    def weight_bytes(self) -> int:
        return self._model.weight_bytes() + (self._aligned.weight_bytes() if self._aligned else 0)

    def _shown(self, row: RowToDraft) -> Frames | None:
        match self._sees:
            case "nothing":
                return None
            case "frames":
                shown = row.pictures.frames_THWC
            case "other":
                assert row.other is not None
                shown = row.other.frames_THWC if row.other.events_THWC is None else row.other.events_THWC
            case _:
                shown = row.pictures.events_THWC
        if self._sees == "constant":
            shown = row.pictures.frames_THWC if shown is None else shown
            shown = None if shown is None else np.full_like(shown, GREY)
        if shown is None:
            raise InputError(f"the row has no picture for --drafter-sees {self._sees}")
        return shown


class SeeingDrafter:
    """A drafter of `demo draft` that is shown events: a trained early exit, and image tokens."""

    def __init__(
        self, name: str, drafter: EventDrafter, model: ExitModel, sees: Sees, hybrid: HybridDrafter | None
    ) -> None:
        """`hybrid`: the drafter's probabilities are multiplied with those that it learns from answers."""
        self.name, self._drafter, self._model, self._sees, self._hybrid = name, drafter, model, sees, hybrid

    def proposer(self, row: RowToDraft) -> Proposer:
        size = self._drafter.target.vocabulary_size
        if self._hybrid is None:
            return ModelProposer(self._model, lambda: self._prefix(row), size, row.sampled)
        return ProductProposer(
            self._model,
            lambda: self._prefix(row),
            size,
            row.sampled,
            ids=self._drafter.exit_layers.config.vocabulary,
            expected=partial(self._hybrid.expected, row.prompt),
        )

    def _prefix(self, row: RowToDraft) -> Tensor:
        """Return the prompt as the drafter reads it. InputError: the row lacks its event image."""
        target, question = self._drafter.target, row.prompt.question
        if self._sees == "frames":
            return row.prefix_PD
        if self._sees == "nothing":
            return target.prefix(target.prompt(None, question))
        pictures = row.other if self._sees == "other" else row.pictures
        events_THWC = pictures.events_THWC if pictures else None
        if events_THWC is None:
            raise InputError(f"the row has no event image for --drafter-sees {self._sees}")
        if self._sees == "constant":
            events_THWC = np.full_like(events_THWC, GREY)
        return target.prefix(target.prompt(events_THWC, question), self._drafter.image_tokens(events_THWC))

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        if self._hybrid is not None:
            self._hybrid.update(prompt, answer)

    def own_answer(self, row: RowToDraft, max_new_tokens: int) -> tuple[list[int], dict[str, float]]:
        return list(self.proposer(row).propose((), max_new_tokens).tokens), {}

    def weight_bytes(self) -> int:
        return self._model.weight_bytes() + sum(each.nbytes for each in self._drafter.events.state_dict().values())


class EarlyExitDrafter:
    """The target's own first layers."""

    name = EARLY_EXIT

    def __init__(self, early: EarlyExit, target: LanguageModel) -> None:
        self._early, self._target = early, target

    def proposer(self, row: RowToDraft) -> Proposer:
        return EarlyExitProposer(self._early, row.context, row.prefix_PD, row.sampled)

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        pass

    def own_answer(self, row: RowToDraft, max_new_tokens: int) -> tuple[list[int], dict[str, float]]:
        context = self._target.context()
        context.prefill(row.prefix_PD)
        own = EarlyExitProposer(self._early, context, row.prefix_PD, None)
        return list(own.propose((), max_new_tokens).tokens), {}

    def weight_bytes(self) -> int:
        return 0


class EagleDrafter:
    """A head of `demo draft` on the target's own states."""

    def __init__(self, name: str, model: EagleModel) -> None:
        self.name, self._model = name, model

    def proposer(self, row: RowToDraft) -> Proposer:
        return EagleProposer(self._model, row.context, row.sampled)

    def update(self, prompt: Prompt, answer: Sequence[int]) -> None:
        pass

    def own_answer(self, row: RowToDraft, max_new_tokens: int) -> tuple[list[int], dict[str, float]]:
        context = self._model.target.context()
        own = EagleProposer(self._model, context, None)
        context.prefill(row.prefix_PD)
        return list(own.propose((), max_new_tokens).tokens), {}

    def weight_bytes(self) -> int:
        return self._model.weight_bytes()


def drafter_folder(name: str) -> Path:
    """Return the folder in a drafter's name: FOLDER or hybrid+FOLDER."""
    return Path(name.removeprefix(WITH_HYBRID))


def named_absolutely(name: str) -> str:
    """Return a drafter's name with its folder's absolute path."""
    if Path(name).is_dir():
        return str(Path(name).absolute())
    return f"{WITH_HYBRID}{drafter_folder(name).absolute()}" if name.startswith(WITH_HYBRID) else name


def require_drafters(cfg: DecodeConfig) -> None:
    """ConfigError, InputError or CheckpointError unless every drafter can be one, before a model is loaded."""
    if "adapter" in cfg.drafter_sees:
        if cfg.adapter is None or cfg.event_encoder is None:
            raise ConfigError(
                "--drafter-sees adapter needs --adapter CKPT, and --event-encoder DIR, which made the event features "
                "that it was trained on."
            )
        event_encoder_of(load_checkpoint(cfg.adapter))
        encoder_class(cfg.event_encoder)
    elif cfg.adapter or cfg.event_encoder:
        raise ConfigError(
            "--adapter and --event-encoder are for a drafter that sees them; add --drafter-sees adapter."
        )
    for name in cfg.drafter:
        if name == EARLY_EXIT:
            continue
        if name in DRAFTERS:
            if DRAFTERS[name].needs_states:
                raise ConfigError(f"drafter '{name}' needs captured states; only `replay` has those.")
            if name in NEED_ANSWERS and not cfg.learn_from:
                raise ConfigError(
                    f"drafter '{name}' drafts from the answers of other drives only; give --learn-from TRACES, for "
                    "instance those of an earlier `decode` or `capture`, or take hybrid, which also learns online."
                )
            continue
        if is_drafter(folder := drafter_folder(name)):
            if EAGLE_HEAD in require_target(folder, cfg.target):
                _require_unmixed(folder, name, cfg.drafter_sees)
            elif "adapter" in cfg.drafter_sees:
                raise ConfigError(f"{folder} has an adapter of its own; take --drafter-sees events.")
            continue
        if name.startswith(WITH_HYBRID):
            raise ConfigError(f"{name}: {folder} is no folder that `demo draft` made; name one, hybrid+FOLDER.")
        if not folder.is_dir():
            rules = (name for name, kind in DRAFTERS.items() if not kind.needs_states)
            known = (EARLY_EXIT, *rules, "a folder of a language model or of `demo draft`", "hybrid+FOLDER")
            raise ConfigError(
                f"there is no drafter '{name}', nor a folder of that name; there are: {', '.join(known)}."
            )
        kind = loader(Path(name))
        if not kind.sees and (shown := [sees for sees in cfg.drafter_sees if sees != "nothing"]):
            raise InputError(f"{name} sees no pictures; leave --drafter-sees {shown[0]} out, or take `nothing`.")


def _require_unmixed(head: Path, name: str, sees: Sequence[Sees]) -> None:
    """ConfigError if an EAGLE head is to be mixed with `hybrid`, or to be shown something."""
    if name.startswith(WITH_HYBRID):
        raise ConfigError(
            f"{name}: {head} is an EAGLE head, which is not mixed with hybrid; name both: --drafter {head} hybrid."
        )
    if sees:
        raise ConfigError(
            f"{head} is an EAGLE head: it reads the target's own states and is shown no picture; leave out "
            f"--drafter-sees {' '.join(sees)}. Drafters that see can have a run of their own for `ray-app compare`."
        )


def run_drafters(
    cfg: DecodeConfig, target: LanguageModel, answered: Sequence[AnsweredPrompt], device: str
) -> list[RunDrafter]:
    """Return every drafter of a run, fitted on earlier answers. InputError: tokenizers that differ."""
    made: list[RunDrafter] = []
    aligned = AlignedPictures(cfg.adapter, cfg.event_encoder, device) if cfg.adapter and cfg.event_encoder else None
    for name in cfg.drafter:
        if name == EARLY_EXIT:
            ids = {token for each in answered for token in each.answer} | {target.end_token}
            every = range(target.vocabulary_size)
            made.append(
                EarlyExitDrafter(EarlyExit(target, cfg.exit_layers, list(ids if answered else every)), target)
            )
        elif name in DRAFTERS:
            rule = DRAFTERS[name]()
            rule.fit(answered)
            made.append(RuleDrafter(name, rule))
        elif is_drafter(folder := drafter_folder(name)):
            drafter = read_drafter(folder, target)
            if isinstance(drafter, EagleHead):
                made.append(EagleDrafter(folder.name, EagleModel(drafter, target)))
                continue
            exit_model = ExitModel(target.text_folder(), drafter.exit_layers, target)
            shown = cfg.drafter_sees or ("events",)
            hybrid, short = None, folder.name
            if name.startswith(WITH_HYBRID):
                hybrid, short = HybridDrafter(), f"{WITH_HYBRID}{folder.name}"
                hybrid.fit(answered)
            made += [
                SeeingDrafter(
                    f"{short}-{sees}" if len(shown) > 1 else short, drafter, exit_model, sees, copy.deepcopy(hybrid)
                )
                for sees in shown
            ]
        else:
            model = load(Path(name), cfg.dtype, device)
            require_same_tokens(model, target)
            model.context()
            short = Path(name).name
            all_sees = cfg.drafter_sees or ("nothing",)
            many = len(all_sees) > 1 or model.sees
            made += [
                ModelDrafter(f"{short}-{sees}" if many else short, model, sees, target.vocabulary_size, aligned)
                for sees in all_sees
            ]
    names = [drafter.name for drafter in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two drafters are called {twice[0]}; name each once, and folders differently.")
    return made
