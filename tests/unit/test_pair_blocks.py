"""A worker reads a store by row groups and holds its columns: the right numbers, in no more memory than that."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ray_app import write_store
from ray_app.data.pair_blocks import load_pair_tensors, read_blocks
from ray_app.errors import StoreError
from ray_app.store.pair_store import ROW_GROUP, PairStore

MIB = 2**20
WIDE, MANY = 2**16, 768
"""Pairs of 96 MiB, here in files of 8 MiB."""
LOAD = """
import re, resource, sys
from pathlib import Path
import numpy as np
import torch
from ray_app.core.adapters.slices import FeatureSlice
from ray_app.data.pair_blocks import load_pair_tensors, read_blocks
from ray_app.store.pair_store import PairStore

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

store, slices, limit = PairStore.open(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rows = np.arange(len(store.index))
load_pair_tensors(read_blocks(store, rows[:1]), store, rows[:1], rows[:1])  # what is made at first use
columns = FeatureSlice(slices - 1, slices).of(store.feature("event").width)
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
before = status("VmRSS")
pairs = load_pair_tensors(read_blocks(store, rows), store, rows, rows, (columns, columns))
print(status("VmHWM") - before, pairs.event_BE.nbytes + pairs.target_BD.nbytes)
"""


def test_columns_of_some_pairs_are_those_of_whole_files(tmp_path: Path) -> None:
    """Files of several row groups; pairs of which some groups have none."""
    draw = np.random.default_rng(0)
    many = 5 * ROW_GROUP
    event, target = (draw.integers(1, 256, (many, width), np.uint8) for width in (11, 7))
    write_store(tmp_path / "store", event=event, target=target, sequence=[f"{n % 3}" for n in range(many)])
    store = PairStore.open(tmp_path / "store")
    rows = np.sort(draw.permutation(many)[:40])[::-1].copy()
    wanted = np.arange(0, 40, 3)
    expected = store.read_rows(rows[wanted])
    pairs = load_pair_tensors(read_blocks(store, rows), store, rows, wanted, (slice(2, 9), slice(4)))
    assert np.array_equal(pairs.event_BE.numpy(), expected[0][:, 2:9])
    assert np.array_equal(pairs.target_BD.numpy(), expected[1][:, :4])
    assert max(len(positions) for positions, *_ in read_blocks(store, np.arange(many))) == ROW_GROUP


def test_a_damaged_file_is_named(small_store: Path, tmp_path: Path) -> None:
    shutil.copytree(small_store, tmp_path / "store")
    store = PairStore.open(tmp_path / "store")
    path = tmp_path / "store" / store.files[1].name
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    with pytest.raises(StoreError, match=rf"{path.name} is damaged: its SHA-256"):
        list(read_blocks(store, np.arange(len(store.index))))


@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts of Linux")
def test_a_store_that_is_larger_than_the_memory_is_loaded_by_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 MiB of pairs in a process that may take 88 MiB more: whole they are refused, halves need at most 84 MiB."""
    monkeypatch.setattr("ray_app.data.array_store.PART_BYTES", 8 * MIB)
    draw = np.random.default_rng(0)
    drawn = draw.integers(1, 256, (2, 64, WIDE), np.uint8)
    event, target = (side[np.arange(MANY) % 64] for side in drawn)
    event[:, :8] = np.arange(MANY, dtype="<u8").view(np.uint8).reshape(MANY, 8)
    write_store(tmp_path / "store", event=event, target=target)

    def load(slices: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", LOAD, str(tmp_path / "store"), str(slices), str(88 * MIB)]
        one_heap = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
        one_thread = {"OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}  # a stack is 8 MiB
        environment = {**os.environ, **one_heap, **one_thread}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)

    whole, half = load(1), load(2)
    assert whole.returncode, "they do not fit"
    assert "allocate memory" in whole.stderr or "MemoryError" in whole.stderr, whole.stderr
    assert not half.returncode, half.stderr
    grown, held = map(int, half.stdout.split())
    assert held == MANY * WIDE
    assert grown < held + 36 * MIB
