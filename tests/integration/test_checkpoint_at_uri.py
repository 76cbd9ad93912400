"""Checkpoints and runs at a URI, as every command that reads one takes them."""

from pathlib import Path

import pytest
from s3_process import S3
from small_runs import make_run

from ray_app import cli
from ray_app.config.base import TrackingFlags
from ray_app.errors import CheckpointError, ConfigError
from ray_app.runs.run_dir import best_of_run
from ray_app.store.atomic import CHECKSUMS_FILE, verify_folder
from ray_app.store.checkpoint import MODEL, load_checkpoint
from ray_app.store.checkpoint_transfer import upload_dir
from ray_app.store.filesystem import RemoteDir
from ray_app.tracking.model_registry import checkpoint_folder
from serve.model.model_source import model_source


def test_every_reader_takes_a_checkpoint_or_a_run_at_a_uri(s3: S3, small_store: Path, tmp_path: Path) -> None:
    local = make_run(small_store, tmp_path / "run")
    uri, there = s3.uri("bucket/read"), RemoteDir(s3.uri("bucket/read"), 1.0)
    with pytest.raises(CheckpointError, match="s3://bucket/read is not a folder"):
        best_of_run(uri)
    there.write("run.json", (local / "run.json").read_bytes())
    with pytest.raises(CheckpointError, match="without a finished epoch"):
        best_of_run(uri)
    there.write("best.json", b'{"checkpoint": "../../elsewhere"}')
    with pytest.raises(CheckpointError, match=r"best\.json is damaged.*elsewhere' is no folder of a run"):
        best_of_run(uri)
    best = "checkpoints/epoch_0001"
    upload_dir(local / best, there, best)
    there.write("best.json", (local / "best.json").read_bytes())
    expected = load_checkpoint(local / best)
    assert best_of_run(uri) == there.uri_of(best)
    for where in (uri, there.uri_of(best)):
        with checkpoint_folder(where, TrackingFlags()) as folder:
            assert load_checkpoint(folder).sha256 == expected.sha256
        assert not folder.exists()
    source = model_source(there.uri_of(best), None)
    identity = source.current()
    assert (identity.digest, identity.source) == (expected.sha256, "epoch_0001")
    with source.files(identity) as folder:
        assert verify_folder(folder) == expected.sha256
    there.write(f"{best}/{MODEL}", b"x")
    with pytest.raises(CheckpointError, match=rf"s3://bucket/read/{best}/{MODEL} is damaged"), source.files(identity):
        pass
    there.delete(f"{best}/{MODEL}")
    with pytest.raises(CheckpointError, match=rf"{MODEL} is missing, though {CHECKSUMS_FILE} lists it"):
        source.files(identity).__enter__()
    there.delete(f"{best}/{CHECKSUMS_FILE}")
    with pytest.raises(CheckpointError, match=f"has no {CHECKSUMS_FILE}"):
        source.current()


def test_where_only_a_disk_will_do_a_uri_is_refused() -> None:
    for words in (
        ["import-checkpoint", "reference.pt", "--out", "s3://bucket/checkpoint"],
        ["evaluate", "--store", "s", "--checkpoint", "c", "--out", "s3://bucket/report"],
        ["train", "--store", "s", "--out", "o", "--init-from", "s3://bucket/run/init"],
    ):
        with pytest.raises(ConfigError, match=r"s3:/… is a URI; name one on a disk"):
            cli.parse(words[0], cli.COMMANDS[words[0]], None, words[1:])
