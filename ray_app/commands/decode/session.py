"""One replica of a run: the models on one device, and each row decoded plainly and with every drafter, in turn.

The order of the ways rotates from row to row, so that none always comes first. Times are milliseconds of the wall
clock; encoding the target's pictures is measured once and charged to every way.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_app.commands.decode.drafters import RowToDraft, RunDrafter, run_drafters
from ray_app.commands.decode.inputs import DecodeRow, RowPictures
from ray_app.config.decode import DecodeConfig
from ray_app.core.speculative.decoding import Decoded, FixedGamma, Gamma, Greedy, Pass, Sampled, decode
from ray_app.core.speculative.gamma import OnlineGamma
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.errors import InputError
from ray_app.language_models.kinds import load
from ray_app.language_models.loading import out_of_memory
from ray_app.language_models.model import LanguageModel

PLAIN = "plain"
"""Name of decoding without a drafter."""
REPEATS = 3
"""Times that a pass of each length is measured at the start, for the choice of γ."""
ROUNDING_STEPS = 8
"""A text may differ where two logits are nearer than so many steps of the number format at their size."""

OnPass = Callable[[str, str, str, Pass], None]
"""Called after each pass with the name of the way, the text that was drafted and accepted, that of the target's own
token, and the pass."""


@dataclass(frozen=True, slots=True)
class Difference:
    """First place where a text differs from plain decoding."""

    place: int
    """Position in the answer."""
    plain_token: int
    """Token of plain decoding."""
    token: int
    """Token of the other text."""
    plain_logits: tuple[float, float]
    """Logits of the two tokens in passes over one token."""
    logits: tuple[float, float]
    """The same in one pass over the whole answer before that place."""
    rounding: bool
    """True if the logits of plain decoding are too near for the number format to tell them apart."""


class GrowingText:
    """Text of an answer piece by piece: a token's text may depend on those before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Return what the text gains; part of a character is kept back until the rest is there."""
        self._tokens += tokens
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        text = text.removesuffix("\ufffd")
        piece = text[self._shown :]
        self._shown = max(len(text), self._shown)
        return piece

    def add_pass(self, new: Sequence[int], done: Pass) -> tuple[str, str]:
        """Return the text of the accepted draft of a pass, and that of the target's own token."""
        return self.add(new[: done.accepted]), self.add(new[done.accepted :])


class DecodeSession:
    """Models and drafters of one replica."""

    def __init__(self, cfg: DecodeConfig, answered: Sequence[AnsweredPrompt], device: str) -> None:
        """InputError: a model that cannot be loaded or decoded with. ResourceError: a GPU's memory is exceeded."""
        self._cfg, self._device = cfg, device
        try:
            self.target: LanguageModel = load(cfg.target, cfg.dtype, device)
            self.target.context()
            self.drafters: list[RunDrafter] = run_drafters(cfg, self.target, answered, device)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, device) from error
        self._gammas: dict[str, Gamma] = {}

    def learn(self, line: Mapping[str, Any]) -> None:
        """Bring the drafters to where they were after a row that an earlier start has decoded."""
        prompt = Prompt(line["question"], tuple(line["given_draft_tokens"]), sequence=line["sequence"])
        for drafter in self.drafters:
            drafter.update(prompt, line["drafters"][drafter.name].get("tokens", line["target_tokens"]))

    def decode(
        self, row: DecodeRow, pictures: RowPictures, other: RowPictures | None, on_pass: OnPass | None = None
    ) -> dict[str, Any]:
        """Return the row's line: the answer, and times and passes of every way. InputError: the row cannot be read.

        ResourceError: a GPU's memory is exceeded.
        """
        try:
            return self._decode(row, pictures, other, on_pass)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, self._device) from error

    @torch.inference_mode()
    def _decode(
        self, row: DecodeRow, pictures: RowPictures, other: RowPictures | None, on_pass: OnPass | None
    ) -> dict[str, Any]:
        target, clock = self.target, self.target.now
        frames_THWC = pictures.frames_THWC if self._cfg.target_sees == "frames" else None
        if frames_THWC is not None and not target.sees:
            raise InputError(
                f"{self._cfg.target} sees no pictures, and the row has {len(frames_THWC)}; add --target-sees nothing."
            )
        began = clock()
        asked = target.prompt(frames_THWC, row.question)
        prepared = clock()
        prefix_PD = target.prefix(asked)
        stages = {"prepare_ms": 1e3 * (prepared - began), "encode_ms": 1e3 * (clock() - prepared)}
        target.require_room(len(prefix_PD), self._cfg.max_new_tokens)
        if not self._gammas:
            self._gammas = self._measure(prefix_PD)
        prompt = Prompt(row.question, row.draft_tokens, sequence=row.sequence)
        ways = [None, *self.drafters]
        first = row.row % len(ways)
        lines = {}
        for drafter in (*ways[first:], *ways[:first]):
            name = drafter.name if drafter else PLAIN
            lines[name] = self._way(drafter, row, prompt, prefix_PD, pictures, other, stages, on_pass)
        plain = lines.pop(PLAIN)
        tokens = plain.pop("tokens")
        for line in lines.values():
            if self._cfg.temperature == 0.0 and line["tokens"] != tokens:
                line["difference"] = asdict(self._difference(prefix_PD, tokens, line["tokens"]))
            if line["tokens"] == tokens:
                del line["tokens"]
        return {
            **{key: value for key, value in asdict(row).items() if key != "draft_tokens"},
            "given_draft_tokens": list(row.draft_tokens),
            "target_tokens": tokens,
            "target_text": self._text(tokens),
            "temperature": self._cfg.temperature,
            "plain": plain,
            "drafters": {drafter.name: lines[drafter.name] for drafter in self.drafters},
        }

    def _way(
        self,
        drafter: RunDrafter | None,
        row: DecodeRow,
        prompt: Prompt,
        prefix_PD: Tensor,
        pictures: RowPictures,
        other: RowPictures | None,
        stages: Mapping[str, float],
        on_pass: OnPass | None,
    ) -> dict[str, Any]:
        """Return one way's line, its tokens among it."""
        cfg, target, context = self._cfg, self.target, self.target.context()
        name = drafter.name if drafter else PLAIN
        number = 1 + self.drafters.index(drafter) if drafter else 0
        sampled = None
        if cfg.temperature > 0.0:
            sampled = Sampled(cfg.temperature, cfg.top_p, np.random.default_rng([cfg.seed, row.row, number]))
        text = GrowingText(target.tokenizer)
        draft = RowToDraft(prompt, pictures, other, context, prefix_PD, sampled)
        made = decode(
            context,
            prefix_PD,
            drafter.proposer(draft) if drafter else None,
            choice=sampled or Greedy(),
            gamma=self._gammas[name],
            max_new_tokens=cfg.max_new_tokens,
            end_token=target.end_token,
            clock=target.now,
            on_pass=on_pass and (lambda new, done: on_pass(name, *text.add_pass(new, done), done)),
        )
        line = {"tokens": list(made.tokens), **stages, **milliseconds(made), "cache_bytes": context.num_bytes()}
        if drafter:
            own, times = drafter.own_answer(draft, cfg.max_new_tokens)
            line |= {"own_tokens": own, "own_text": self._text(own), "own_ms": times}
            began = time.perf_counter()
            drafter.update(prompt, made.tokens)
            line["learn_ms"] = 1e3 * (time.perf_counter() - began)
            line["pieces"] = self._pieces(made)
            line["passes"] = [
                [each.gamma, each.drafted, each.accepted, each.fed, 1e3 * each.draft_s, 1e3 * each.verify_s]
                for each in made.passes
            ]
        line["total_ms"] = stages["encode_ms"] + 1e3 * made.total_s + line.get("learn_ms", 0.0)
        return line

    def _measure(self, prefix_PD: Tensor) -> dict[str, Gamma]:
        """Return the rule for γ of each way; online ones begin with the measured time of passes of some lengths."""
        cfg = self._cfg
        most = min(cfg.num_speculative_tokens, cfg.max_new_tokens - 1)
        context, clock = self.target.context(), self.target.now
        token = int(context.prefill(prefix_PD).argmax())
        times: dict[int, float] = {}
        for size in sorted({1, 2, *(2**n + 1 for n in range(1, 7) if 2**n < most), most + 1}):
            took = []
            for _ in range(REPEATS + 1):  # the first is slow
                began = clock()
                context.step([token] * size)
                took.append(clock() - began)
                context.crop(size)
            times[size] = statistics.median(took[1:])
        online = cfg.draft_length == "online"
        return {PLAIN: FixedGamma(0)} | {
            drafter.name: OnlineGamma(most, times) if online else FixedGamma(cfg.num_speculative_tokens)
            for drafter in self.drafters
        }

    def _difference(self, prefix_PD: Tensor, plain: Sequence[int], other: Sequence[int]) -> Difference:
        """Return the first place where two texts differ, with the logits of both tokens."""
        shorter = min(len(plain), len(other))
        place = next((n for n in range(shorter) if plain[n] != other[n]), shorter)
        pair = [tokens[place] if place < len(tokens) else self.target.end_token for tokens in (plain, other)]
        stepped, whole = self.target.context(), self.target.context()
        stepped_V = stepped.prefill(prefix_PD)[-1]
        for token in plain[:place]:
            stepped_V = stepped.step([token])[-1]
        whole_V = whole.prefill(prefix_PD)[-1]
        if place:
            whole_V = whole.step(plain[:place])[-1]
        plain_logits = stepped_V[pair].float().tolist()
        step = torch.finfo(stepped_V.dtype).eps * max(abs(value) for value in plain_logits)
        return Difference(
            place=place,
            plain_token=pair[0],
            token=pair[1],
            plain_logits=(plain_logits[0], plain_logits[1]),
            logits=tuple(whole_V[pair].float().tolist()),
            rounding=abs(plain_logits[0] - plain_logits[1]) <= ROUNDING_STEPS * step,
        )

    def _pieces(self, made: Decoded) -> list[tuple[str, str]]:
        """Return the texts of each pass: what was drafted and accepted, and the target's own token."""
        text, place, pieces = GrowingText(self.target.tokenizer), 0, []
        for done in made.passes:
            new = made.tokens[place : place + done.accepted + 1]
            pieces.append(text.add_pass(new, done))
            place += len(new)
        return pieces

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.target.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def memory(self) -> dict[str, int]:
        """Return the bytes of the weights of each model, and of the peak of a GPU's memory."""
        weights = {"target": self.target.weight_bytes()}
        weights |= {drafter.name: drafter.weight_bytes() for drafter in self.drafters}
        if self._device == "cuda":
            weights["gpu_peak"] = torch.cuda.max_memory_allocated()
        return weights


def milliseconds(made: Decoded) -> dict[str, Any]:
    """Return the times of the stages of one answer, and the number of passes."""
    return {
        "prefill_ms": 1e3 * made.prefill_s,
        "draft_ms": 1e3 * made.draft_s,
        "verify_ms": 1e3 * made.verify_s,
        "bookkeeping_ms": 1e3 * made.bookkeeping_s,
        "num_passes": len(made.passes),
    }
