"""What travels with a job, and what is refused before anything is sent."""

import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import make_run

from ray_app import cli
from ray_app.cluster.working_dir import files_of
from ray_app.commands.jobs.command import render_jobs_list
from ray_app.commands.jobs.submit import packed, requirement_lines
from ray_app.config.submit import SubmitConfig
from ray_app.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a script and settings, and data of every kind."""
    work = tmp_path / "work"
    shutil.copytree(small_store, work / "stores" / "drive")
    make_run(small_store, work / "runs" / "one")
    for name in (
        *("sweeps/a/sweep.json", "sweeps/a/events.jsonl", "sweeps/a/trials/1/notes.txt"),
        *(
            "half/.prepare/settings.json",
            "half/part.parquet",
            "report/alignment_metrics_S1.json",
            "report/report.html",
        ),
        *(
            "compared/comparison.json",
            "compared/comparison.html",
            "mlflow.db",
            "mlflow.db-wal",
            "mlartifacts/0/model",
        ),
        *("answers/capture.json", "answers/shards/a.jsonl", "answers/traces.jsonl"),
        *("site/manifest.json", "site/run.json", "sweep.yaml", "code/own.py"),
    ):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("strategy: conv\n", encoding="utf-8")
    monkeypatch.chdir(work)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return work


@pytest.mark.parametrize("in_git", [False, True])
def test_folders_of_data_never_travel(folder: Path, in_git: bool) -> None:
    if in_git:
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
    own = ["code/own.py", "site/manifest.json", "site/run.json", "sweep.yaml"]
    assert [str(file) for file in files_of(folder)] == own


def test_of_this_project_at_most_2_mib_travel() -> None:
    most = SubmitConfig(command=("doctor",)).max_upload_mib
    assert most == 2.0
    with packed(ROOT, most) as package:
        assert package
        assert package.stat().st_size <= 2 * 2**20


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("train --store stores/drive --out /mnt/run", "--store stores/drive is a relative path"),
        ("train --store /mnt/store --out run", "--out run is a relative path"),
        ("train --resume runs/one", "--resume runs/one is a relative path"),
        ("evaluate --store s3://b/s --checkpoint runs/one --out /mnt/r", "--checkpoint runs/one is a relative path"),
        ("tune sweep.yaml --store stores/drive --out /mnt/s", "name a path that all its nodes see (/mnt/…/drive)"),
        ("prepare video a.mp4 --out /mnt/s", "--files a.mp4 is a relative path"),
        ("train --store s3://b/s --out s3://b/r --tracking-uri sqlite:///mlflow.db", "in the job's own folder"),
    ],
)
def test_what_would_be_lost_is_refused_at_once(
    folder: Path, words: str, refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sweep.yaml").write_text("space: {hidden_dim: [8, 16]}\n", encoding="utf-8")
    assert cli.run(["submit", "--address", "http://127.0.0.1:9", "--", *words.split()]) == 2
    assert refusal in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "tracked"),
    [
        ("train --store s3://b/s --out s3://b/r --tracking-uri http://mlflow:5000", True),
        ("train --store /mnt/s --out /mnt/r --config settings.yaml", False),
        ("train --resume /mnt/r", True),
        ("evaluate --store /mnt/s --checkpoint models:/a@champion --out /mnt/r", False),
        ("prepare video code/clip.mp4 --out /mnt/s", True),
        ("doctor", True),
    ],
)
def test_what_the_cluster_sees_is_sent_and_where_its_runs_go_is_said(
    folder: Path, words: str, tracked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "code" / "clip.mp4").touch()
    (folder / "settings.yaml").write_text("num_epochs: 1\n", encoding="utf-8")
    assert cli.run(["submit", "--address", "http://127.0.0.1:9", "--", *words.split()]) == 2
    said = capsys.readouterr().err
    assert "there is no cluster at http://127.0.0.1:9" in said
    assert ("MLFLOW_TRACKING_URI of the cluster's nodes" in said) is not tracked


def test_requirements_are_read_without_their_comments(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_bytes(b"# of the project\n\nnumpy==2.3.0  # pinned\r\npackage @ https://host/a.whl#sha256=ab\n")
    assert requirement_lines(file) == ["numpy==2.3.0", "package @ https://host/a.whl#sha256=ab"]
    for damaged in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=f"--requirements {damaged} cannot be read"):
            requirement_lines(damaged)
    file.write_bytes(b"\x80\xff\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        requirement_lines(file)


def test_a_list_of_jobs_cuts_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "ray-app-train-20261129-095325-abcdef"
    job = {"job": name, "status": "RUNNING", "exit_code": None, "started": 0.0, "seconds": None}
    jobs = [{**job, "entrypoint": "python -m ray_app train --store /mnt/" + "long/" * 30}]
    render_jobs_list({"address": "http://h:8265", "jobs": jobs}, Console(width=40))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}  running")
    assert line.endswith("long/" * 30)
