"""Arrays on disk come back as they were, and their files go with them."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_app.errors import ResourceError
from ray_app.sources.davis import spool
from ray_app.sources.davis.spool import Spool


def test_arrays_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "FILE_BYTES", 500)
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 200, shape).astype(dtype)
        for shape in ((0,), (7,), (5, 3), (2, 3, 4), (100,))
        for dtype in (np.uint8, np.uint16, np.int64)
    ]
    arrays.append(rng.integers(0, 9, (6, 8))[::2, 1::3])  # a view with gaps
    one = Spool()
    kept = [one.put(array) for array in arrays]
    assert len({id(each.held) for each in kept}) > 2
    for array, each in zip(arrays, kept, strict=True):
        assert each.read().dtype == array.dtype
        assert np.array_equal(each.read(), array)


def test_a_file_has_no_name_and_is_gone_with_the_last_of_its_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "FILE_BYTES", 8)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = Spool()
    first, second = one.put(np.arange(2)), one.put(np.arange(2))
    assert list(tmp_path.iterdir()) == []
    descriptor, file = first.held.file.fileno(), first.held.file
    assert os.fstat(descriptor).st_size == 16
    del first
    assert file.closed
    assert second.read().tolist() == [0, 1]


def test_a_full_disk_is_named_with_the_folder_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), len(data))

        def close(self) -> None:
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(ResourceError, match=r"cannot hold a window's events: No space left on device; make room"):
        Spool().put(np.arange(3))
