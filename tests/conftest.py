"""Shared fixtures: one Ray cluster a session, small stores, the shared recordings where they are present."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_app.jobs.environment import set_defaults

# Read by Ray when it is imported: no token file in the home folder, no telemetry, quick health checks, an
# early end where data starves.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S="60",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    MLFLOW_HTTP_REQUEST_TIMEOUT="2",
    MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
)
set_defaults()
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
if str(ROOT) not in sys.path:  # serve/ is no part of the installed package
    sys.path.insert(0, str(ROOT))


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
    import numpy_source
    import ray

    ray.cloudpickle.register_pickle_by_value(numpy_source)  # workers do not find modules of this folder
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pair store of 6 drives x 12 windows of 1 s, 3 x 16 x 16 pixels. Shared: copy it before changing it."""
    from numpy_source import NumpySource, build_store

    return build_store(NumpySource(), tmp_path_factory.mktemp("store") / "small")
