"""Settings of `decode`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ray_app.config.base import ClusterFlags

Sees = Literal["events", "frames", "adapter", "constant", "other", "nothing"]
"""Pictures that a drafter is shown."""


class DecodeConfig(ClusterFlags):
    """Decode live with a drafter and without one, in turn, and measure both; the text is the target's own.

    Weights are safetensors in local folders. Repeat the command to continue an interrupted run.
    """

    source: tuple[Path, ...]
    """A file of prompts (.jsonl), a pair store of pictures, or videos or folders of frames, as in `capture`."""
    target: Path
    """Folder of the target: Video-LLaVA, LLaVA, or any causal language model (which sees no pictures)."""
    out: Path
    """Folder for the results; must be new, empty, or a run of the same settings."""
    drafter: tuple[str, ...] = ("hybrid", "previous_window")
    """Drafters, each decoded in turn with the others: those of `replay`, `early_exit`, folders of language models
    with the target's tokenizer, or a folder that `demo draft` made for the target. hybrid+FOLDER multiplies the
    probabilities of such a drafter that sees events with those that `hybrid` learns from answers."""
    drafter_sees: tuple[Sees, ...] = ()
    """Pictures for a drafting language model, a drafter for each: the row's events or frames, its events through
    --adapter, a constant, pictures of another drive, or nothing. The last three are baselines. Default: events for a
    drafter of `demo draft` that sees, else nothing. An EAGLE head reads the target's states and is shown nothing."""
    adapter: Path | None = None
    """Checkpoint of an adapter from features of event images to the drafter's image tokens, for --drafter-sees
    adapter."""
    event_encoder: Path | None = None
    """Folder of the encoder that made the event features which --adapter was trained on."""
    target_sees: Literal["frames", "nothing"] = "frames"
    """Pictures for the target."""
    learn_from: tuple[Path, ...] = ()
    """Traces of the same target from other drives, from which drafters learn before the first row."""
    exit_layers: Annotated[int, Field(ge=1)] = 2
    """Number of the target's layers that draft, for `early_exit`; it drafts tokens of --learn-from, else all."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=64)] = 8
    """Tokens drafted for each target pass (γ); with --draft-length online the most."""
    draft_length: Literal["online", "fixed"] = "online"
    """online chooses γ for each pass from measured costs and acceptance, 0 if drafts do not pay; fixed keeps it."""
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Temperature of sampling; 0 decodes greedily."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the most likely tokens of this mass."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling."""
    question: str = "What are the key elements in this scene?"
    """Question about every window; a prompt may have its own."""
    duration: str = "1s"
    """Window length; of a store, the windows to use."""
    step: str | None = None
    """Distance between window starts of videos; default: half the duration."""
    fps: float | None = Field(default=None, gt=0.0)
    """Frames per second: required for folders of frames, replaces the times of files."""
    num_frames: Annotated[int, Field(ge=1, le=64)] = 8
    """Number of evenly spread frames of a video's window."""
    max_rows: int = Field(default=0, ge=0)
    """Decode the first rows only; 0 means all."""
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    """Most tokens of an answer, with the end token."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights in memory; auto keeps the saved one."""
    use_gpu: bool = False
    """Run a replica of the models on each GPU."""
    num_workers: int = Field(default=0, ge=0)
    """Number of replicas, each with whole sequences and drafters of its own; 0 means one for each GPU, or one."""
    watch: bool = False
    """Decode in this process and show the text as it grows, accepted draft tokens in colour."""
    html: Path | None = None
    """HTML file with every row: pictures, text with accepted draft tokens, γ, and times."""
    tracking_uri: str | None = None
    """MLflow tracking URI for the metrics; default: MLFLOW_TRACKING_URI, else they are not sent."""
    experiment: str = "decoding"
    """MLflow experiment."""
