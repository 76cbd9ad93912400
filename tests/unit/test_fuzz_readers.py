"""A short run of benchmarks/data/fuzz_readers.py: spoiled files cost neither a process nor much time or memory."""

import random
import signal
import time
import warnings
from pathlib import Path

import pytest

from benchmarks.data import fuzz_readers
from benchmarks.data.fuzz_readers import KINDS, MIB, Readers, fuzz, measured
from benchmarks.data.spoiled import MAKERS
from ray_app.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_spoiled_file_of_any_kind_breaks_a_bound(kind: str) -> None:
    found = fuzz(kind, 300, seed=11)
    assert (found.findings, found.deaths) == ([], 0)
    assert found.outcomes["refused"] > 60
    assert sum(found.outcomes.values()) == 300


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_of_every_kind_are_refused_or_read(kind: str, tmp_path: Path) -> None:
    """In this process; the kinds' own processes are those of the test above."""
    readers = Readers(tmp_path)
    found = []
    for number in range(25):
        size, read = readers.prepare(kind, random.Random(f"12 {kind} {number}"))
        with warnings.catch_warnings(action="ignore"):
            found.append(measured(read, size))
    assert [one["finding"] for one in found] == [""] * 25
    assert {"refused"} <= {one["outcome"] for one in found}


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_an_example_is_the_same_for_a_seed(kind: str) -> None:
    one, two = ([MAKERS[kind](random.Random(seed)) for seed in range(20)] for _ in range(2))
    assert one == two
    assert len(set(one)) > 10


def test_a_reader_that_breaks_a_bound_is_found() -> None:
    def refuse() -> None:
        raise InputError("it is damaged")

    def spin() -> None:
        until = time.process_time() + 1.1
        while time.process_time() < until:
            pass

    assert measured(refuse, 10)["finding"] == ""
    assert measured(refuse, 10)["outcome"] == "refused"
    assert "ZeroDivisionError" in measured(lambda: 1 // 0, 10)["finding"]
    assert "for 10 bytes" in measured(spin, 10)["finding"]
    assert "MiB for 10 bytes" in measured(lambda: len(b"a" * (400 * MIB)), 10)["finding"]
    assert measured(lambda: len(b"a" * (400 * MIB)), 100 * MIB)["finding"] == ""


@pytest.mark.slow
def test_a_death_is_found_and_the_rest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child of a kind that kills it at its second example."""
    code = (
        "import os, signal, sys; from benchmarks.data import fuzz_readers as f; "
        "f.Readers.prepare = lambda self, kind, rng: (1, (lambda: os.kill(os.getpid(), signal.SIGSEGV)) "
        "if f.seen.append(1) or len(f.seen) == 2 and first == 0 else (lambda: None)); f.seen = []; "
        "first = int(sys.argv[2]); f.child(sys.argv[1], first, int(sys.argv[3]), 0)"
    )
    monkeypatch.setattr(fuzz_readers, "CHILD", ("-c", code))
    found = fuzz("json", 5)
    assert found.deaths == 1
    assert found.findings == [f"example 1: the process died with {-signal.SIGSEGV}"]
    assert sum(found.outcomes.values()) == 4
