"""The Python API: align, evaluate and report without Ray; wrong ranges are errors, not wrong answers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import assert_self_contained
from small_runs import make_run

import ray_app
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.errors import CheckpointError, ConfigError, InputError, StoreError
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.reference_checkpoint import KEYS

VECTOR = FeatureSpec(dtype="float32", shape=(6,), scale=1.0)
TOKENS = FeatureSpec(dtype="float32", shape=(4, 8), scale=1.0)


@pytest.fixture(scope="module")
def run(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(small_store, tmp_path_factory.mktemp("api") / "run", steps=20)


def saved(folder: Path, strategy: str, event: FeatureSpec, target: FeatureSpec) -> Path:
    """A checkpoint of a random adapter."""
    config = AdapterConfig(
        strategy, event.width, target.width, 8, dropout=0.0, event_shape=event.shape, target_shape=target.shape
    )
    adapter = build_adapter(config, 0)
    features = Features(event=event, target=target)
    save_checkpoint(folder, adapter.eval(), metrics={}, provenance={}, features=features)
    return folder


def test_importing_it_takes_neither_ray_nor_torch_and_so_not_two_seconds() -> None:
    code = (
        "import sys, ray_app; dir(ray_app); sys.exit(', '.join({'ray', 'torch', 'mlflow'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


def test_align_and_evaluate_import_no_ray_until_a_report(run: Path, small_store: Path) -> None:
    code = (
        "import sys, ray_app\n"
        f"part = ray_app.open_store({str(small_store)!r}).part('test')\n"
        f"ray_app.load({str(run)!r}).align(part.numpy()[0])\n"
        "sys.exit(', '.join({'ray', 'mlflow'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


def test_names_that_are_not_there_are_attribute_errors() -> None:
    assert {"load", "open_store", "write_store", "train", "LightweightAlignmentModule"} <= set(ray_app.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ray_app.lode  # noqa: B018


@pytest.mark.parametrize("kind", [str, Path])
def test_images_give_images_whether_uint8_or_float_and_rows_give_rows(
    kind: type, run: Path, small_store: Path
) -> None:
    model = ray_app.load(kind(run))
    images, _ = ray_app.open_store(kind(small_store)).part("test").numpy()
    aligned = model.align(images)
    assert (aligned.shape, aligned.dtype) == (images.shape, np.float32)
    rows = images.reshape(len(images), -1)
    with torch.no_grad():
        expected = model.checkpoint.adapter(torch.tensor(rows).float() / 255).numpy()
    np.testing.assert_allclose(aligned.reshape(len(rows), -1), expected, atol=1e-6)
    np.testing.assert_allclose(model.align(rows), expected, atol=1e-6)
    np.testing.assert_allclose(model.align(rows / np.float32(255)), expected, atol=1e-5)
    np.testing.assert_allclose(model.align(torch.tensor(images)).reshape(len(rows), -1), expected, atol=1e-6)


PIXELS = np.full((2, 3, 16, 16), 100, np.uint8)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (PIXELS.astype(np.float32), "values go from 100 to 100; as floats this model's pixels are 0 to 1"),
        (PIXELS[0], r"shape \[3, 16, 16\]; this model takes a batch of \(B, 3, 16, 16\) or \(B, 768\)"),
        (PIXELS.transpose(0, 2, 3, 1), r"shape \[2, 16, 16, 3\]"),
        (PIXELS.astype(np.int32), "events are int32; give uint8"),
        (PIXELS * np.float32(np.nan), "row 0 holds a number that is not finite"),
        (PIXELS * 0, "row 0 holds only zeros"),
        (PIXELS / np.float32(-255), "values go from -0.39"),
    ],
)
def test_events_that_cannot_be_right_are_refused(events: Any, words: str, run: Path) -> None:
    with np.errstate(divide="ignore"), pytest.raises(InputError, match=words):
        ray_app.load(run).align(events)


def test_uint8_for_a_model_of_encoder_features_is_refused(tmp_path: Path) -> None:
    model = ray_app.load(saved(tmp_path / "v", "linear", VECTOR, VECTOR))
    with pytest.raises(
        InputError, match="events are uint8, pixels; this model takes vectors of an encoder's features"
    ):
        model.align(np.ones((2, 6), np.uint8))
    assert model.align(np.ones((2, 6), np.float16)).shape == (2, 6)


def test_sequences_of_different_lengths_give_the_same_lengths(tmp_path: Path) -> None:
    model = ray_app.load(saved(tmp_path / "t", "token_bottleneck", TOKENS, TOKENS))
    given = [np.random.default_rng(n).normal(size=(n, 8)).astype(np.float32) for n in (1, 4, 2)]
    aligned = model.align(given)
    assert [tokens.shape for tokens in aligned] == [(1, 8), (4, 8), (2, 8)]
    for tokens, alone in zip(given, aligned, strict=True):  # an untrained one is the identity
        np.testing.assert_allclose(alone, tokens, atol=1e-6)
    assert model.align(np.stack([given[2], given[2]])).shape == (2, 2, 8)
    with pytest.raises(InputError, match=r"sequence 1 has the shape \[5, 8\]; this model takes 1 to 4 tokens of 8"):
        model.align([given[0], np.ones((5, 8))])


def test_an_evaluation_is_that_of_the_cosines_with_every_baseline(run: Path, small_store: Path) -> None:
    model, part = ray_app.load(run), ray_app.open_store(small_store).part("test")
    result = model.evaluate(part)
    event, target = (side.reshape(len(part), -1) / 255 for side in part.numpy())
    aligned = model.align(event)
    cosine = (aligned * target).sum(1) / np.linalg.norm(aligned, axis=1) / np.linalg.norm(target, axis=1)
    assert result["cos_sim_mean"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert set(result["baselines"]) >= {"before", "white", "mean_target", "shuffled"}
    assert result["split"]["test_pairs_trained_on"] == 0
    best = max(
        of["cosine_accept_rate"]["0.80"] for name, of in result["baselines"].items() if name != "previous_window"
    )
    assert result["lift"] == pytest.approx((cosine > 0.8).mean() - best)


def test_a_report_is_a_page_a_notebook_shows_and_the_test_part_is_found(run: Path, tmp_path: Path) -> None:
    model = ray_app.load(run)
    assert "bottleneck" in repr(model)
    assert "<td>bottleneck</td>" in model._repr_html_()
    report = model.report()
    assert report.result["pairs"] == 12
    assert "mean_target" in report._repr_html_()
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert_self_contained(page)
    assert report.result["verdict"].split(":")[0] in page


def test_a_report_of_unknown_pairs_asks_for_them(tmp_path: Path) -> None:
    model = ray_app.load(saved(tmp_path / "v", "linear", VECTOR, VECTOR))
    with pytest.raises(
        ConfigError, match=r"does not record the store it was trained on; give a part: report\(pairs\)"
    ):
        model.report()


def test_pairs_of_other_features_are_not_evaluated(tmp_path: Path, small_store: Path) -> None:
    model = ray_app.load(saved(tmp_path / "v", "linear", VECTOR, VECTOR))
    with pytest.raises(
        CheckpointError, match=r"was trained on event features of width 6 .*, the store has width 768"
    ):
        model.evaluate(ray_app.open_store(small_store).part("test"))


def test_parts_of_a_store_are_its_split_as_numpy_and_torch(small_store: Path) -> None:
    store = ray_app.open_store(small_store)
    assert "72 pairs of 6 sequences, train 48, val 12, test 12" in repr(store)
    parts = [store.part(name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [48, 12, 12]
    sequences = [set(part.sequences.tolist()) for part in parts]
    assert not sequences[0] & sequences[2]
    event, _ = store.part("test").numpy()
    values, targets = store.part("test").torch()
    np.testing.assert_allclose(values.reshape(event.shape), event / 255, atol=1e-6)
    assert (targets.dtype, targets.shape) == (torch.float32, (12, 768))
    with pytest.raises(ConfigError, match="parts train, val, test, all, not 'trian'"):
        store.part("trian")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="does not exist"):
        ray_app.open_store(small_store / "nowhere")


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        ray_app.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no MANIFEST\.sha256"):
        ray_app.load(tmp_path)


def test_the_module_of_the_reference_loads_its_state_dict(tmp_path: Path) -> None:
    folder = saved(tmp_path / "r", "lightweight_reference", VECTOR, VECTOR)
    ours = ray_app.load(folder).checkpoint.adapter
    back = {ours: theirs for theirs, ours in KEYS.items()}
    state = {back[name]: tensor for name, tensor in ours.state_dict().items()}
    checkpoint = {"config": {"event_dim": 6, "target_dim": 6, "hidden_dim": 8}, "model_state_dict": state}

    model = ray_app.LightweightAlignmentModule(checkpoint["config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()
    events = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(events), ours(events))
    assert not torch.equal(model.train()(events), model(events))  # torch draws its dropout
    with pytest.raises(ConfigError, match=r"config\.hidden_dim is None"):
        ray_app.LightweightAlignmentModule({"event_dim": 6, "target_dim": 6})
