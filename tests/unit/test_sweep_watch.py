"""A sweep that is watched: live, to its end, or until it has no driver any more. Without Ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sweeps import created, sized

from ray_app.commands.tune.progress import watch
from ray_app.commands.tune.sweep_dir import SweepDir

DRIVER = """
import sys, time
from pathlib import Path
from ray_app.commands.tune.sweep_dir import SweepDir
with SweepDir(Path(sys.argv[1])).exclusive() as log:
    log.write("run_started", name="s", time=time.time())
    time.sleep(600)
"""


@pytest.fixture
def folder(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepDir:
    monkeypatch.setattr("ray_app.commands.tune.progress.REFRESH_S", 0.05)
    monkeypatch.setattr("ray_app.commands.tune.progress.DRIVERLESS_S", 0.5)
    return created(sized(tmp_path, small_store, out=str(tmp_path / "sweep")))


def test_a_sweep_that_is_driven_is_watched_to_its_end(folder: SweepDir, capfd: pytest.CaptureFixture[str]) -> None:
    watcher = threading.Thread(target=watch, args=(folder,), daemon=True)
    with folder.exclusive() as log:
        log.write("run_started", name="s", time=time.time())
        watcher.start()
        watcher.join(1.5)
        assert watcher.is_alive(), "three times as long as a sweep may be without a driver"
        log.write("run_ended", status="FINISHED", artifacts=None, time=time.time())
    watcher.join(400)
    assert not watcher.is_alive()
    err = capfd.readouterr().err
    assert "ended" in err
    assert "no driver" not in err


def test_the_watch_ends_where_the_driver_was_killed(folder: SweepDir, capfd: pytest.CaptureFixture[str]) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder.path)])
    while not folder.entries():
        assert driver.poll() is None
        time.sleep(0.01)
    watcher = threading.Thread(target=watch, args=(folder,), daemon=True)
    watcher.start()
    watcher.join(1.5)
    assert watcher.is_alive()
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    watcher.join(400)
    assert not watcher.is_alive()
    err = " ".join(capfd.readouterr().err.split())
    assert f"no driver is running; resume the sweep with: ray-app tune --resume {folder.path}" in err
