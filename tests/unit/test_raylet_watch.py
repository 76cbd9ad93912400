"""A raylet that dies: the process ends with a sentence that says what to do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import subprocess, sys, time
from ray_app.cluster import raylet_watch
raylet_watch.LOOK_INTERVAL_S = 0.05
raylets = [subprocess.Popen([sys.argv[1], "400"]) for _ in range(int(sys.argv[2]))]
with raylet_watch.explain_raylet_death("Resume with: x"):
    raylets[0].kill()
    time.sleep(400 if len(raylets) == 1 else 1)
for raylet in raylets:
    raylet.kill()
"""


@pytest.mark.parametrize(("raylets", "code"), [(1, 2), (2, 0)])
def test_a_process_whose_raylet_dies_ends_with_what_to_do(raylets: int, code: int, tmp_path: Path) -> None:
    """With several nodes, as in tests of clusters, one of them may die."""
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    done = subprocess.run([sys.executable, "-c", PROGRAM, program, str(raylets)], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr == ("error: Ray on this machine ended: its raylet died. Resume with: x\n" if code else "")
