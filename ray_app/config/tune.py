"""Settings of `tune`, `sync`, `import-checkpoint` and `quickstart`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config, Positive, StorePlace, Strategy, TrackingFlags, require_one


class TuneConfig(ClusterFlags, TrackingFlags):
    """Search for the best adapter. A YAML file is the whole sweep; flags here override its lines of the same name.

    Instead of a file: --resume SWEEP resumes a sweep, --watch SWEEP shows one live.
    """

    file: Path | None = None
    """YAML file of the sweep; tune_configs/ holds examples."""
    resume: StorePlace | None = None
    """Resume the sweep in this folder, or at this URI; finished trials are not run again."""
    watch: StorePlace | None = None
    """Show the sweep in this folder, or at this URI, live, until it ends."""
    store: StorePlace | None = None
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: StorePlace | None = None
    """Folder of the sweep, on a disk of all nodes, or a URI such as s3://bucket/sweep; must be new or empty."""
    use_gpu: bool = False
    """One GPU for each worker of a trial."""
    max_trials: Positive | None = None
    """Most trials."""
    max_hours: float | None = Field(default=None, gt=0.0)
    """Most hours of search, all starts together; trials that have not ended then can be resumed."""
    max_gpu_hours: float | None = Field(default=None, gt=0.0)
    """Most GPU hours of search, all trials together."""
    final: bool = True
    """Train the best setting with several seeds on all but the test part, and evaluate it on the test part."""
    promote: bool = False
    """Promote the first seed at the end; otherwise the command for it is printed."""
    yes: bool = False
    """Start without a question if the estimate is above a limit."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        require_one(
            {"FILE": self.file, "--resume": self.resume, "--watch": self.watch},
            "ray-app tune tune_configs/smoke.yaml",
        )
        return self


class SyncConfig(TrackingFlags):
    """Send what runs' event logs have to the tracking server; may be repeated."""

    runs: tuple[StorePlace, ...]
    """Runs: folders, or URIs such as s3://bucket/run."""


class ImportCheckpointConfig(Config):
    """Convert a checkpoint of the reference project (.pt) to a checkpoint folder; its pickle is parsed, never run."""

    file: Path
    """Checkpoint of the reference: torch.save of config and model_state_dict."""
    out: Path
    """Folder of the new checkpoint; must be new."""


class QuickstartConfig(TrackingFlags):
    """Run scenes, training, evaluation and promotion on this machine, small."""

    out: Path = Path("quickstart")
    """Folder for the store, the run and the report."""
    num_pairs: Positive = 480
    """Rendered pairs."""
    num_sequences: Positive = 40
    """Rendered drives."""
    strategy: Strategy = "conv"
    """Strategy of the adapter; the reference's is lightweight."""
    num_epochs: Positive = 12
    """Training epochs."""
    hidden_dim: Positive | None = None
    """Width of the hidden layers, channels of conv; default: the strategy's own."""
    seed: int = 0
    """Seed of everything."""
