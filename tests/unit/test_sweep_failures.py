"""Why trials fail, and the error where none finished an epoch: without Ray."""

from pathlib import Path

import pytest
from sweeps import sized

from ray_app.commands.tune.command import best_trial
from ray_app.commands.tune.state import SweepState
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.commands.tune.trial import is_repeated, normalise_error
from ray_app.errors import TrainingError
from ray_app.runs.event_log import EventLog
from ray_app.store.pair_store import PairStore

MEMORY = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate {} GiB. GPU 0 has a total capacity of 79.18 GiB of "
    "which {} MiB is free. Process {} has 77.90 GiB memory in use."
)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (MEMORY.format("2.00", "1,024.5", 4711), MEMORY.format("1.94", "7", 815), True),
        ("RuntimeError: at 0x7f3a00", "RuntimeError: at 0x55aaee", True),
        (
            "The gradient is not finite (nan) at epoch 1, step 4",
            "The gradient is not finite (inf) at epoch 2, step 31",
            True,
        ),
        ("loss 1.5e-07 at step 3.", "loss 12 at step 3.", True),
        ("ConfigError: --rank is too large", "ConfigError: --rank is too small", False),
        (MEMORY.format(1, 2, 3), "RuntimeError: CUDA error", False),
    ],
)
def test_a_cause_is_the_same_whatever_its_numbers_are(first: str, second: str, same: bool) -> None:
    assert (normalise_error(first) == normalise_error(second)) == same
    lines = [{"kind": "step", "global_step": 1}, {"kind": "exception", "cause": first}]
    assert is_repeated(second, lines) == same
    assert not is_repeated(second, lines[:1])


@pytest.fixture
def record(small_store: Path, tmp_path: Path) -> SweepState:
    """State of a sweep that has just started."""
    spec = sized(
        tmp_path, small_store, out=str(tmp_path / "sweep"), space={"hidden_dim": [8, 16, 24]}, search_alg="grid"
    )
    folder, store = SweepDir(Path(spec.out)), PairStore.open(small_store)
    settings = spec.model_dump(mode="json", exclude_unset=True)
    folder.create({"name": "s", "key": "k", "spec": settings, "store_fingerprint": store.fingerprint})
    return SweepState(folder, EventLog(folder.path), {"all": store}, {})


def test_reasons_are_grouped_without_their_numbers(record: SweepState) -> None:
    for reason in ("not finite at step 3", "out of memory", "not finite at step 17"):
        trial = record.next_trial()
        assert trial is not None
        record.failed(trial.name, reason)
    with pytest.raises(TrainingError, match=r"Failed: 2 times: not finite at step 3; 1 times: out of memory$"):
        best_trial(record)


def test_where_no_trial_has_finished_an_epoch_the_error_has_the_resume_command(record: SweepState) -> None:
    assert record.next_trial() is not None
    with pytest.raises(TrainingError, match=r"no trial of .* has finished an epoch yet; resume with: .*--resume"):
        best_trial(record)
