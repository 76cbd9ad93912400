"""The doctor says what is wrong and what to do, changes nothing unasked, and its exit code says so."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient

from ray_app import cli
from ray_app.commands import doctor
from ray_app.commands.doctor import DoctorCheck


def closed_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and a current folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def token(home: Path) -> Path:
    """A key as Ray writes it."""
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real MLflow database."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.mark.parametrize(
    ("found", "asked", "holds"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("3.17.2", "<3.18,>=3.17.2", True),
        ("3.18.0", "<3.18,>=3.17.2", False),
        ("3.9.7", ">=3.11,<3.13", False),
        ("3.11", ">=3.11.0", True),
        ("24.0.0", "", True),
        ("1.0.5", "~=1.0.2", True),
    ],
)
def test_a_version_is_compared_number_by_number(found: str, asked: str, holds: bool) -> None:
    assert doctor.satisfies(found, asked) is holds


def test_what_is_installed_is_what_is_declared() -> None:
    assert doctor.check_python(sys.version.split()[0]).state == "ok"
    for name in doctor.REQUIRED_PACKAGES:
        assert doctor.check_package(name) == DoctorCheck(name, "ok", version(name))


def test_a_wrong_python_and_a_missing_package_are_problems_with_a_fix() -> None:
    old = doctor.check_python("3.9.7")
    assert (old.state, "3.9.7; ray-app needs" in old.value) == ("problem", True)
    missing = doctor.check_package("no-such-package-of-ray-app")
    assert (missing.state, missing.fix) == ("problem", "run `make setup`")


def test_too_little_is_a_warning_that_names_the_limit(tmp_path: Path) -> None:
    assert doctor.check_cpus(1, 8) == DoctorCheck("CPUs", "warning", "1 of 8", doctor.check_cpus(1, 8).fix)
    assert doctor.check_cpus(8, 8) == DoctorCheck("CPUs", "ok", "8")
    assert "from 8 GiB" in doctor.check_memory(4 * 2**30).fix
    assert doctor.check_memory(64 * 2**30).state == "ok"
    assert doctor.check_shm(tmp_path / "nowhere").state == "warning"
    disk = doctor.check_disk(tmp_path)
    assert (disk.state == "warning") == ("5 GiB" in disk.fix)


def test_the_limit_of_a_container_counts_as_its_memory(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    machine = doctor.memory_bytes((limit,))
    limit.write_text(f"{machine // 2}\n")
    assert doctor.memory_bytes((limit,)) == machine // 2


def test_a_machine_without_a_gpu_is_no_problem() -> None:
    expected = ("ok", "warning") if torch.cuda.is_available() else ("info", "warning")
    assert doctor.check_gpu().state in expected


def test_a_token_that_others_can_read_is_a_problem_until_it_is_fixed(token: Path) -> None:
    check = doctor.check_token(doctor.token_path(), fix=False)
    assert check.state == "problem"
    assert "mode 0644" in check.value
    assert token.stat().st_mode & 0o777 == 0o644
    assert doctor.check_token(doctor.token_path(), fix=True).value.endswith("had mode 0644 and has 0600 now")
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "secret"
    assert doctor.check_token(doctor.token_path(), fix=False).state == "ok"


def test_no_token_is_no_problem_and_another_place_for_it_is_looked_at(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_token(doctor.token_path(), fix=True).state == "info"
    assert not (home / ".ray").exists()
    (home / "key").write_text("secret")
    (home / "key").chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "key"))
    assert "key has mode 0640" in doctor.check_token(doctor.token_path(), fix=False).value


@pytest.mark.parametrize(("mode", "state"), [(None, "info"), ("token", "ok"), ("disabled", "warning")])
def test_clusters_without_a_key_are_a_warning(mode: str | None, state: str) -> None:
    assert doctor.check_auth_mode(mode).state == state


def test_a_database_that_is_not_there_is_not_made(home: Path) -> None:
    check = doctor.check_tracking(None)
    assert (check.state, check.value) == ("info", f"{home / 'mlflow.db'} is not there yet; it will be made")
    assert list(home.iterdir()) == []


def test_a_database_of_mlflow_answers(database: Path) -> None:
    assert doctor.check_tracking(f"sqlite:///{database}").state == "ok"


@pytest.mark.parametrize(
    ("schema", "words", "fix"),
    [
        ("ffffffffffff", "was made by a newer MLflow than", "--tracking-uri"),
        ("451aebb31d03", "was made by an older MLflow than", "mlflow db upgrade"),  # MLflow's first schema
    ],
)
def test_a_database_of_another_mlflow_is_named_with_its_version(
    schema: str, words: str, fix: str, database: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.db"
    path.write_bytes(database.read_bytes())
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    connection.commit()
    connection.close()
    check = doctor.check_tracking(f"sqlite:///{path}")
    assert check.state == "problem"
    assert words in check.value
    assert fix in check.fix


def test_files_that_are_no_database_of_mlflow_are_left_as_they_are(tmp_path: Path) -> None:
    text, other, empty = (tmp_path / name for name in ("text.db", "other.db", "empty.db"))
    text.write_text("not a database, and long enough to be seen as none\n" * 20)
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    empty.touch()
    before = {path: path.read_bytes() for path in (text, other, empty)}
    states = [doctor.check_tracking(f"sqlite:///{path}") for path in before]
    assert [check.state for check in states] == ["problem", "problem", "info"]
    assert "cannot be read as a database" in states[0].value
    assert "something else than MLflow" in states[1].value
    assert {path: path.read_bytes() for path in before} == before


def test_a_tracking_server_that_is_away_is_found_out_soon_and_its_password_not_shown() -> None:
    started_at, environment = time.monotonic(), dict(os.environ)
    check = doctor.check_tracking(f"http://user:secret@127.0.0.1:{closed_port()}")
    assert time.monotonic() - started_at < 60
    assert (check.state, "does not answer" in check.value) == ("problem", True)
    assert "secret" not in check.value
    assert dict(os.environ) == environment


def test_a_file_store_is_a_problem_with_the_way_out() -> None:
    check = doctor.check_tracking("file:./mlruns")
    assert (check.state, "sqlite:///FILE.db" in check.value) == ("problem", True)


def test_without_an_address_no_cluster_is_looked_for() -> None:
    assert doctor.check_ray(None).state == doctor.check_ray("local").state == "info"


def test_an_address_where_nothing_listens_is_found_out_soon() -> None:
    started_at = time.monotonic()
    for address in (f"127.0.0.1:{closed_port()}", f"ray://127.0.0.1:{closed_port()}"):
        check = doctor.check_ray(address)
        assert (check.state, "Connection refused" in check.value) == ("problem", True)
    assert "dashboard" in doctor.check_ray("http://127.0.0.1:8265").value
    assert doctor.check_ray("host:port").state == "problem"
    assert time.monotonic() - started_at < 60


def test_a_port_that_is_not_rays_is_given_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        check = doctor.check_ray(f"127.0.0.1:{listener.getsockname()[1]}", limit_s=4.0)
    assert (check.state, "within 4 s" in check.value) == ("problem", True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_is_joined_and_left_running() -> None:
    check = doctor.check_ray(ray.get_runtime_context().gcs_address)
    assert (check.state, "1 nodes, 2 CPUs, 0 GPUs" in check.value) == ("ok", True), check
    assert ray.cluster_resources()["CPU"] == 2


@pytest.fixture
def guarded_cluster(home: Path) -> Iterator[str]:
    """The address of a cluster that asks for a key which this user does not have."""
    owner = home / "owner"
    owner.mkdir()
    code = (
        "import ray, sys\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "HOME": str(owner), "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout
        assert process.stdin
        yield process.stdout.readline().strip()
        process.stdin.close()


@pytest.mark.slow
def test_a_cluster_that_refuses_the_key_says_which_to_copy(
    guarded_cluster: str, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    token.write_text("0" * 64)
    check = doctor.check_ray(guarded_cluster)
    assert (check.state, "refuses this user's token" in check.value) == ("problem", True), check
    assert "~/.ray/auth_token" in check.fix


def test_the_exit_code_and_the_json_count_the_problems(token: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 1
    result = json.loads(capfd.readouterr().out)
    assert result["problems"] == 1
    (problem,) = (check for check in result["checks"] if check["state"] == "problem")
    assert set(problem) == {"name", "state", "value", "fix"}
    assert problem["name"] == "Ray token"
    assert cli.run(["doctor", "--fix"]) == 0
    out = capfd.readouterr().out
    assert "has 0600 now" in " ".join(out.split()), "wherever the table breaks the line"
    assert "0 problems" in out
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_check_is_shown_before_the_slow_ones_begin(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert home.is_dir()
    shown_before: list[str] = []

    def gpu() -> DoctorCheck:
        shown_before.extend(capfd.readouterr().out.split())
        return DoctorCheck("GPU", "info", "none")

    monkeypatch.setattr(doctor, "check_gpu", gpu)
    cli.run(["doctor"])
    assert {"python", "mlflow", "disk"} <= set(shown_before)
