"""Settings of `submit`, `jobs` and `doctor`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config
from ray_app.errors import ConfigError


class JobsConfig(Config):
    """List the jobs of a cluster."""

    address: str | None = None
    """Dashboard of the cluster, http://host:8265; default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."""


class JobConfig(JobsConfig):
    """Ask a job to stop; training saves first."""

    job: str
    """Name of the job, as `ray-app jobs list` shows it."""


class JobLogsConfig(JobConfig):
    """Follow a job's log to its end, across lost connections. Exit code: the job's own."""

    follow: bool = True
    """Wait for the end; --no-follow prints the log so far."""


class JobFetchConfig(JobConfig):
    """Save a job's log and the --json object of its command, as JOB.log and JOB.json."""

    to: Path
    """Folder for the two files."""


class SubmitConfig(JobsConfig):
    """Run a command as a job on a cluster, follow its log and return its exit code.

    For instance: ray-app submit --env MLFLOW_TRACKING_URI -- train --store s3://my-bucket/stores/dsec --out s3://my-bucket/runs/dsec
    """

    command: tuple[str, ...] = ()
    """Command with its flags, after `--`; its paths are those of the cluster."""
    working_dir: Path = Path()
    """Folder that is uploaded with the job: its code and settings, without files that git ignores, and without
    stores, runs, sweeps, checkpoints and reports."""
    max_upload_mib: float = Field(default=2.0, gt=0.0)
    """Largest size of what is uploaded, compressed; data is not uploaded with a job."""
    env: tuple[str, ...] = ()
    """Names of variables to pass to the job. Not for secrets: the dashboard shows them."""
    requirements: Path | None = None
    """Requirements file to install for this job, such as constraints.txt; default: none, the cluster has them."""
    python: str = "python"
    """Python of the cluster's head."""
    detach: bool = False
    """Submit without following the log; `ray-app jobs logs` follows it."""

    @model_validator(mode="after")
    def _has_command(self) -> Self:
        if not self.command:
            raise ConfigError("submit needs a command after `--`, such as: ray-app submit -- doctor")
        return self


class DoctorConfig(ClusterFlags):
    """Check what this machine or cluster lacks. Exit code 1 if there is a problem."""

    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    fix: bool = False
    """Make the key to Ray's clusters readable by its owner alone (mode 0600)."""
