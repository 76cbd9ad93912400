"""Settings of `capture`, `replay` and `correlate`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ray_app.config.base import ClusterFlags, Positive


class CaptureConfig(ClusterFlags):
    """Outputs of live models on one's own videos, as traces for `replay`, with the time of each stage.

    Greedy decoding; weights are safetensors in local folders. The same command again goes on where it was cut off.
    """

    clips: tuple[Path, ...]
    """Video files, or folders of numbered frames with --fps."""
    target: Path
    """Folder of the target, a VideoLlavaForConditionalGeneration."""
    drafter: Path
    """Folder of the drafter: Video-LLaVA, or any causal language model (which sees the question alone)."""
    out: Path
    """Folder for traces.jsonl; must be new, empty, or a capture of the same settings."""
    question: str = "What are the key elements in this scene?"
    """What both models are asked about every window."""
    duration: str = "1s"
    """Window length."""
    step: str | None = None
    """Distance between window starts; default: half the duration."""
    fps: float | None = Field(default=None, gt=0.0)
    """Frames per second of folders; of files, where it is to replace their own times."""
    num_frames: Annotated[int, Field(ge=1, le=64)] = 8
    """Frames of a window that the models see, evenly spread."""
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    """Length limit of an answer, the end token included."""
    verify: tuple[Positive, ...] = (4, 8, 16, 24)
    """Draft lengths for which a target pass over that many drafted tokens is timed, in answers that are longer."""
    features: bool = False
    """Keep both models' last hidden state for every token, bfloat16: what a token was chosen from."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights in memory; auto: as saved."""
    use_gpu: bool = False
    """One replica of both models on each GPU; else one on the CPUs."""
    num_workers: int = Field(default=0, ge=0)
    """Replicas; 0: one for each GPU, without --use-gpu one in all."""


class ReplayConfig(ClusterFlags):
    """Token acceptance of drafters on recorded greedy outputs, replayed exactly: no model, no GPU."""

    traces: tuple[Path, ...]
    """Trace files (.jsonl), each one stretch of windows in order of time."""
    drafter: tuple[str, ...] = ("eventgpt", "ngram", "prompt_lookup", "retrieval", "hybrid")
    """Drafters: none, eventgpt, ngram, prompt_lookup, retrieval, hybrid; for traces captured with --features also
    hidden_state and adapter. The baselines constant, positional and previous_window run beside them in any case."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=256)] = 8
    """Tokens drafted for each target pass."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of a file, each replayed by drafters that learnt from the others: whole sequences where all rows name
    theirs, else contiguous stretches."""
    fold_gap: int = Field(default=20, ge=0)
    """Rows on either side of a stretch that are not learnt from: windows overlap."""
    adapter: Path | None = None
    """Checkpoint that carries the drafter's states into the target's space, for the drafter `adapter`."""
    timing: Path | None = None
    """JSON file of measured milliseconds for every row, instead of the traces' own timing_ms."""
    draft_device: Literal["same", "separate"] = "same"
    """EventGPT runs on the target's device before its prefill, or on a second one during it."""
    html: Path | None = None
    """Write the numbers with plots to this HTML file."""
    vocabulary: Positive = 32_000
    """Tokens of the shared tokenizer."""
    start_token: int = 1
    """Its start token."""
    end_token: int = 2
    """Its end token."""


class CorrelateConfig(ClusterFlags):
    """Proxy against truth: what cosine acceptance predicts about token acceptance, on captured traces with states.

    Every adapter is judged beside the raw states (where widths allow) and the mean target state, a constant.
    """

    traces: tuple[Path, ...]
    """traces.jsonl files of `ray-app capture --features`."""
    adapter: tuple[Path, ...] = ()
    """Checkpoints that carry the drafter's states into the target's space; three or more give a rank correlation."""
    out: Path
    """Folder for correlation.json and correlation.html; files of these names are replaced."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of a file, as in `replay`; tokens of each are looked up among the states of the others."""
    fold_gap: int = Field(default=20, ge=0)
    """Rows on either side of a stretch that are not looked up."""
    vocabulary: Positive = 32_000
    """Tokens of the shared tokenizer."""
    end_token: int = 2
    """Its end token."""
