"""Settings of what stands around trainings: `tune`, `sync`, `import-checkpoint`, `quickstart`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config, Positive, StorePlace, Strategy, TrackingFlags, require_one


class TuneConfig(ClusterFlags, TrackingFlags):
    """Search for the best adapter. A YAML file is the whole sweep; flags here override its lines of the same name.

    Or, instead of a file: --resume SWEEP goes on with a sweep, --watch SWEEP shows one as it goes.
    """

    file: Path | None = None
    """YAML file of the sweep; tune_configs/ holds examples."""
    resume: StorePlace | None = None
    """Go on with the sweep in this folder, or at this URI: what is finished is not run again, what is not goes on."""
    watch: StorePlace | None = None
    """Show the sweep in this folder, or at this URI, live, until it ends; a finished one at once."""
    store: StorePlace | None = None
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: StorePlace | None = None
    """Folder of the sweep, on a disk that all nodes see, or a URI such as s3://bucket/sweep; must be new or empty."""
    use_gpu: bool = False
    """One GPU for each worker of a trial, whatever the file says."""
    max_trials: Positive | None = None
    """Most trials."""
    max_hours: float | None = Field(default=None, gt=0.0)
    """Most hours of search, all starts together; what has not ended then can go on later."""
    max_gpu_hours: float | None = Field(default=None, gt=0.0)
    """Most GPU hours of search, all trials together."""
    final: bool = True
    """Train the best setting once more with several seeds on training and validation parts, and judge it on the
    test part."""
    promote: bool = False
    """Promote the first of these at the end; otherwise the command for it is printed."""
    yes: bool = False
    """Go on without a question where the estimate is above a limit."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        require_one(
            {"FILE": self.file, "--resume": self.resume, "--watch": self.watch},
            "ray-app tune tune_configs/smoke.yaml",
        )
        return self


class SyncConfig(TrackingFlags):
    """Bring the tracking server to exactly what runs' event logs hold; as often as one likes."""

    runs: tuple[StorePlace, ...]
    """Runs: folders, or URIs such as s3://bucket/run."""


class ImportCheckpointConfig(Config):
    """A checkpoint of the reference project (.pt) as a checkpoint folder; its pickle is read, never run."""

    file: Path
    """Checkpoint of the reference: torch.save of config and model_state_dict."""
    out: Path
    """Folder of the new checkpoint; must be new."""


class QuickstartConfig(TrackingFlags):
    """Scenes, training, evaluation and promotion, small, on this machine."""

    out: Path = Path("quickstart")
    """Folder for the store, the run and the report."""
    num_pairs: Positive = 480
    """Rendered pairs."""
    num_sequences: Positive = 40
    """Rendered drives."""
    strategy: Strategy = "conv"
    """Adapter; the reference's is lightweight."""
    num_epochs: Positive = 12
    """Training epochs."""
    hidden_dim: Positive | None = None
    """Width of the hidden layers, channels of conv; default: the strategy's own."""
    seed: int = 0
    """Seed of everything."""
