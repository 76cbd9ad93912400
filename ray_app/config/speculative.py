"""Settings of `capture`, `replay` and `correlate`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ray_app.config.base import ClusterFlags, Positive


class CaptureConfig(ClusterFlags):
    """Record outputs of live models on your own videos, as traces for `replay`, with the time of each stage.

    Greedy decoding; weights are safetensors in local folders. Repeat the command to continue an interrupted capture.
    """

    clips: tuple[Path, ...]
    """Video files, or folders of numbered frames with --fps."""
    target: Path
    """Folder of the target, a VideoLlavaForConditionalGeneration."""
    drafter: Path
    """Folder of the drafter: Video-LLaVA, or any causal language model (which sees only the question)."""
    out: Path
    """Folder for traces.jsonl; must be new, empty, or a capture of the same settings."""
    question: str = "What are the key elements in this scene?"
    """Question about every window, for both models."""
    duration: str = "1s"
    """Window length."""
    step: str | None = None
    """Distance between window starts; default: half the duration."""
    fps: float | None = Field(default=None, ge=0.001, le=100_000.0)
    """Frames per second: required for folders of frames, replaces the times of files."""
    num_frames: Annotated[int, Field(ge=1, le=64)] = 8
    """Number of evenly spread frames of a window that the models see."""
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    """Most tokens of an answer, with the end token."""
    verify: tuple[Positive, ...] = (4, 8, 16, 24)
    """Draft lengths for which a target pass is timed, in answers that are longer."""
    features: bool = False
    """Keep both models' last hidden state of every token, in bfloat16."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights in memory; auto keeps the saved one."""
    use_gpu: bool = False
    """Run a replica of both models on each GPU instead of one on the CPUs."""
    num_workers: int = Field(default=0, ge=0)
    """Number of replicas; 0 means one for each GPU, or one without --use-gpu."""


class ReplayConfig(ClusterFlags):
    """Measure token acceptance of drafters by exact replay of recorded greedy outputs; no model, no GPU."""

    traces: tuple[Path, ...]
    """Trace files (.jsonl), each with windows in order of time."""
    drafter: tuple[str, ...] = ("eventgpt", "ngram", "prompt_lookup", "retrieval", "hybrid")
    """Drafters: none, eventgpt, ngram, prompt_lookup, retrieval, hybrid; for traces captured with --features also
    hidden_state and adapter. The baselines constant, positional and previous_window always run too."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=256)] = 8
    """Tokens drafted for each target pass (γ)."""
    folds: Annotated[int, Field(ge=1)] = 5
    """Number of parts of a file; each is replayed by drafters that learnt from the others. Parts are whole sequences
    if all rows name theirs, else contiguous stretches. 1 replays the whole file as `decode` decoded it."""
    fold_gap: int = Field(default=20, ge=0)
    """Rows on either side of a stretch that are not learnt from, because windows overlap."""
    learn_from: tuple[Path, ...] = ()
    """Traces of other drives that drafters learn from first; needs --folds 1."""
    adapter: Path | None = None
    """Checkpoint that carries the drafter's states into the target's space, for the drafter `adapter`."""
    timing: Path | None = None
    """JSON file of measured milliseconds for every row, instead of the traces' own timing_ms."""
    draft_device: Literal["same", "separate"] = "same"
    """Device of EventGPT: same runs it before the target's prefill, separate during it."""
    html: Path | None = None
    """HTML file for the numbers and plots."""
    vocabulary: Positive = 32_000
    """Tokens of the shared tokenizer."""
    start_token: int = 1
    """Start token of that tokenizer."""
    end_token: int = 2
    """End token of that tokenizer."""


class CorrelateConfig(ClusterFlags):
    """Measure how well cosine acceptance predicts token acceptance, on captured traces with states.

    Every adapter is compared with the raw states (where widths allow) and with the mean target state, a constant.
    """

    traces: tuple[Path, ...]
    """traces.jsonl files of `ray-app capture --features`."""
    adapter: tuple[Path, ...] = ()
    """Checkpoints that carry the drafter's states into the target's space; three or more give a rank correlation."""
    out: Path
    """Folder for correlation.json and correlation.html; files of these names are replaced."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of parts of a file, as in `replay`; tokens of each are looked up among the states of the others."""
    fold_gap: int = Field(default=20, ge=0)
    """Rows on either side of a stretch that are not looked up."""
    vocabulary: Positive = 32_000
    """Tokens of the shared tokenizer."""
    end_token: int = 2
    """End token of that tokenizer."""
