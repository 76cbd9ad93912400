"""The actor of `capture`: both models on one device, and the rows of a shard.

Errors that the user can fix come back as rows: Ray Data would wrap them in an error of its own.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ray_app.config.speculative import CaptureConfig
from ray_app.errors import InputError, RayAppError
from ray_app.language_models.answers import ModelAnswer, answer, warm_up
from ray_app.language_models.kinds import load
from ray_app.language_models.loading import tokenizer_difference
from ray_app.language_models.model import LanguageModel
from ray_app.sources.base import RejectedPair
from ray_app.sources.clips import Clip, ClipWindow, clips
from ray_app.store.capture_store import SHARDS, Shard, state_key, write_shard

CapturePlan = list[tuple[str, list[ClipWindow]]]
"""Shards by name, with the windows of each."""


class CaptureActor:
    """Both models, loaded at the first shard, where an error can be given back."""

    def __init__(self, cfg: CaptureConfig, shards: CapturePlan, device: str, num_threads: int) -> None:
        self._cfg, self._shards, self._device = cfg, dict(shards), device
        self._models: tuple[LanguageModel, LanguageModel] | None = None
        torch.set_num_threads(num_threads)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            num_rows, num_verified, otherwise = self._shard(item["shard"])
        except RayAppError as error:
            return {"error": str(error), "kind": type(error).__name__, "rows": 0, "verified": [0, 0]}
        return {"error": "", "kind": "", "rows": num_rows, "verified": [num_verified, otherwise]}

    def _shard(self, name: str) -> tuple[int, int, int]:
        rows, rejected = [], []
        states: dict[str, Tensor] = {}
        num_verified = otherwise = 0
        for clip in clips(self._shards[name]):
            if isinstance(clip, RejectedPair):
                rejected.append(asdict(clip))
                continue
            drafted, spoken = self._answers(clip)
            rows.append(_row(self._cfg, clip, drafted, spoken))
            num_verified += spoken.num_verified
            otherwise += spoken.num_verified_otherwise
            if drafted.states_TD is not None and spoken.states_TD is not None:
                rows[-1]["states"] = f"{SHARDS}/{name}.safetensors"
                states[state_key(clip.source.row, "draft")] = drafted.states_TD
                states[state_key(clip.source.row, "target")] = spoken.states_TD
        write_shard(self._cfg.out, name, Shard(rows, rejected), states)
        return len(rows), num_verified, otherwise

    def _answers(self, clip: Clip) -> tuple[ModelAnswer, ModelAnswer]:
        cfg = self._cfg
        if self._models is None:
            drafter, target = (load(folder, cfg.dtype, self._device) for folder in (cfg.drafter, cfg.target))
            difference = tokenizer_difference(drafter.tokenizer, target.tokenizer)
            self._shared = difference is None
            if cfg.features and difference:
                raise InputError(
                    "--features needs a drafter and a target of one tokenizer, since states belong to single tokens: "
                    f"of {cfg.drafter} and {cfg.target}, {difference}."
                )
            warm_up(drafter, clip.frames_THWC, cfg.question, ())
            warm_up(target, clip.frames_THWC, cfg.question, cfg.verify)
            self._models = drafter, target
        drafter, target = self._models
        how: dict[str, Any] = {"max_new_tokens": cfg.max_new_tokens, "with_states": cfg.features}
        drafted = answer(drafter, clip.frames_THWC, cfg.question, **how)
        if not self._shared:
            ended = drafted.tokens[-1:] == [drafter.tokenizer.eos_token_id]
            again = target.tokenizer(drafted.text, add_special_tokens=False)["input_ids"]
            drafted = replace(drafted, tokens=[*again, *([target.tokenizer.eos_token_id] if ended else [])])
        return drafted, answer(target, clip.frames_THWC, cfg.question, verify=cfg.verify, **how)


def _row(cfg: CaptureConfig, clip: Clip, drafted: ModelAnswer, spoken: ModelAnswer) -> dict[str, Any]:
    """Return a line of traces, but for its states."""
    source = clip.source
    row: dict[str, Any] = {
        "row": source.row,
        "sequence": source.sequence,
        "t_start_us": source.window.t_start_us,
        "t_end_us": source.window.t_end_us,
        "duration": cfg.duration,
        "question": cfg.question,
        "draft_tokens": drafted.tokens,
        "target_tokens": spoken.tokens,
        "draft_text": drafted.text,
        "target_text": spoken.text,
        "do_sample": False,
    }
    if spoken.step_ms is not None:  # an answer of one token has no steps
        times = {
            "draft_prefill": drafted.prefill_ms,
            "draft_per_token": drafted.step_ms,
            "target_prefill": spoken.prefill_ms,
            "target_per_token": spoken.step_ms,
        }
        row["timing_ms"] = {
            **{stage: round(ms, 3) for stage, ms in times.items() if ms is not None},
            "verify": {str(gamma): round(ms, 3) for gamma, ms in spoken.verify_ms.items()},
        }
    return row
