"""Promotion: a version for each checkpoint, the alias only for one that earns it, and a reason either way."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console
from small_adapters import save_image_tokens
from small_runs import make_run

from ray_app import cli
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.promote.command import render_promote, run_promote
from ray_app.config.evaluate import EvaluateConfig, PromoteConfig
from ray_app.errors import CheckpointError, ConfigError, RegistryError
from ray_app.runs.run_dir import best_of_run
from ray_app.tracking.model_registry import ModelRegistry

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def runs(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "untrained": make_run(small_store, folder / "untrained", seed=1),
        "weak": make_run(small_store, folder / "weak", steps=3),
        "elsewhere": make_run(small_store, folder / "elsewhere", steps=300, split_seed=7),
    }


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry in SQLite whose database has its tables already."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri).search_registered_models()
    return uri


@pytest.fixture
def tracking(registry: str, tmp_path: Path) -> dict[str, str]:
    """The registry, and a model of the test's own."""
    return {"tracking_uri": registry, "model_name": tmp_path.name, "experiment": tmp_path.name}


def promote(run: Path, tracking: dict[str, str], **settings: Any) -> dict[str, Any]:
    result = run_promote(PromoteConfig(run=str(run), **tracking, **settings))
    json.dumps(result, allow_nan=False)
    return result


def versions(tracking: dict[str, str]) -> dict[str, dict[str, str]]:
    client = MlflowClient(tracking["tracking_uri"])
    found = client.search_model_versions(f"name='{tracking['model_name']}'")
    return {str(version.version): version.tags for version in found}


def champion(tracking: dict[str, str]) -> str:
    client = MlflowClient(tracking["tracking_uri"])
    return str(client.get_model_version_by_alias(tracking["model_name"], "champion").version)


def ask(tracking: dict[str, str], task: str) -> dict[str, Any]:
    """`--list` or `--rollback`."""
    result = run_promote(PromoteConfig(**tracking, **{task: True}))
    json.dumps(result, allow_nan=False)
    return result


def printed(result: dict[str, Any]) -> str:
    out = io.StringIO()
    render_promote(result, Console(width=160, file=out))
    return out.getvalue()


def test_the_alias_goes_to_the_first_version_and_then_only_to_one_that_earns_it(
    runs: dict[str, Path], tracking: dict[str, str], tmp_path: Path, small_store: Path
) -> None:
    first = promote(runs["untrained"], tracking)
    assert (first["promoted"], first["forced"], first["champion_before"]) == (True, False, None)
    assert first["verdict_code"] == "first"
    assert first["lift"] <= 0
    assert "only because there is no champion yet" in first["reason"]
    assert champion(tracking) == first["version"]

    weak = promote(runs["weak"], tracking)
    assert (weak["promoted"], weak["new_version"]) == (False, True)
    assert weak["verdict_code"] == "no_gain"
    assert weak["champion"] == first["version"] == champion(tracking)
    assert "not better than the champion" in weak["reason"]
    assert "stays version 1" in printed(weak)

    forced = promote(runs["weak"], tracking, force=True)
    assert (forced["promoted"], forced["forced"], forced["new_version"]) == (True, True, False)
    assert forced["version"] == weak["version"] == champion(tracking)
    assert "already there" in printed(forced)

    tags = versions(tracking)
    assert sorted(tags) == [first["version"], weak["version"]]
    assert float(tags[first["version"]]["lift"]) == first["lift"]
    weak_tags = tags[weak["version"]]
    assert (weak_tags["verdict_code"], weak_tags["reason"]) == ("forced", forced["reason"])
    assert float(weak_tags["cosine_accept_rate_0.80"]) == weak["metrics"]["cosine_accept_rate"]["0.80"]
    assert weak_tags["fingerprint"] == weak["metrics"]["fingerprint"]
    assert weak_tags["test_fingerprint"] == weak["metrics"]["test_fingerprint"]

    again = promote(runs["weak"], tracking)
    assert (again["verdict_code"], again["promoted"], again["champion"]) == (
        "already_champion",
        True,
        weak["version"],
    )
    listed = ask(tracking, "list")
    assert (listed["champion"], listed["champion_before"], listed["code"]) == (weak["version"], "1", "forced")
    assert [entry["code"] for entry in listed["history"]] == ["first", "forced"]
    assert not listed["warnings"]
    row = listed["versions"][-1]
    assert (row["version"], row["champion"], row["lift"]) == (weak["version"], True, weak["lift"])
    assert row["pairs"] == str(weak["metrics"]["pairs"])
    text = printed(listed)
    assert any(line.split()[:2] == ["→", "2"] for line in text.splitlines())
    for word in (row["best_baseline"], "1 → 2", "--rollback moves the alias back", forced["reason"][:40]):
        assert word in text

    # What an endpoint would load by the alias is what was evaluated.
    named = f"models:/{tracking['model_name']}@champion"
    evaluated = run_evaluate(EvaluateConfig(store=small_store, checkpoint=named, out=tmp_path / "out", **tracking))
    assert evaluated["checkpoint_sha256"] == weak["metrics"]["checkpoint_sha256"]
    assert evaluated["cosine_accept_rate"] == weak["metrics"]["cosine_accept_rate"]

    back = ask(tracking, "rollback")
    assert back["champion"] == champion(tracking) == "1"
    assert "version 1, instead of version 2" in printed(back)


def test_a_better_run_replaces_a_champion_also_where_neither_beats_a_baseline(
    runs: dict[str, Path], tracking: dict[str, str], tmp_path: Path, small_store: Path
) -> None:
    promote(runs["untrained"], tracking)
    better = promote(make_run(small_store, tmp_path / "better", steps=10), tracking)
    assert (better["promoted"], better["verdict_code"]) == (True, "promoted")
    assert better["lift"] <= 0
    assert "it does not beat that baseline, and neither does the champion" in better["reason"]
    assert versions(tracking)[better["version"]]["beats_baseline"] == "false"
    assert champion(tracking) == better["version"]
    assert "every pair is accepted" in printed(better)


def test_a_champion_of_other_test_pairs_is_evaluated_again_and_a_run_keeps_its_own_artifacts(
    runs: dict[str, Path], tracking: dict[str, str], tmp_path: Path, small_store: Path
) -> None:
    client = MlflowClient(tracking["tracking_uri"])
    experiment = client.create_experiment(tracking["experiment"], artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment, tags={"run_key": "k1"}).info.run_id
    run = make_run(small_store, tmp_path / "run", steps=3, run_key="k1")
    client.log_artifacts(run_id, str(run / "checkpoints" / "epoch_0001"), "model/checkpoint")
    first = promote(run, tracking)
    assert first["mlflow_run_id"] == run_id

    second = promote(runs["elsewhere"], tracking, split_seed=7)
    assert second["metrics"]["test_fingerprint"] != first["metrics"]["test_fingerprint"]
    again = second["champion_before_metrics"]
    assert again["test_fingerprint"] == second["metrics"]["test_fingerprint"]
    better = second["metrics"]["cosine_accept_rate"]["0.80"] > again["cosine_accept_rate"]["0.80"]
    assert second["promoted"] == (better and (second["lift"] > 0 or again["lift"] <= 0))
    assert f"{again['cosine_accept_rate']['0.80']:.4f}" in second["reason"] or second["lift"] <= 0


def test_a_champion_that_cannot_be_judged_keeps_its_place_and_the_reason_says_why(
    runs: dict[str, Path], tracking: dict[str, str], tmp_path: Path
) -> None:
    client = MlflowClient(tracking["tracking_uri"])
    experiment = client.create_experiment(tracking["experiment"], artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_text(run_id, "nothing", "checkpoint/README")
    client.create_registered_model(tracking["model_name"])
    stranger = client.create_model_version(tracking["model_name"], f"runs:/{run_id}/checkpoint", run_id)
    client.set_registered_model_alias(tracking["model_name"], "champion", str(stranger.version))
    result = promote(runs["weak"], tracking)
    assert not result["promoted"]
    assert result["champion"] == champion(tracking) == str(stranger.version)
    assert "cannot be evaluated" in result["reason"]
    assert "MANIFEST.sha256" in result["reason"]


def test_pairs_that_were_trained_on_do_not_judge(runs: dict[str, Path], tracking: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"--split sequence --split-seed 42 --test-share 0\.2 --val-share 0\.1"):
        promote(runs["weak"], tracking, split="window")
    assert not versions(tracking)


def resealed(folder: Path) -> None:
    """Sums that hold again, as after a change that is no accident."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "MANIFEST.sha256")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "MANIFEST.sha256").write_text("".join(sums))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("damage", "code", "word"),
    [
        ("flip", "checksum_failed", r"model\.safetensors is damaged"),
        ("other weights", "golden_failed", "golden row 0"),
        ("no golden", "golden_failed", r"has no golden\.safetensors"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_saved_is_not_registered_even_by_force(
    damage: str, code: str, word: str, force: bool, runs: dict[str, Path], tracking: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(runs["weak"], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "epoch_0001"
    if damage == "flip":
        weights = folder / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "other weights":
        other = runs["untrained"] / "checkpoints" / "epoch_0001" / "model.safetensors"
        shutil.copy(other, folder / "model.safetensors")
        resealed(folder)
    else:
        (folder / "golden.safetensors").unlink()
        resealed(folder)
    with pytest.raises(CheckpointError, match=rf"not promoted \({code}\): .*{word}"):
        promote(tmp_path / "run", tracking, force=force)
    assert not versions(tracking)


def test_image_tokens_are_not_registered(tracking: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokens makes image tokens for a language model"):
        promote(save_image_tokens(tmp_path / "tokens"), tracking)
    assert not versions(tracking)


def test_a_challenger_whose_champion_changed_while_it_was_evaluated_is_compared_with_the_new_one(
    runs: dict[str, Path], tracking: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, rivals = ModelRegistry.write_version, ["untrained"]

    def late(registry: ModelRegistry, *args: Any) -> str:
        number = write(registry, *args)
        if rivals:  # another promotion is quicker, between this one's version and its last look at the alias
            first = promote(runs[rivals.pop()], tracking)
            assert first["verdict_code"] == "first"
        return number

    monkeypatch.setattr(ModelRegistry, "write_version", late)
    result = promote(runs["weak"], tracking)
    assert (result["verdict_code"], result["champion_before"]) == ("no_gain", "2")
    assert (result["version"], result["new_version"]) == ("1", False)
    assert result["champion_before_metrics"] is not None
    assert champion(tracking) == "2"
    assert sorted(versions(tracking)) == ["1", "2"]
    listed = ask(tracking, "list")
    assert [move["version"] for move in listed["history"]] == ["2"]
    assert not listed["warnings"]


def test_the_command_line_lists_as_one_json_object(
    runs: dict[str, Path], tracking: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [word for key, value in tracking.items() for word in (f"--{key.replace('_', '-')}", value)]
    assert cli.run(["promote", "--list", *flags]) == 2
    assert "there is no model" in capfd.readouterr().err
    assert cli.run(["promote", str(runs["untrained"]), "--json", *flags]) == 0
    assert json.loads(capfd.readouterr().out)["verdict_code"] == "first"
    assert cli.run(["promote", "--list", "--json", *flags]) == 0
    assert json.loads(capfd.readouterr().out)["champion"] == "1"
    assert cli.run(["promote", *flags]) == 2
    assert "exactly one of RUN, --rollback and --list" in capfd.readouterr().err.replace("\n", " ")


def test_a_tracking_server_that_is_away_is_named_before_anything_is_evaluated(
    runs: dict[str, Path], tracking: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = {**tracking, "tracking_uri": "http://somebody:secret@127.0.0.1:9"}
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9.*--tracking-uri") as caught:
        promote(runs["weak"], away)
    assert "secret" not in str(caught.value)


def test_a_checkpoint_that_does_not_record_its_store_needs_one(
    runs: dict[str, Path], tracking: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(runs["weak"] / "checkpoints" / "epoch_0001", tmp_path / "alone")
    with pytest.raises(ConfigError, match="--store"):
        promote(tmp_path / "alone", tracking)


def test_a_run_without_a_finished_epoch_has_no_checkpoint_and_a_damaged_best_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="without a finished epoch"):
        best_of_run(str(tmp_path))
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        best_of_run(str(tmp_path))
