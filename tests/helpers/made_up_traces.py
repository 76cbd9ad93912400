"""Made-up traces: a drive whose answers change slowly, with an EventGPT that says something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TIMING = {
    "draft_vision": 8.0,
    "draft_prefill": 85.0,
    "draft_per_token": 10.0,
    "target_prefill": 320.0,
    "target_per_token": 14.5,
}
LENGTH = 20
"""Tokens of an answer, the end token included."""


def rows(num_rows: int = 60, seed: int = 0, *, timed: bool = True) -> list[dict[str, Any]]:
    """Answers over tokens 10 to 29: every sixth row one word of the answer changes for good."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(10, 30, LENGTH - 1)
    made = []
    for row in range(num_rows):
        if row % 6 == 5:
            answer[rng.integers(LENGTH - 1)] = rng.integers(10, 30)
        trace = {
            "row": row,
            "duration": "1s",
            "question": "what is there?",
            "draft_tokens": [*rng.integers(30, 40, 8).tolist(), 2],
            "target_tokens": [*answer.tolist(), 2],
        }
        made.append({**trace, "timing_ms": TIMING} if timed else trace)
    return made


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
