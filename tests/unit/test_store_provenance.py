"""Provenance names command, code, versions and data, and no password."""

import json
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from ray_app.store.provenance import git_revision, provenance


def test_provenance_is_json_and_names_versions_and_data() -> None:
    found = provenance(["ray-app", "train"], "f" * 64, mlflow_run_id="abc")
    assert json.loads(json.dumps(found)) == found
    assert (found["argv"], found["dataset_fingerprint"]) == (["ray-app", "train"], "f" * 64)
    assert found["versions"]["torch"] == torch.__version__
    assert found["mlflow_run_id"] == "abc"
    assert datetime.fromisoformat(found["started"]).tzinfo is not None


def test_a_password_in_a_url_is_left_out() -> None:
    found = provenance(["--tracking-uri", "https://me:secret@host/x", "--uri=postgresql://me:s3@h/db", "a@b"])
    assert found["argv"] == ["--tracking-uri", "https://***@host/x", "--uri=postgresql://***@h/db", "a@b"]


def test_the_revision_of_a_checkout_says_whether_it_was_changed(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert git_revision(tmp_path) is None  # no commit yet
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    clean = git_revision(tmp_path)
    assert clean is not None
    assert (len(clean["revision"]), clean["dirty"]) == (40, False)
    (tmp_path / "new").touch()
    assert git_revision(tmp_path) == {**clean, "dirty": True}
