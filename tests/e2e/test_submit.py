"""Jobs on a real Ray head with its own processes: submitted, followed, cut off, stopped, refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import Head, Relay, ray_head
from rich.console import Console

from ray_app.cluster.job_client import JobLog, result_in, resume_command, show_ended
from ray_app.cluster.working_dir import files_of
from ray_app.commands.jobs.submit import entrypoint, job_environment, packed
from ray_app.config.submit import SubmitConfig
from ray_app.errors import ConfigError, ResourceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ra") as folder, ray_head(Path(folder)) as head:
        yield head


def environment(head: Head, token: str | None = None, address: str | None = None) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token or head.token,
        "RAY_API_SERVER_ADDRESS": address or head.dashboard,
    }


def app(head: Head, *argv: str, token: str | None = None, address: str | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ray_app", *argv],
        env=environment(head, token, address),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=400)
    return process.returncode, stdout, stderr


@pytest.fixture
def small_dir(tmp_path: Path) -> Path:
    """A working directory with a package of this name with commands that take long and that fail."""
    package = tmp_path / "work" / "ray_app"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""A long command."""\n')
    (package / "__main__.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(5)\n"
        "    print('saved', flush=True)\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "seconds, code = float(sys.argv[sys.argv.index('--seed') + 1]), int(sys.argv[-1])\n"
        "for i in range(int(seconds * 5)):\n"
        "    print(f'line {i:04d}', flush=True)\n"
        "    time.sleep(0.2)\n"
        "sys.exit(code)\n"
    )
    return tmp_path / "work"


def long_work(folder: Path, seconds: int, code: int) -> list[str]:
    """Passes as a command of ours, and is run by the package in `folder`."""
    command = ["quickstart", "--seed", str(seconds), "--num-epochs", str(code)]
    return ["submit", "--working-dir", str(folder), "--", *command]


def test_a_real_command_runs_there_and_its_result_comes_back(head: Head, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare = ["prepare", "scenes", "--num-pairs", "4", "--num-sequences", "2", "--width", "64", "--height", "48"]
    code, stdout, stderr = ended(
        app(head, "submit", "--json", "--", *prepare, "--event-span", "5ms", "--out", str(store), "--json")
    )
    assert code == 0, stderr
    output = json.loads(stdout)
    assert (output["status"], output["exit_code"], output["result"]["pairs"]) == ("SUCCEEDED", 0, 4)
    assert output["uploaded_bytes"] < 2 * 2**20
    assert (store / "manifest.json").is_file()
    code, stdout, stderr = ended(app(head, "jobs", "fetch", output["job"], "--to", str(tmp_path / "fetched")))
    assert code == 0, stderr
    assert f"store: {store}\n" in stdout
    fetched = json.loads((tmp_path / "fetched" / f"{output['job']}.json").read_text())
    assert (fetched["status"], fetched["result"]) == ("SUCCEEDED", output["result"])
    assert json.dumps(output["result"]) in (tmp_path / "fetched" / f"{output['job']}.log").read_text()


def test_rays_own_client_submits_a_command_as_well(head: Head) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    command = "python -m ray_app doctor --tracking-uri http://127.0.0.1:9 --json"
    words = [ray, "job", "submit", "--working-dir", ".", "--", *command.split()]
    done = subprocess.run(words, env=environment(head), cwd=ROOT, capture_output=True, text=True, timeout=400)
    found = result_in(done.stdout)
    assert found, done.stderr
    (ray_check,) = (check for check in found["checks"] if check["name"] == "Ray")
    assert ray_check["state"] == "ok", "it joined the cluster that it runs on"
    assert f":{head.address.rpartition(':')[2]}: " in ray_check["value"]
    assert done.returncode == 1, "nothing answers at the tracking server's address"


def test_a_lost_connection_costs_no_line_and_doubles_none(head: Head, small_dir: Path) -> None:
    relay = Relay(int(head.dashboard.rpartition(":")[2]))
    process = app(head, *long_work(small_dir, 8, 3), address=f"http://127.0.0.1:{relay.port}")

    def cut_twice() -> None:
        for _ in range(2):
            time.sleep(5)
            relay.cut()
            time.sleep(1.5)
            relay.repair()

    cutter = threading.Thread(target=cut_twice)
    assert process.stderr
    seen: list[str] = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("submitted"):
            cutter.start()
    cutter.join()
    relay.close()
    assert process.wait(400) == 3, "the exit code is the job's"
    assert any("lost the connection" in line for line in seen)
    assert re.findall(r"line (\d{4})", "".join(seen)) == [f"{i:04d}" for i in range(40)]


def test_a_job_is_listed_and_stopped_by_hand(head: Head, small_dir: Path) -> None:
    command = ["train", "--store", "/mnt/s", "--out", "/mnt/a run", "--seed", "100", "--num-epochs", "1"]
    words = ["submit", "--json", "--detach", "--working-dir", str(small_dir), "--", *command]
    code, stdout, stderr = ended(app(head, *words))
    assert code == 0, stderr
    job = json.loads(stdout)["job"]
    assert any(row["job"] == job for row in json.loads(ended(app(head, "jobs", "list", "--json"))[1])["jobs"])
    follower = app(head, "jobs", "logs", job)
    time.sleep(3)
    assert json.loads(ended(app(head, "jobs", "stop", job, "--json"))[1])["asked"]
    code, stdout, stderr = ended(follower)
    assert code == 143
    assert "stopped" in stdout
    assert "resume with:  ray-app submit -- train --resume '/mnt/a run'" in stdout
    assert "saved" in stderr, "it was given longer than Ray's three seconds"


@pytest.mark.parametrize(
    ("command", "way"),
    [
        ("train --store s3://b/s?a=b --out=s3://b/r?c=d --seed 1", "train --resume 's3://b/r?c=d'"),
        ("train --resume 's3://b/a run' --num-epochs 9", "train --resume 's3://b/a run'"),
        ("tune f.yaml --out /mnt/sweep", "tune --resume /mnt/sweep"),
        ("tune f.yaml", "tune --resume FOLDER"),
        ("prepare dsec '/mnt/a b' --out s3://b/s", "prepare dsec '/mnt/a b' --out s3://b/s"),
        ("doctor", None),
    ],
)
def test_a_stopped_job_says_how_to_resume(command: str, way: str | None) -> None:
    assert resume_command(f"python -m ray_app {command}") == (way and f"ray-app submit -- {way}")


def test_what_is_refused_says_how_to_fix_it(head: Head) -> None:
    processes = {
        "wrong token": app(head, "jobs", "list", token="0" * 64),
        "no such job": app(head, "jobs", "stop", "nothing"),
        "nothing there": app(head, "jobs", "list", address="http://127.0.0.1:9"),
        "no server of jobs": app(head, "jobs", "list", address=head.address),
        "no command": app(head, "submit"),
        "a wrong flag": app(head, "submit", "--", "train", "--no-such-flag"),
    }
    expected = {
        "wrong token": "RAY_AUTH_TOKEN",
        "no such job": "jobs list",
        "nothing there": "tunnel",
        "no server of jobs": "--address",
        "no command": "after `--`",
        "a wrong flag": "no-such-flag",
    }
    for name, process in processes.items():
        code, stdout, stderr = ended(process)
        assert code == 2, (name, stderr)
        assert expected[name] in stdout + stderr, (name, stderr)
        assert "Traceback" not in stderr, name


OTHER_VERSIONS = """
import os, sys
import ray, ray._private.utils
from ray_app.errors import ResourceError
from ray_app.cluster.connection import cluster
from ray_app.cluster.job_client import JobClient

ray._private.utils.compute_version_info = lambda: ("2.59.0", "3.11.0")
try:
    with cluster(sys.argv[1]):
        pass
except ResourceError as error:
    print(error)
ray.__version__ = "2.59.0"
try:
    JobClient(sys.argv[2])
except ResourceError as error:
    print(error)
"""


def test_another_version_of_ray_is_named_with_both_versions(head: Head) -> None:
    import ray

    words = [sys.executable, "-c", OTHER_VERSIONS, head.address, head.dashboard]
    done = subprocess.run(words, env=environment(head), cwd=ROOT, capture_output=True, text=True, timeout=400)
    joined, submitted = done.stdout.splitlines()
    here = ".".join(map(str, sys.version_info[:3]))
    assert (
        f"{head.address} runs Ray {ray.__version__} on Python {here}, this is Ray 2.59.0 on Python 3.11.0" in joined
    )
    assert "ray-app submit" in joined
    assert submitted.startswith(f"the cluster at {head.dashboard} runs Ray {ray.__version__}, this is Ray 2.59.0;")


def test_data_does_not_travel(tmp_path: Path) -> None:
    (tmp_path / "ray_app").mkdir()
    (tmp_path / "ray_app" / "a.py").write_text("1")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "ray-app.env").write_text("AWS_SECRET_ACCESS_KEY=secret")
    (tmp_path / "deploy" / "ray-app.env.example").write_text("AWS_SECRET_ACCESS_KEY=")
    assert [str(file) for file in files_of(tmp_path)] == ["deploy/ray-app.env.example", "ray_app/a.py"]
    shutil.rmtree(tmp_path / "deploy")
    (tmp_path / "pairs.parquet").write_bytes(os.urandom(6 * 2**20))
    with (
        pytest.raises(ResourceError, match=r"6\.0 MiB, of which at most 5 MiB travel.*pairs\.parquet \(6\.0 MiB\)"),
        packed(tmp_path, 5.0),
    ):
        pass
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*.parquet\n")
    with packed(tmp_path, 5.0) as package:
        assert package
        assert zipfile.ZipFile(package).namelist() == [".gitignore", "ray_app/a.py"]
        same = package.read_bytes()
    os.utime(tmp_path / "ray_app" / "a.py", (0, 0))
    with packed(tmp_path, 5.0) as package:
        assert package
        assert package.read_bytes() == same, "a cluster that has it is not sent it again"


def test_tests_docs_and_results_of_this_project_do_not_travel(tmp_path: Path) -> None:
    for name in ("ray_app/cli.py", "tests/test_a.py", "docs/a.md", "benchmarks/results/a.json", "benchmarks/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    of_this_project = {str(file) for file in files_of(tmp_path)}
    assert of_this_project >= {"ray_app/cli.py", "benchmarks/a.py"}
    assert not [name for name in of_this_project if name.startswith(("tests", "docs", "benchmarks/results"))]


def test_secrets_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hidden@mlflow")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for name in ("MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY"):
        with pytest.raises(ConfigError, match="looks like a secret") as refusal:
            job_environment(SubmitConfig(command=("doctor",), env=(name,)))
        assert "hidden" not in str(refusal.value)
    assert job_environment(SubmitConfig(command=("doctor",), env=("AWS_REGION",)))["AWS_REGION"] == "eu-west-1"


def test_words_reach_the_cluster_as_they_were_typed() -> None:
    cfg = SubmitConfig(command=("train", "--store", "/mnt/a b", "--out", "$HOME"))
    assert entrypoint(cfg) == "python -m ray_app train --store '/mnt/a b' --out '$HOME'"


def test_a_log_that_starts_again_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    whole = 'one\ntwo\n{"pairs": 3}\nthree'
    log = JobLog()
    for pieces in (["one\nt"], ["on", "e\ntw"], ["one\ntwo\n", '{"pairs": 3}\n', "three"]):
        log.again()
        for piece in pieces:
            log.take(piece)
    assert capsys.readouterr().err == whole
    assert log.result() == {"pairs": 3}


def test_where_a_training_is_tracked_is_printed_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"mlflow_run_id": "abc", "tracking_uri": "http://mlflow:5000", "artifacts": "s3://b/0/abc/artifacts"}
    state = {"job": "j", "status": "SUCCEEDED", "exit_code": 0, "message": "", "entrypoint": "-m ray_app train"}
    show_ended({**state, "result": found}, Console(width=20))
    output = "job j: succeeded, exit code 0\nMLflow run: abc\nMLflow: http://mlflow:5000\nartifacts: s3://b/0/abc/artifacts\n"
    assert capsys.readouterr().out == output


def test_results_are_read_whatever_else_a_log_holds() -> None:
    log = JobLog()
    log.take("{not json}\n[1]\n")
    found: dict[str, Any] | None = log.result()
    assert found is None
