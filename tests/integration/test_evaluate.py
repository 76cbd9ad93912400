"""Evaluation of a checkpoint: only the test part, next to every baseline, as an independent computation has it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from ray.util import placement_group, remove_placement_group
from rich.console import Console
from small_runs import keys, make_run

from ray_app.commands.evaluate import evaluator as judge
from ray_app.commands.evaluate.command import render_evaluate, run_evaluate, varied
from ray_app.config.base import SplitConfig
from ray_app.config.evaluate import EvaluateConfig
from ray_app.data import training_means as data_means
from ray_app.data.training_means import training_means
from ray_app.errors import CheckpointError, RegistryError, ResourceError, StoreError
from ray_app.reports.folder import claim_report_folder
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def run(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(small_store, tmp_path_factory.mktemp("runs") / "run", steps=150)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports") / "report"


@pytest.fixture(scope="module")
def result(small_store: Path, run: Path, out: Path, ray_cluster: None) -> dict[str, Any]:  # noqa: ARG001
    return run_evaluate(EvaluateConfig(store=small_store, checkpoint=str(run), out=out, batch_size=5))


def cosines(a_ND: NDArray[Any], b_ND: NDArray[Any]) -> NDArray[np.float64]:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    return (a_ND * b_ND).sum(1) / np.sqrt((a_ND**2).sum(1) * (b_ND**2).sum(1))


def test_the_numbers_are_those_of_a_float64_computation_over_the_test_part(
    small_store: Path, run: Path, result: dict[str, Any]
) -> None:
    store = PairStore.open(small_store)
    split = split_pairs(store.index, SplitConfig())
    event, target = store.read_rows(split.test)
    mean = store.read_rows(split.train)[1].astype(np.float64).mean(axis=0, keepdims=True)
    adapter = load_checkpoint(run / "checkpoints" / "epoch_0001").adapter.double()
    with torch.no_grad():
        aligned = adapter(torch.tensor(event).double() / 255).numpy()
    expected = {
        "after": cosines(aligned, target),
        "before": cosines(event, target),
        "white": cosines(np.ones_like(target), target),
        "mean_target": cosines(np.repeat(mean, len(target), axis=0), target),
    }
    found = {"after": result, **result["baselines"]}
    for name, cos in expected.items():
        assert found[name]["cos_sim_mean"] == pytest.approx(cos.mean(), abs=1e-5), name
        assert found[name]["cos_sim_std"] == pytest.approx(cos.std(), abs=1e-5), name
        for theta, rate in found[name]["cosine_accept_rate"].items():
            assert rate == pytest.approx((cos > float(theta)).mean()), name
    assert result["pairs"] == len(split.test)
    best = max(found[name]["cosine_accept_rate"]["0.80"] for name in ("before", "white", "mean_target", "shuffled"))
    assert result["lift"] == pytest.approx(result["cosine_accept_rate"]["0.80"] - best)
    centered = cosines(aligned - mean / 255, target / 255 - mean / 255)
    assert result["centered_cos_sim_mean"] == pytest.approx(centered.mean(), abs=1e-4)


def test_the_adapter_and_the_preceding_window_are_compared_on_the_same_pairs(
    small_store: Path, run: Path, result: dict[str, Any]
) -> None:
    store = PairStore.open(small_store)
    test = split_pairs(store.index, SplitConfig()).test
    event, target = store.read_rows(test)
    adapter = load_checkpoint(run / "checkpoints" / "epoch_0001").adapter.double()
    with torch.no_grad():
        after = cosines(adapter(torch.tensor(event).double() / 255).numpy(), target)
    place = {(store.index.sequence[row], store.index.t_start_us[row]): n for n, row in enumerate(test)}
    starts = {name: sorted(t for sequence, t in place if sequence == name) for name, _ in place}
    before = {
        place[name, t]: place[name, earlier[-1]]
        for name, t in place
        if (earlier := [other for other in starts[name] if other < t])
    }
    now = list(before)
    previous = cosines(target[[before[n] for n in now]], target[now])
    found = result["baselines"]["previous_window"]
    assert found["pairs"] == len(now) < len(test)
    assert found["cos_sim_mean"] == pytest.approx(previous.mean(), abs=1e-5)
    assert found["cosine_accept_rate"]["0.80"] == pytest.approx((previous > 0.8).mean())
    assert found["adapter_cosine_accept_rate"]["0.80"] == pytest.approx((after[now] > 0.8).mean())
    assert result["previous_window_better"] == ((previous > 0.8).mean() > (after[now] > 0.8).mean())


@pytest.mark.parametrize("at_once_bytes", [2**30, 0], ids=["at once", "by Ray Data"])
def test_means_are_exact(small_store: Path, monkeypatch: pytest.MonkeyPatch, at_once_bytes: int) -> None:
    monkeypatch.setattr(data_means, "AT_ONCE_BYTES", at_once_bytes)
    store = PairStore.open(small_store)
    rows = split_pairs(store.index, SplitConfig()).train
    sums = training_means(store, rows)
    assert sums.pairs == len(rows)
    assert np.array_equal(sums.target_sum_D, store.read_rows(rows)[1].sum(axis=0, dtype=np.int64))


def test_the_file_has_the_references_keys_and_units(
    shared_reference: Path, out: Path, result: dict[str, Any]
) -> None:
    ours = json.loads((out / "alignment_metrics_S1.json").read_text())
    theirs = json.loads((shared_reference / "alignment_metrics_S1.json").read_text())
    assert keys(theirs) <= keys(ours)
    assert list(ours)[: len(theirs)] == list(theirs)
    for block in ("before_alignment", "after_alignment", "percentiles_after", "improvement", "config"):
        assert list(ours[block]) == list(theirs[block])
    assert type(ours["test_samples"]) is type(theirs["test_samples"])
    assert ours["after_alignment"]["acceptance_at_0.8"] == 100 * result["cosine_accept_rate"]["0.80"]
    gain = ours["after_alignment"]["mean_cosine_similarity"] - ours["before_alignment"]["mean_cosine_similarity"]
    assert ours["improvement"]["cosine_similarity_gain"] == pytest.approx(gain)
    for key in ("baselines", "lift", "centered", "retrieval", "interval95", "split", "provenance", "units"):
        assert key in ours


def test_the_result_is_json_and_names_its_files(out: Path, result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)
    assert result["files"] == [str(out / "alignment_metrics_S1.json"), str(out / "report.html")]
    assert all(Path(path).is_file() for path in result["files"])
    assert result["split"]["test_pairs_trained_on"] == 0
    assert result["verdict"] in (out / "report.html").read_text().replace("&#39;", "'")


def test_the_report_shows_pictures_of_the_best_and_the_worst_pairs(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 18
    for what in ("event image", "aligned output", "target"):
        assert f'alt="{what} of the best pair 1' in page


def test_pictures_come_from_different_sequences_where_there_are_enough() -> None:
    sequences = np.array(["a", "a", "b", "a", "c", "b", "c"])
    assert varied(np.arange(7), sequences).tolist() == [0, 2, 4]
    assert varied(np.arange(7), np.array(["a"] * 6 + ["b"])).tolist() == [0, 6, 1]


def test_a_run_and_its_best_checkpoint_are_the_same_argument_and_repeat_exactly(
    small_store: Path, run: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    checkpoint = run / "checkpoints" / "epoch_0001"
    again = run_evaluate(EvaluateConfig(store=small_store, checkpoint=str(checkpoint), out=tmp_path, batch_size=32))
    for key in ("cosine_accept_rate", "lift", "best_baseline", "retrieval", "test_fingerprint", "checkpoint_sha256"):
        assert again[key] == result[key]
    assert again["baselines"]["shuffled"]["cos_sim_mean"] == pytest.approx(
        result["baselines"]["shuffled"]["cos_sim_mean"], abs=1e-4
    )


def test_a_split_by_windows_is_labelled_as_leaking_and_pairs_trained_on_are_counted(
    small_store: Path, run: Path, tmp_path: Path
) -> None:
    cfg = EvaluateConfig(store=small_store, checkpoint=str(run), out=tmp_path, split="window")
    result = run_evaluate(cfg)
    store = PairStore.open(small_store)
    fitted = split_pairs(store.index, SplitConfig())
    test = split_pairs(store.index, SplitConfig(by="window")).test
    seen = np.isin(test, np.concatenate([fitted.train, fitted.val])).sum()
    assert result["split"]["test_pairs_trained_on"] == seen > 0
    page = (tmp_path / "report.html").read_text()
    assert f"was trained on {seen} of the {len(test)} test pairs" in page
    assert "This split leaks" in page


def test_a_checkpoint_without_a_record_of_its_training_says_so(small_store: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / "epoch_0001", tmp_path / "alone")
    cfg = EvaluateConfig(store=small_store, checkpoint=str(tmp_path / "alone"), out=tmp_path / "out")
    result = run_evaluate(cfg)
    assert result["split"]["test_pairs_trained_on"] is None
    assert any("is not recorded" in note for note in result["warnings"])


def test_the_printed_table_has_every_baseline_and_the_sentence(result: dict[str, Any]) -> None:
    out = io.StringIO()
    render_evaluate(result, Console(width=140, file=out))
    text = out.getvalue()
    for word in ("before", "white", "mean_target", "shuffled", "previous_window", "adapter", "lift"):
        assert word in text
    assert "not token acceptance" in text


def test_an_output_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    claim_report_folder(tmp_path / "new")
    for ours in ("report.html", "alignment_metrics_S1.json", ".gitignore"):
        (tmp_path / ours).touch()
    claim_report_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StoreError, match=r"notes\.txt"):
        claim_report_folder(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        claim_report_folder(tmp_path / "notes.txt")


def test_a_damaged_checkpoint_is_named(small_store: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "epoch_0001" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    cfg = EvaluateConfig(store=small_store, checkpoint=str(tmp_path / "run"), out=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        run_evaluate(cfg)
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_in_the_store_is_found_and_the_file_named(
    small_store: Path, run: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    opened = PairStore.open(store)
    test = split_pairs(opened.index, SplitConfig()).test
    part = store / opened.files[int(opened.index.file[test[0]])].name
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    with pytest.raises(StoreError, match=part.name):
        run_evaluate(EvaluateConfig(store=store, checkpoint=str(run), out=tmp_path / "out"))


def test_a_store_of_another_width_is_refused(run: Path, tmp_path: Path) -> None:
    from numpy_source import NumpySource, build_store

    from ray_app.store.manifest import FeatureSpec

    wide = FeatureSpec(dtype="uint8", shape=(3, 8, 8), scale=1 / 255)
    store = build_store(NumpySource(num_sequences=3, num_windows=4), tmp_path / "store", wide)
    with pytest.raises(CheckpointError, match=r"768.*192"):
        run_evaluate(EvaluateConfig(store=store, checkpoint=str(run), out=tmp_path / "out"))


def test_a_gpu_that_is_not_there_is_refused_at_once(small_store: Path, run: Path, tmp_path: Path) -> None:
    cfg = EvaluateConfig(store=small_store, checkpoint=str(run), out=tmp_path / "out", use_gpu=True)
    with pytest.raises(ResourceError, match="--use-gpu"):
        run_evaluate(cfg)


@pytest.mark.parametrize(
    ("checkpoint", "error", "text"),
    [
        ("/does/not/exist", CheckpointError, "is not a folder"),
        ("models:/nothing@champion", RegistryError, "nothing"),
        ("models:/", RegistryError, "models:/NAME@ALIAS"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_one_sentence(
    small_store: Path, tmp_path: Path, checkpoint: str, error: type[Exception], text: str
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cfg = EvaluateConfig(store=small_store, checkpoint=checkpoint, out=tmp_path / "out", tracking_uri=uri)
    with pytest.raises(error, match=text):
        run_evaluate(cfg)


def test_a_cluster_without_room_for_the_evaluator_is_refused_instead_of_waited_for(
    small_store: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "START_S", 1.0)
    checkpoint = load_checkpoint(run / "checkpoints" / "epoch_0001")
    store = PairStore.open(small_store)
    held = placement_group([{"CPU": 2}])
    ray.get(held.ready())
    try:
        with pytest.raises(ResourceError, match=r"evaluator could not be started.*ray status"):
            judge.EvaluatorHandle(checkpoint, store, torch.zeros(768), use_gpu=False)
    finally:
        remove_placement_group(held)
