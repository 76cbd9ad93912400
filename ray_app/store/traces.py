"""Recorded outputs of both models, a JSON object on each line: read, checked, and bad lines rejected.

A line has row, question, draft_tokens and target_tokens, and may have duration, draft_text, target_text,
temperature, do_sample, timing_ms, sequence and states. The rows of a file are one stretch of windows in order of
time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from ray_app.core.speculative.prompts import Prompt
from ray_app.errors import InputError
from ray_app.parsing.json_text import parse_json, require_few_members

FIRST_WORD = re.compile(r"\w+")
MOST_BAD = 10_000
"""Lines that may be rejected: a file with more of them holds something else."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Milliseconds = Annotated[float, Field(gt=0.0)]
Few = BeforeValidator(require_few_members)


class Timing(BaseModel):
    """Measured times of one row, or those of `--timing FILE` for every row."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    target_prefill: Milliseconds
    """The target's pass over prompt and pictures."""
    target_per_token: Milliseconds
    """One plain step of the target."""
    draft_vision: float = Field(default=0.0, ge=0.0)
    """EventGPT's event encoder."""
    draft_prefill: float | None = Field(default=None, ge=0.0)
    """EventGPT's pass over its prompt."""
    draft_per_token: float | None = Field(default=None, gt=0.0)
    """One step of EventGPT."""
    verify: Annotated[dict[int, Milliseconds], Few] = Field(default_factory=dict)
    """A target pass over so many drafted tokens, by γ; 0: a pass for which the drafter had none."""
    drafting: Annotated[dict[str, Annotated[float, Field(ge=0.0)]], Few] = Field(default_factory=dict)
    """A drafter's own time for the whole answer, learning from it included, by its name."""

    _few = model_validator(mode="before")(require_few_members)


class Trace(BaseModel):
    """One window's two outputs."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    row: Annotated[int, Field(ge=0, lt=2**63)]
    """Place in the recording order."""
    question: str
    """Question to both models."""
    draft_tokens: Annotated[list[TokenId], FailFast()]
    """EventGPT's output; may be empty."""
    target_tokens: Annotated[list[TokenId], FailFast()]
    """The target's output, decoded greedily."""
    duration: str = ""
    """Window length."""
    draft_text: str | None = None
    """EventGPT's output as text."""
    target_text: str | None = None
    """The target's output as text."""
    temperature: float = 0.0
    """Temperature of the target's decoding; above 0 it was sampled."""
    do_sample: bool = False
    """True if the target sampled."""
    timing_ms: Timing | None = None
    """Measured times of this row."""
    sequence: str = ""
    """The continuous drive that the window is from, where it is known."""
    states: str | None = None
    """File with both models' states of this row, named from where the traces lie."""

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.question, tuple(self.draft_tokens), sequence=self.sequence)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was rejected."""

    file: str
    """Its file."""
    line: int
    """Its number, from 1."""
    reason: str
    """Reason of the rejection."""


@dataclass(frozen=True, slots=True)
class TraceFile:
    """One file's rows that can be replayed."""

    path: Path
    """File of the rows."""
    traces: tuple[Trace, ...]
    """Rows in the file's order."""
    rejected: tuple[BadLine, ...]
    """Lines that were rejected."""
    cut_off: int
    """Answers without an end token: recorded up to a length limit."""


def read_traces(path: Path, vocabulary: int, end_token: int) -> TraceFile:
    """Every row of a file, checked. A line that cannot be used is rejected with its number.

    InputError: no such file, no usable row, rows out of order or twice, a sampled target, two tokenizers.
    """
    traces: list[Trace] = []
    bad: list[BadLine] = []
    for number, line in _lines(path):
        try:
            trace = _trace(line, vocabulary, end_token)
        except InputError as error:
            bad.append(BadLine(str(path), number, str(error)))
            if len(bad) > MOST_BAD:
                raise InputError(
                    f"{path}: more than {MOST_BAD:,} lines cannot be used; line {bad[0].line}: {bad[0].reason}"
                ) from error
            continue
        if trace.do_sample or trace.temperature > 0.0:
            raise InputError(
                f"{path}, line {number}: the target was sampled (temperature {trace.temperature:g}); exact replay "
                "needs greedy outputs. Record them with do_sample=False."
            )
        if traces and trace.row == traces[-1].row:
            raise InputError(f"{path}, line {number}: row {trace.row} is there twice; keep one of them.")
        if traces and trace.row < traces[-1].row:
            raise InputError(
                f"{path}, line {number}: row {trace.row} comes behind row {traces[-1].row}; sort the lines by row, "
                "since a window may only learn from those before it."
            )
        traces.append(trace)
    if not traces:
        why = f"; line {bad[0].line}: {bad[0].reason}" if bad else ""
        raise InputError(f"{path} has no row that can be replayed{why}.")
    if (doubt := tokenizer_conflict(traces)) is not None:
        raise InputError(f"{path}: {doubt}")
    cut_off = sum(trace.target_tokens[-1] != end_token for trace in traces)
    return TraceFile(path, tuple(traces), tuple(bad), cut_off)


def read_timing(path: Path) -> Timing:
    """Return the times of a `--timing FILE`: an object with fields of `Timing`. InputError: anything else."""
    try:
        return Timing.model_validate(parse_json(path.read_bytes()))
    except OSError as error:
        raise InputError(f"--timing {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        why = _first_problem(error) if isinstance(error, ValidationError) else error
        raise InputError(
            f"--timing {path}: {why}. It needs target_prefill and target_per_token, and may have "
            "draft_vision, draft_prefill, draft_per_token, verify by γ, and drafting by drafter, all in milliseconds."
        ) from error


def tokenizer_conflict(traces: list[Trace]) -> str | None:
    """Return the reason why the two models cannot share a tokenizer, or None where the texts do not show it.

    Equal texts must have equal tokens (but for an end token), and outputs that begin with the same word must begin
    with the same token, in some row at least: a word can be the start of a longer one.
    """
    firsts: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
    whole: dict[str, list[int]] = {}
    for trace in traces:
        sides = ((trace.draft_text, trace.draft_tokens), (trace.target_text, trace.target_tokens))
        for side, (text, tokens) in enumerate(sides):
            begins = FIRST_WORD.match(text or "")
            if begins and tokens:
                firsts[side].setdefault(begins[0], set()).add(tokens[0])
            if side == 0 and text:
                whole[text] = tokens
    for trace in traces:
        drafted = whole.get(trace.target_text or "")
        if drafted and any(a != b for a, b in zip(drafted, trace.target_tokens, strict=False)):
            return (
                f"row {trace.row}: both models gave the same text in different tokens, so their tokenizers differ "
                "and no token can be accepted as it is. Encode the draft's text with the target's tokenizer."
            )
    for word in firsts[0].keys() & firsts[1].keys():
        if not firsts[0][word] & firsts[1][word]:
            return (
                f"'{word}' at the start is token {min(firsts[0][word])} in the drafts and {min(firsts[1][word])} in "
                "the targets, so the tokenizers differ. Encode the draft's text with the target's tokenizer."
            )
    return None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Name a .jsonl file of traces.") from error


def _trace(line: bytes, vocabulary: int, end_token: int) -> Trace:
    """InputError: the reason why the line is rejected."""
    try:
        values: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"cut short, or not JSON ({error})") from error
    try:
        trace = Trace.model_validate(values)
    except ValidationError as error:
        raise InputError(_first_problem(error)) from error
    if not trace.target_tokens:
        raise InputError("the target's output is empty: there is nothing to verify")
    for side, tokens in (("draft", trace.draft_tokens), ("target", trace.target_tokens)):
        if tokens and max(tokens) >= vocabulary:
            raise InputError(
                f"{side}_tokens has token {max(tokens)}, outside --vocabulary ({vocabulary:,}); is it another "
                "tokenizer?"
            )
        if end_token in tokens[:-1]:
            raise InputError(f"{side}_tokens has tokens after the end token {end_token}")
    return trace


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the line"
    return f"{place}: {first['msg'].lower()}"
