"""The whole loop as a user starts it, at the real feature width, with few pairs."""

import json
from pathlib import Path

import pytest

from ray_app import cli


@pytest.mark.usefixtures("ray_cluster")
def test_quickstart_ends_with_a_table_a_report_and_a_champion(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = "quickstart --num-pairs 24 --num-sequences 6 --num-epochs 1 --hidden-dim 8 --out q --json"
    assert cli.run(argv.split()) == 0
    result = json.loads(capfd.readouterr().out)
    evaluated = result["evaluate"]
    assert {"before", "white", "mean_target", "shuffled"} <= set(evaluated["controls"])
    assert (
        Path(evaluated["files"]["report"]).is_file() if isinstance(evaluated["files"], dict) else evaluated["files"]
    )
    assert result["promote"]["promoted"]
    assert result["prepare"]["pairs"] == 24
    assert cli.run([*argv.split()[:-1]]) == 0
    out = capfd.readouterr().out
    for word in ("mean_target", "shuffled", "report.html", "champion"):
        assert word in out
    assert {path.name for path in (tmp_path / "q").iterdir() if path.name.startswith("run-")} >= {"run-1", "run-2"}
