"""Encoders in the pipeline: the features of a store are those of its pictures, whatever the workers and kills."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from numpy.typing import NDArray
from numpy_source import SMALL, NumpySource
from rich.console import Console

from ray_app import cli
from ray_app.commands.encode.command import run_encode
from ray_app.commands.prepare.command import prepare, render_prepare, run_prepare
from ray_app.commands.prepare.encoding import FeatureEncoder, encoding_plan, stored_bytes
from ray_app.commands.prepare.store_builder import build_task, claim_store
from ray_app.commands.prepare.worker import TaskBuilder
from ray_app.config.prepare import EncodeConfig, PrepareFlags, PrepareScenes
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.registry import load_encoder
from ray_app.errors import ConfigError, InputError, ResourceError, StoreError
from ray_app.sources.base import RawPair
from ray_app.store.filesystem import open_storage
from ray_app.store.pair_store import PairStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_encoders.save(folder / "clip", "clip_vision")
    tiny_encoders.save(folder / "siglip", "siglip")
    return folder


def flags(models: Path, out: Path, **changed: Any) -> PrepareFlags:
    settings = {"event_encoder": models / "clip", "target_encoder": models / "siglip", "pool": ("cls", "2x2")}
    return PrepareFlags(**{"out": str(out), "num_workers": 2, **settings, **changed})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bf16(features: torch.Tensor) -> NDArray[np.float32]:
    return features.bfloat16().float().numpy()


@pytest.fixture(scope="module")
def encoded(models: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:  # noqa: ARG001
    """The numpy source by both encoders. Shared: copy it before changing it."""
    out = tmp_path_factory.mktemp("encoded") / "store"
    result = prepare(NumpySource(), flags(models, out), SMALL)
    assert (result["pairs"], result["rejected"], result["images"]) == (72, 0, 144)
    assert 0 < result["forward_fraction"] < 1
    assert result["feature_shapes"] == {"event": [16], "target": [4, 16]}
    render_prepare(result, Console(width=120, quiet=True))
    return out


def test_a_store_holds_the_features_of_full_pictures_and_names_their_encoders(encoded: Path, models: Path) -> None:
    store = PairStore.open(encoded)
    event_ND, target_ND = store.read_rows(np.arange(72))
    raw = [pair for task in NumpySource().tasks() for pair in NumpySource().pairs(task)]
    sides = {
        "event": (event_ND, "clip", EncoderSettings(pool="cls")),
        "target": (target_ND, "siglip", EncoderSettings(pool="2x2")),
    }
    for side, (found_ND, model, settings) in sides.items():
        encoder = load_encoder(models / model, settings)
        pictures = [[getattr(pair, f"{side}_HWC")] for pair in raw if isinstance(pair, RawPair)]
        expected_NTW = torch.cat([encoder.encode(pictures[first : first + 12]) for first in range(0, 72, 12)])
        np.testing.assert_array_equal(found_ND, bf16(expected_NTW.flatten(1)))
        assert store.feature(side).encoder == encoder.record()


@pytest.mark.parametrize("num_workers", [1, 4])
def test_bytes_do_not_depend_on_the_number_of_workers(
    num_workers: int, encoded: Path, models: Path, tmp_path: Path
) -> None:
    prepare(NumpySource(), flags(models, tmp_path / "s", num_workers=num_workers), SMALL)
    assert contents(tmp_path / "s") == contents(encoded)


def test_a_second_start_keeps_what_is_finished(encoded: Path, models: Path, tmp_path: Path) -> None:
    source, cfg = NumpySource(), flags(models, tmp_path / "s")
    plan = encoding_plan(cfg, SMALL)
    assert plan
    claim_store(cfg.out, source, source.tasks(), plan.features)
    for task in source.tasks()[2:4]:
        build_task(source, task, cfg.out, plan.features, FeatureEncoder(plan))
    assert prepare(source, cfg, SMALL)["pairs_reused"] == 24
    assert contents(tmp_path / "s") == contents(encoded)


def test_pictures_that_were_drawn_elsewhere_give_the_same_bytes(encoded: Path, models: Path, tmp_path: Path) -> None:
    """As on GPUs, where tasks draw and actors encode."""
    source, cfg = NumpySource(bad=((1, 3),)), flags(models, tmp_path / "s")
    plan = encoding_plan(cfg, SMALL)
    assert plan
    work = TaskBuilder(source, source.tasks(), open_storage(cfg.out), plan.features, plan)
    claim_store(cfg.out, source, source.tasks(), plan.features)
    rows = [work.build(work.draw({"task": task}), FeatureEncoder(plan)) for task in (0, 1)]
    assert [json.loads(row["built"])["part"]["pairs"] for row in rows] == [12, 11]
    assert (tmp_path / "s" / "drive_0000.parquet").read_bytes() == (encoded / "drive_0000.parquet").read_bytes()
    assert work.draw({"task": 0})["drawn"].items == [], "its file is there"


def test_a_rejected_pair_costs_itself_alone(encoded: Path, models: Path, tmp_path: Path) -> None:
    source = NumpySource(bad=((1, 3),))
    result = prepare(source, flags(models, tmp_path / "s", max_rejected_fraction=0.1), SMALL)
    assert (result["pairs"], result["rejected"]) == (71, 1)
    left, whole = PairStore.open(tmp_path / "s"), PairStore.open(encoded)
    assert set(whole.index.sequence[~np.isin(whole.index.sample_id, left.index.sample_id)]) == {"drive_0001"}


def test_one_side_alone_may_be_encoded(models: Path, small_store: Path, tmp_path: Path) -> None:
    cfg = EncodeConfig(out=str(tmp_path / "s"), store=str(small_store), target_encoder=models / "clip")
    run_encode(cfg)
    store, pixels = PairStore.open(tmp_path / "s"), PairStore.open(small_store)
    assert store.feature("event") == pixels.feature("event")
    np.testing.assert_array_equal(store.read_rows([5])[0], pixels.read_rows([5])[0])
    assert store.feature("target").shape == (16,)


def test_encode_gives_the_features_of_a_stores_pictures(models: Path, small_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    words = ["encode", str(small_store), "--out", str(out), "--event-encoder", str(models / "clip")]
    words += ["--target-encoder", str(models / "clip"), "--layer", "-2", "-1", "--pool", "none", "mean"]
    assert cli.run([*words, "--dtype", "fp32"]) == 0
    store, pixels = PairStore.open(out), PairStore.open(small_store)
    assert (store.index.sequence == pixels.index.sequence).all()
    assert (store.index.t_start_us == pixels.index.t_start_us).all()
    assert store.manifest.source == {**pixels.manifest.source, "encoded_from": pixels.fingerprint}
    event_ND, target_ND = (found.reshape(-1, 3, 16, 16) for found in pixels.read_rows(np.arange(12)))
    for found_ND, pictures, settings in (
        (store.read_rows(np.arange(12))[0], event_ND, EncoderSettings(layer=-2)),
        (store.read_rows(np.arange(12))[1], target_ND, EncoderSettings(pool="mean")),
    ):
        expected = load_encoder(models / "clip", settings).encode([[each.transpose(1, 2, 0)] for each in pictures])
        np.testing.assert_array_equal(found_ND, expected.flatten(1).numpy())


def test_only_a_store_of_pictures_can_be_encoded(encoded: Path, models: Path, tmp_path: Path) -> None:
    cfg = EncodeConfig(out=str(tmp_path / "s"), store=str(encoded), event_encoder=models / "clip")
    with pytest.raises(InputError, match=r"its event features, width 16 .* are no pictures of 3 colours"):
        run_encode(cfg)


def test_full_pictures_of_scenes_are_encoded(models: Path, tmp_path: Path) -> None:
    size = {"num_pairs": 2, "num_sequences": 1, "width": 64, "height": 48}
    cfg = PrepareScenes(out=str(tmp_path / "s"), event_encoder=models / "clip", pool=("none",), dtype="fp16", **size)
    run_prepare(cfg)
    spec = PairStore.open(tmp_path / "s").feature("event")
    assert (spec.shape, spec.dtype) == ((5, 16), "float16")


def test_an_encoder_that_changed_since_the_start_is_named(models: Path, tmp_path: Path) -> None:
    folder = tiny_encoders.save(tmp_path / "clip", "clip_vision")
    cfg = flags(models, tmp_path / "s", event_encoder=folder)
    plan = encoding_plan(cfg, SMALL)
    assert plan
    claim_store(cfg.out, NumpySource(), NumpySource().tasks(), plan.features)
    model = tiny_encoders.model("clip_vision")
    with torch.no_grad():
        next(model.parameters())[-1] += 1
    model.save_pretrained(folder)
    with pytest.raises(StoreError, match=r"interrupted prepare of another event encoder: its SHA-256 was .* changed"):
        prepare(NumpySource(), cfg, SMALL)
    with pytest.raises(InputError, match=r"clip is not the encoder that made these features"):
        FeatureEncoder(plan)([])  # as on a node with another folder of that name


def test_use_gpu_without_a_gpu_says_so(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"--use-gpu with 1 workers needs 1 GPUs, the cluster has 0"):
        prepare(NumpySource(), flags(models, tmp_path / "s", use_gpu=True, num_workers=1), SMALL)


def test_settings_of_encoders_need_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layer, --pool: without --event-encoder or --target-encoder"):
        PrepareScenes(out=str(tmp_path / "s"), layer=(-2,), pool=("cls",))
    with pytest.raises(ConfigError, match="encode needs --event-encoder, --target-encoder or both"):
        EncodeConfig(out=str(tmp_path / "s"), store="x")


def test_an_encoder_that_cannot_be_used_ends_the_command_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nothing"
    words = ["prepare", "scenes", "--out", str(tmp_path / "s"), "--target-encoder", str(folder)]
    assert cli.run(words) == 2
    assert f"error: {folder} does not exist" in capsys.readouterr().err
    folder.mkdir()
    assert cli.run(words) == 2
    assert f"error: {folder} has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("dtype", "fits"), [("float16", False), ("bfloat16", True), ("float32", True)])
def test_numbers_that_the_format_cannot_hold_reject_the_pair(dtype: str, fits: bool) -> None:
    stored = stored_bytes(torch.tensor([[1.0, 1e5]]), dtype, "target")
    assert isinstance(stored, bytes) == fits
    if not fits:
        assert stored == "the target feature is not finite in float16 (largest number 100000); take another --dtype"
