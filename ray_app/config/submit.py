"""Settings of `submit`, `jobs` and `doctor`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ray_app.config.base import ClusterFlags, Config
from ray_app.errors import ConfigError


class JobsConfig(Config):
    """The jobs of a cluster."""

    address: str | None = None
    """Dashboard of the cluster, http://host:8265; default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."""


class JobConfig(JobsConfig):
    """Ask a job to end: training saves first."""

    job: str
    """Name of the job, as `ray-app jobs list` shows it."""


class JobLogsConfig(JobConfig):
    """Follow a job's log to its end, whatever happens to the connection. Exit code: the job's own."""

    follow: bool = True
    """Wait for the end; otherwise only what there is."""


class JobFetchConfig(JobConfig):
    """A job's log and the --json object of its command, as the files JOB.log and JOB.json."""

    to: Path
    """Folder for them."""


class SubmitConfig(JobsConfig):
    """Run a command as a job on a cluster, follow its log, end with its exit code.

    For instance: ray-app submit --env MLFLOW_TRACKING_URI -- train --store s3://my-bucket/stores/dsec --out s3://my-bucket/runs/dsec
    """

    command: tuple[str, ...] = ()
    """The command and its flags, after `--`. Its paths are the cluster's."""
    working_dir: Path = Path()
    """Folder that travels with the job: its code and settings, without what git ignores."""
    max_upload_mib: float = Field(default=5.0, gt=0.0)
    """Largest size of that folder: data does not travel with a job."""
    env: tuple[str, ...] = ()
    """Names of variables that the job gets from here. Not for secrets: the dashboard shows them."""
    requirements: Path | None = None
    """Requirements to install for this job, such as constraints.txt; default: the cluster has them installed."""
    python: str = "python"
    """Python of the cluster's head."""
    detach: bool = False
    """Only submit; `ray-app jobs logs` follows."""

    @model_validator(mode="after")
    def _has_command(self) -> Self:
        if not self.command:
            raise ConfigError("submit needs a command after `--`, such as: ray-app submit -- doctor")
        return self


class DoctorConfig(ClusterFlags):
    """What this machine or cluster lacks. Exit code 1 where there is a problem."""

    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    fix: bool = False
    """Take the key to Ray's clusters out of reach of others (mode 0600)."""
