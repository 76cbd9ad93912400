"""Fixtures of the integration tests."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_app.runs.run_dir import RunDir
from ray_app.store.filesystem import RemoteDir


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], RunDir]:
    """Another process's copy of a run at a URI: of a folder, by pyarrow, where many requests take little time."""

    def make(uri: str) -> RunDir:
        uri = uri if ":" in uri else f"file://{tmp_path}/there/{uri}"
        return RunDir(Path(tempfile.mkdtemp(dir=tmp_path)), RemoteDir(uri, 1.0))

    return make
