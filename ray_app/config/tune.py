"""Settings of `tune`, `sync`, `import-checkpoint` and `quickstart`."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config, Positive, SplitFlags, StorePlace, Strategy, TrackingFlags
from ray_app.config.train import DRAFTING, TrainConfig, settings_of
from ray_app.errors import ConfigError

TOKENS = "tokens_per_target_pass"
"""Objective of drafters."""


class TuneConfig(SplitFlags, ClusterFlags, TrackingFlags):
    """Search for the best adapter. The sweep is a YAML file; flags override its lines of the same name.

    Instead of a file: --resume SWEEP resumes a sweep, --watch SWEEP shows one live.
    """

    store: StorePlace = ""
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    out: StorePlace = ""
    """Folder of the sweep, on a disk of all nodes, or a URI such as s3://bucket/sweep; must be new or empty."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of `train` that all trials share; with a strategy of drafters those of their training."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Settings of `train` that are searched."""
    resume: StorePlace | None = None
    """Resume the sweep in this folder, or at this URI; finished trials are not run again. It gives all settings; of
    these the budget alone may be changed."""
    watch: StorePlace | None = None
    """Show the sweep in this folder, or at this URI, live, until it ends."""
    objective: Literal["cosine_accept_rate_0.80", "lift", "tokens_per_target_pass"] = "cosine_accept_rate_0.80"
    """Metric to maximise: on the validation part, at a trial's best checkpoint (lowest validation loss). Of equal
    trials the one with fewer parameters wins. tokens_per_target_pass is for drafters."""
    secondary_objective: Literal["parameters", "latency_ms"] | None = None
    """Second objective, to minimise: the result is then a Pareto front, and optuna searches for both."""
    search_alg: Literal["grid", "random", "optuna"] = "optuna"
    """grid: every combination of choices. optuna: a tree-structured Parzen estimator."""
    scheduler: Literal["none", "asha"] = "asha"
    """asha stops trials that fall behind."""
    grace_period: Positive = 1
    """Epochs before asha may stop a trial."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """asha lets one trial in so many continue at each rung."""
    max_trials: Positive = 16
    """Most trials."""
    max_hours: float | None = Field(default=None, gt=0.0)
    """Most hours of search, all starts together; trials that have not ended then can be resumed."""
    max_gpu_hours: float | None = Field(default=None, gt=0.0)
    """Most GPU hours of search, all trials together, counted at each epoch."""
    max_concurrent_trials: int = Field(default=0, ge=0)
    """Most trials at a time; 0: as many as the cluster has room for."""
    num_workers: Positive = 1
    """Workers of one trial. One runs in the trial's own process, several are a Ray Train group."""
    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    """CPUs of each worker."""
    use_gpu: bool = False
    """One GPU for each worker of a trial."""
    num_to_keep: int = Field(default=5, ge=0)
    """Number of best trials whose weights are kept; of the others only the event log is. 0: all are kept."""
    num_final_seeds: Positive = 3
    """Number of seeds of the final training."""
    final_workers: Positive = 1
    """Data-parallel workers of the final training."""
    seed: int = 0
    """Seed of the search and of the trials."""
    final: bool = True
    """Train the best setting with several seeds on all but the test part, and evaluate it on the test part."""
    test_store: StorePlace | None = None
    """For drafters: pair store of other drives, all of which are the test part; default: the test part of store."""
    yes: bool = False
    """Start without a question if the estimate is above a limit."""

    @model_validator(mode="after")
    def _is_a_sweep(self) -> Self:
        if not (self.store or self.out or self.space):
            raise ConfigError(
                "tune takes a sweep: ray-app tune tune_configs/smoke.yaml starts one, --resume SWEEP resumes one, "
                "--watch SWEEP shows one"
            )
        for name, example in (("store", "stores/scenes"), ("out", "sweeps/first")):
            if not getattr(self, name):
                raise ConfigError(f"the sweep names no {name}; add `{name}: {example}` to it, or --{name} {example}")
        strategy = self.base.get("strategy")
        if (strategy in DRAFTING) != self.drafting:
            raise ConfigError(
                f"trials of {strategy} are compared by what they draft; set `objective: {TOKENS}`"
                if strategy in DRAFTING
                else f"{TOKENS} needs a drafter's distributions, and {strategy or 'the default strategy'} has none; "
                f"name one of {', '.join(DRAFTING)} as `strategy` under `base`"
            )
        if self.drafting and self.secondary_objective == "latency_ms":
            raise ConfigError("latency_ms is that of an adapter, not of a drafter; `decode` measures drafters live")
        if self.test_store and not self.drafting:
            raise ConfigError("test_store is for drafters; other trials are tested on the test part of the store")
        return self

    @property
    def drafting(self) -> bool:
        """True if trials are compared by tokens per target pass."""
        return self.objective == TOKENS

    @property
    def train_settings(self) -> type[TrainConfig]:
        """Settings that a trial is trained with."""
        return settings_of(self.base.get("strategy"))

    @property
    def num_epochs(self) -> int:
        """Most epochs of a trial."""
        return int(self.base.get("num_epochs", TrainConfig.model_fields["num_epochs"].default))


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
