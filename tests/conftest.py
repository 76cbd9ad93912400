"""Shared fixtures: one Ray cluster a session, small stores, the shared recordings where they are present."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read by Ray when it is imported: no token file in the home folder, no telemetry, quick health checks, an early
# end where data starves.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S="60",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings beside the checkout; not part of the project."""
    if not (SHARED / "data" / "MANIFEST.md").is_file():
        pytest.skip("the shared recordings (../shared/data) are not on this machine")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The reference's document and result files."""
    if not (SHARED / "reference").is_dir():
        pytest.skip("the reference files (../shared/reference) are not on this machine")
    return SHARED / "reference"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster of 2 CPUs for the whole session."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
