"""The whole loop as a user starts it, at the real feature width, with few pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_app import cli

ARGV = ["quickstart", "--num-pairs", "24", "--num-sequences", "6", "--num-epochs", "1", "--hidden-dim", "8", "--out"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "q"


@pytest.mark.usefixtures("ray_cluster")
def test_quickstart_ends_with_a_report_and_a_champion(
    out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(out.parent)
    assert cli.run([*ARGV, "q", "--json"]) == 0
    printed = capfd.readouterr()
    assert "INFO mlflow" not in printed.err
    assert not [each for each in recwarn if "Add type hints" in str(each.message)]
    result = json.loads(printed.out)
    evaluated = result["evaluate"]
    assert {"before", "white", "mean_target", "shuffled"} <= set(evaluated["baselines"])
    assert (
        Path(evaluated["files"]["report"]).is_file() if isinstance(evaluated["files"], dict) else evaluated["files"]
    )
    assert result["promote"]["promoted"]
    assert result["prepare"]["pairs"] == 24


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_second_quickstart_makes_a_second_run_and_prints_a_table(
    out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    for number in (1, 2):
        if not (out / f"run-{number}").exists():
            assert cli.run([*ARGV, "q"]) == 0
    printed = capfd.readouterr().out
    for word in ("mean_target", "shuffled", "report.html", "champion"):
        assert word in printed
    assert {path.name for path in out.iterdir() if path.name.startswith("run-")} >= {"run-1", "run-2"}


@pytest.mark.parametrize(("lift", "fails"), [(0.31, False), (0.0, True), (-0.2, True)])
def test_make_lift_fails_unless_the_adapter_is_ahead(tmp_path: Path, lift: float, fails: bool) -> None:
    said = json.dumps({"evaluate": {"verdict": "so it is", "lift": lift}})
    (tmp_path / "ray-app").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "ray-app").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    stamp = str(tmp_path / "ray-app")
    command = ["make", "-s", "lift", f"BIN={tmp_path}", f"STAMP={stamp}", "-o", stamp]
    root, env = Path(__file__).parents[2], {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "so it is\n"
    assert (done.returncode != 0) == fails
