"""Shared fixtures: one Ray cluster and one S3 server a session, small stores, real recordings where there are any."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray_app.cluster.env_defaults import set_defaults

if TYPE_CHECKING:
    from dsec_writer import DsecFiles
    from s3_process import S3

# Read by Ray when it is imported: no token file in the home folder, no telemetry, quick health checks, an
# early end where data starves. The keys are those of the tests' own S3 server.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S="60",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    MLFLOW_HTTP_REQUEST_TIMEOUT="2",
    MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)
set_defaults()
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Processes that tests start find the helpers and this checkout, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests" / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests/e2e as slow."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "e2e"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings next to the checkout; not part of the project."""
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
def s3(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3]":
    """A real S3 server (moto's) on this machine with an empty bucket `bucket`."""
    from s3_process import S3

    server = S3(tmp_path_factory.mktemp("s3"))
    server.make_bucket("bucket")
    yield server
    server.close()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pair store of 6 drives x 12 windows of 1 s, 3 x 16 x 16 pixels. Shared: copy it before changing it."""
    from numpy_source import NumpySource, build_store

    return build_store(NumpySource(), tmp_path_factory.mktemp("store") / "small")


@pytest.fixture(scope="session")
def two_seconds(tmp_path_factory: pytest.TempPathFactory) -> "DsecFiles":
    """A DSEC drive of 41 images over 2 s. Shared: copy it before changing it."""
    from dsec_drives import write_small

    return write_small(tmp_path_factory.mktemp("dsec"))


@pytest.fixture
def own(two_seconds: "DsecFiles", tmp_path: Path) -> "DsecFiles":
    """A copy of it to damage."""
    shutil.copytree(two_seconds.root, tmp_path / "dsec")
    return replace(two_seconds, root=tmp_path / "dsec")
