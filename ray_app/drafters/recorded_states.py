"""Recorded answers with the states that `capture` kept with them, for replay and correlation."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_app.core.speculative.prompts import AnsweredPrompt, States
from ray_app.errors import CheckpointError, InputError
from ray_app.store.capture_store import ModelSide, StateReader
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.traces import Trace, TraceFile, read_traces


def read_files(paths: Sequence[Path], vocabulary: int, end_token: int) -> list[TraceFile]:
    """Read every file; rejected lines are printed on standard error. InputError as `read_traces`."""
    files = [read_traces(path, vocabulary, end_token) for path in paths]
    for line in damaged_lines(files):
        print(f"rejected: {line}", file=sys.stderr)
    return files


def damaged_lines(files: Sequence[TraceFile]) -> list[str]:
    """File, line and reason of each line that cannot be used."""
    return [f"{bad.file}, line {bad.line}: {bad.reason}" for file in files for bad in file.rejected]


def require_states(file: TraceFile, wanted_by: str) -> None:
    """InputError unless every row of the file has states."""
    lacking = [trace.row for trace in file.traces if trace.states is None]
    if lacking:
        raise InputError(
            f"{wanted_by} needs both models' states, and {len(lacking):,} of {len(file.traces):,} rows of "
            f"{file.path} have none (row {lacking[0]} is the first). Capture them: ray-app capture … --features."
        )


def answers(file: TraceFile) -> list[AnsweredPrompt]:
    """Prompts and answers without states."""
    return [AnsweredPrompt(trace.prompt, tuple(trace.target_tokens)) for trace in file.traces]


def answers_with_states(file: TraceFile, adapter: Path | None) -> list[AnsweredPrompt]:
    """Return the same with both models' states, and aligned ones where an adapter's checkpoint is named.

    InputError: states that are missing or damaged. CheckpointError: an adapter that does not fit them.
    """
    reader = StateReader(file.path)
    checkpoint = load_checkpoint(adapter) if adapter else None
    return [
        _with_states(each, trace, reader, checkpoint) for each, trace in zip(answers(file), file.traces, strict=True)
    ]


def aligned(checkpoint: Checkpoint, states_TD: States, target_width: int) -> States:
    """States of the drafter in the target's space. CheckpointError: an adapter of other widths, or of pixels."""
    features, widths = checkpoint.features, (states_TD.shape[1], target_width)
    theirs = (features.event.width, features.target.width)
    if theirs != widths or (features.event.scale, features.target.scale) != (1.0, 1.0):
        raise CheckpointError(
            f"{checkpoint.folder} carries features of width {theirs[0]} to width {theirs[1]} (scales "
            f"{features.event.scale:g}, {features.target.scale:g}); the captured states have widths {widths[0]} and "
            f"{widths[1]} and scale 1. Name an adapter that was trained on such states."
        )
    with torch.inference_mode():
        return checkpoint.adapter(torch.from_numpy(states_TD)).numpy()


def bootstrap_blocks(files: Sequence[TraceFile], block_rows: int) -> list[list[int]]:
    """Return the block number of each file's rows: their sequence where there are several, else neighbouring rows."""
    numbers: dict[tuple[int, str | int], int] = {}
    several = len({trace.sequence for file in files for trace in file.traces}) > 1
    return [
        [
            numbers.setdefault((n, (several and trace.sequence) or place // block_rows), len(numbers))
            for place, trace in enumerate(file.traces)
        ]
        for n, file in enumerate(files)
    ]


def _with_states(
    each: AnsweredPrompt, trace: Trace, reader: StateReader, checkpoint: Checkpoint | None
) -> AnsweredPrompt:
    assert trace.states is not None, "require_states comes first"

    def read(side: ModelSide, tokens: Sequence[int]) -> States:
        state_TD: Tensor = reader.read(trace.states or "", trace.row, side, len(tokens))
        return np.asarray(state_TD.numpy(), np.float32)

    event_TD, target_TD = read("draft", trace.draft_tokens), read("target", trace.target_tokens)
    aligned_TD = aligned(checkpoint, event_TD, target_TD.shape[1]) if checkpoint else None
    prompt = replace(each.prompt, event_states=event_TD, aligned_states=aligned_TD)
    return replace(each, prompt=prompt, target_states=target_TD)
