"""Settings of `evaluate`, `compare`, `benchmark` and `promote`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Positive, SplitFlags, StorePlace, TrackingFlags, require_one
from ray_app.errors import ConfigError


class EvaluationFlags(SplitFlags, ClusterFlags, TrackingFlags):
    """Flags of every command that evaluates a checkpoint."""

    batch_size: Positive = 32
    """Pairs per forward pass."""
    use_gpu: bool = False
    """Evaluate on a GPU."""


class ReportFlags(EvaluationFlags):
    """Flags of `evaluate` and `benchmark`."""

    store: StorePlace
    """Pair store: a folder, or a URI such as s3://bucket/store."""
    checkpoint: str
    """Checkpoint or run (its best checkpoint), each a folder or a URI such as s3://bucket/run; or
    models:/alignment-adapter@champion."""
    out: Path
    """Folder for alignment_metrics_<S>.json and report.html; files of these names are replaced."""


class EvaluateConfig(ReportFlags):
    """Alignment metrics of a checkpoint on the test part, next to every baseline, and report.html."""

    token_report: Path | None = None
    """HTML page of `ray-app correlate` (what cosine acceptance predicts about tokens), linked from report.html."""


class CompareConfig(EvaluationFlags):
    """Several checkpoints on the same test pairs: acceptance, size, latency and pictures side by side.

    Or several runs of `decode` on the same rows: every drafter next to the baselines of drafting.
    """

    checkpoints: tuple[str, ...]
    """Checkpoints or runs (their best checkpoints), each a folder or a URI such as s3://bucket/run; or
    models:/NAME@ALIAS. Or folders that `decode` wrote."""
    out: Path
    """Folder for comparison.json and comparison.html; files of these names are replaced."""
    store: StorePlace | None = None
    """Pair store: a folder, or a URI such as s3://bucket/store; required for checkpoints."""

    @property
    def needed_store(self) -> str:
        """Return the store of checkpoints. ConfigError: none is named."""
        if self.store is None:
            raise ConfigError("compare needs --store STORE, whose test pairs every checkpoint is evaluated on.")
        return self.store


class BenchmarkConfig(ReportFlags):
    """Every pair of a store through a checkpoint: benchmark_adapter_full_<S>.json with throughput."""


class PromoteConfig(EvaluationFlags):
    """Register a checkpoint and make it champion if it beats the champion and every baseline.

    A part of a drafter is compared by tokens per target pass, and its model is named after its strategy.
    Or, instead of a run: --rollback or --list.
    """

    run: str | None = None
    """Run or checkpoint: a folder, or a URI such as s3://bucket/run."""
    rollback: bool = False
    """Instead of a run: move the alias back to the champion before this one; again, one further back."""
    list: bool = False
    """Instead of a run: list the versions with their metrics, and past and present champions."""
    store: StorePlace | None = None
    """Pair store to evaluate on, a folder or a URI; default: the one the checkpoint was trained on. Of a drafter's
    part: all pairs of another store."""
    min_gain: float = Field(default=0.0, ge=0.0)
    """How much cosine_accept_rate_0.80, or a drafter's tokens per target pass, must gain over the present
    champion."""
    force: bool = False
    """Move the alias whatever the verdict; recorded."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        require_one({"RUN": self.run, "--rollback": self.rollback, "--list": self.list}, "ray-app promote runs/drive")
        if self.rollback and self.force:
            raise ConfigError("--force goes with RUN; --rollback moves the alias without a verdict.")
        return self
