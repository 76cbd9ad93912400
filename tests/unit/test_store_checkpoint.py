"""A checkpoint is wholly there or not at all, loads bit for bit, and never with a byte that has changed."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from small_adapters import save_image_tokens, small_adapter

from ray_app.core.adapters.base import Adapter
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.adapters.slices import FeatureSlice
from ray_app.errors import CheckpointError, StoreError
from ray_app.store import atomic as durable
from ray_app.store.checkpoint import (
    StreamedTensor,
    load_checkpoint,
    load_training_state,
    replay_golden,
    save_checkpoint,
    save_training_state,
    verify_folder,
)
from ray_app.store.golden import NUM_ROWS, TOLERANCE
from ray_app.store.manifest import PIXELS, Features, FeatureSpec

SPEC = FeatureSpec(dtype="uint8", shape=(3, 4, 4), scale=1 / 255)
FEATURES = Features(event=SPEC, target=SPEC)


def adapter_of(strategy: str = "lightweight", seed: int = 0) -> Adapter:
    return small_adapter(strategy, seed)


def saved(folder: Path, adapter: Adapter | None = None) -> Path:
    save_checkpoint(
        folder,
        adapter or adapter_of(),
        metrics={"val_loss": 0.25},
        provenance={"argv": ["x"]},
        features=FEATURES,
    )
    return folder


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Changes a file together with its sum, which no accident does."""
    (folder / name).write_bytes(data)
    names = sorted(path.name for path in folder.iterdir() if path.name != "MANIFEST.sha256")
    sums = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    (folder / "MANIFEST.sha256").write_text(sums)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_loaded_adapter_answers_bit_for_bit_like_the_saved_one(strategy: str, tmp_path: Path) -> None:
    adapter = adapter_of(strategy).eval()
    checkpoint = load_checkpoint(saved(tmp_path / "c", adapter))
    x = torch.rand(5, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(checkpoint.adapter(x), adapter(x))
    assert not checkpoint.adapter.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in checkpoint.adapter.parameters())
    assert (checkpoint.config, checkpoint.features) == (adapter.config, FEATURES)
    assert (checkpoint.metrics, checkpoint.provenance) == ({"val_loss": 0.25}, {"argv": ["x"]})


def test_the_folder_holds_six_files_and_their_sums(tmp_path: Path) -> None:
    folder = saved(tmp_path / "runs" / "c")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    identity = files.pop("MANIFEST.sha256")
    assert sorted(files) == [
        "config.json",
        "golden.safetensors",
        "metrics.json",
        "model.safetensors",
        "provenance.json",
    ]
    lines = (folder / "MANIFEST.sha256").read_text().splitlines()
    assert lines == [f"{files[name]}  {name}" for name in sorted(files)]
    assert load_checkpoint(folder).sha256 == verify_folder(folder) == identity
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def test_the_same_checkpoint_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    assert verify_folder(saved(tmp_path / "a")) == verify_folder(saved(tmp_path / "b"))
    assert verify_folder(saved(tmp_path / "c", adapter_of(seed=1))) != verify_folder(tmp_path / "a")


@pytest.mark.parametrize("kind", ["checkpoint", "training state"])
def test_a_flipped_byte_anywhere_is_found_and_its_file_named(kind: str, tmp_path: Path) -> None:
    folder, load = tmp_path / "c", load_checkpoint
    if kind == "checkpoint":
        saved(folder)
    else:
        save_training_state(folder, {"m": torch.rand(40), "step": torch.tensor(7)}, {"epoch": 3})
        load = load_training_state  # type: ignore[assignment]
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        intact = path.read_bytes()
        places = [0, len(intact) - 1, *rng.integers(0, len(intact), 60).tolist()]
        for place in range(len(intact)) if path.name == "MANIFEST.sha256" else places:
            flipped = bytearray(intact)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"is damaged|is missing") as error:
                load(folder)
            assert path.name in str(error.value)
        path.write_bytes(intact)
    load(folder)


def test_a_missing_file_and_a_folder_without_sums_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    (folder / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.json is missing"):
        load_checkpoint(folder)
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no MANIFEST\.sha256"):
            load_checkpoint(other)


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    before = verify_folder(folder)
    with pytest.raises(CheckpointError, match="already exists"):
        saved(folder, adapter_of(seed=1))
    assert verify_folder(folder) == before


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", full_disk)
        with pytest.raises(StoreError, match="No space left"):
            saved(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".c.partial").mkdir()  # as a killed process leaves it
    (tmp_path / ".c.partial" / "model.safetensors").write_bytes(b"half")
    assert verify_folder(saved(tmp_path / "c"))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_features_of_another_width_or_scale_are_refused_with_both_named(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "c"))
    checkpoint.require(FEATURES)
    with pytest.raises(CheckpointError, match=r"trained on target features of width 48.*has width 150528"):
        checkpoint.require(Features(event=SPEC, target=PIXELS))
    with pytest.raises(CheckpointError, match="event features"):
        checkpoint.require(Features(event=SPEC.model_copy(update={"scale": 1.0}), target=SPEC))


def test_an_adapter_that_aligns_nothing_fits_no_store(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_image_tokens(tmp_path / "tokens"))
    with pytest.raises(CheckpointError, match=r"makes image tokens for a language model.*`ray-app demo evaluate"):
        checkpoint.require(checkpoint.features)


def changed_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        rewrite(folder, "config.json", json.dumps(config).encode())

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "format 'other'"),
        (lambda c: c.pop("adapter"), r"config\.json cannot be used"),
        (lambda c: c["adapter"].update(strategy="magic"), r"magic"),
        (lambda c: c["adapter"].update(surprise=1), "surprise"),
        (lambda c: c["adapter"].update(hidden_dim=9), r"model\.safetensors does not fit its config\.json"),
        (lambda c: c["features"]["event"].update(dtype="int4"), r"config\.json cannot be used"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "c")
    changed_config(change)(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


DOCUMENTS: list[tuple[str, bytes, str]] = [
    ("config.json", b"[]", "a list, not an object"),
    ("config.json", b"[" * 10**6, "nested deeper"),
    ("config.json", b'{"format": [[[[1]]]]}', "format None"),
    ("config.json", b"\xff", "no UTF-8 text"),
    ("config.json", b"1" * 5000, "4300 digits"),
    ("metrics.json", b"[]", "a list, not an object"),
    ("metrics.json", b'{"val":' * 10**5, "nested deeper"),
    ("provenance.json", b"[]", "a list, not an object"),
    ("provenance.json", b"", "Expecting value"),
    ("model.safetensors", b"", "cannot be used"),
    ("model.safetensors", b"\xff" * 100, "cannot be used"),
    ("model.safetensors", save({"a": torch.ones(1)}), "does not fit"),
    ("model.safetensors", save({f"{i}": torch.ones(0) for i in range(500)}), "does not fit"),
]
"""File, bytes, and words of the refusal."""


@pytest.mark.parametrize(("name", "data", "message"), DOCUMENTS)
def test_a_file_whose_sum_holds_and_whose_content_does_not_is_refused(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "c")
    rewrite(folder, name, data)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_checkpoint(folder)
    assert name in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_golden_answers_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    for data in (
        b"\xff" * 100,
        save({"event": torch.ones(2, 48)}),
        save({"event": torch.ones(0), "aligned": torch.ones(0)}),
    ):
        folder = saved(tmp_path / f"{len(data)}")
        rewrite(folder, "golden.safetensors", data)
        with pytest.raises(CheckpointError, match=r"golden\.safetensors"):
            replay_golden(load_checkpoint(folder))


@pytest.mark.parametrize(
    "adapter",
    [
        [], 3, {"depth": 10**8}, {"hidden_dim": 10**12}, {"event_dim": 10**400}, {"target_dim": -1},
        {"dropout": "much"}, {"dropout": float("nan")}, {"hidden_dim": True},
        {"hidden_dim": 8.0}, {"strategy": []}, {"event_shape": 7},
        {"event_shape": [[1]]}, {"event_shape": [1] * 50}, {"event_shape": [10**9, 10**9, 10**9]}, {"rank": None},
        {"event_shape": ["3", 4, 4]}, {"mean_start": "yes"}, {"hidden_dim": 2**31 - 1}, {"x" * 10**5: 1},
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
@pytest.mark.parametrize("strategy", ["lightweight", "conv", "token_attention"])
def test_settings_of_an_adapter_that_nothing_holds_are_refused(adapter: Any, strategy: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", adapter_of(strategy))

    def change(config: dict[str, Any]) -> None:
        config["adapter"] = config["adapter"] | adapter if isinstance(adapter, dict) else adapter

    changed_config(change)(folder)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(folder)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("shape", [[], [0], [-1], [10**30] * 3, [1] * 100, "abc", [[48]], [47], None, ["x"] * 10**5])
def test_features_of_a_shape_that_nothing_has_are_refused(shape: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    changed_config(lambda config: config["features"]["event"].update(shape=shape))(folder)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used") as refused:
        load_checkpoint(folder)
    assert len(str(refused.value)) < 1000


def test_training_state_comes_back_bit_for_bit_without_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read or written")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    tensors = {
        "0.exp_avg": torch.rand(3, 4).t(),  # not contiguous
        "0.step": torch.tensor(5.0),
        "rng": torch.get_rng_state(),
        "bf16": torch.rand(7).bfloat16(),
    }
    save_training_state(tmp_path / "t", tensors, {"epoch": 3, "lr": 0.1})
    found, meta = load_training_state(tmp_path / "t")
    assert meta == {"epoch": 3, "lr": 0.1}
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert load_checkpoint(saved(tmp_path / "c"))


def changed_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        rewrite(folder, "model.safetensors", save(tensors))

    return apply


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"ridge"}))  # far outside of what it was solved on here
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_a_checkpoint_answers_its_golden_inputs_as_it_did_when_it_was_saved(
    strategy: str, dtype: Any, tmp_path: Path
) -> None:
    side = FeatureSpec(dtype=dtype, shape=(48,), scale=0.5)
    features = Features(event=side, target=side)
    adapter = adapter_of(strategy)
    save_checkpoint(tmp_path / "c", adapter, metrics={}, provenance={}, features=features)
    checkpoint = load_checkpoint(tmp_path / "c")
    before = {key: tensor.clone() for key, tensor in load_file(tmp_path / "c" / "golden.safetensors").items()}
    replay_golden(checkpoint)
    assert (before["event"].dtype, before["event"].shape) == (getattr(torch, dtype), (NUM_ROWS, 48))
    expected = adapter.double().eval()(before["event"].double() * 0.5)
    error = (before["aligned"] - expected).detach().abs().max() / expected.detach().square().mean().sqrt()
    assert error < TOLERANCE / 10


def test_saving_leaves_the_adapter_as_it_was(tmp_path: Path) -> None:
    adapter = adapter_of().train()
    adapter.input.weight.grad = torch.ones_like(adapter.input.weight)  # type: ignore[union-attr]
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in training with --precision bf16
        saved(tmp_path / "c", adapter)
    assert all(module.training for module in adapter.modules())
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    assert torch.equal(adapter.input.weight.grad, torch.ones_like(adapter.input.weight))  # type: ignore[union-attr, arg-type]
    assert all(torch.equal(before[key], tensor) for key, tensor in adapter.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    checkpoint = load_checkpoint(tmp_path / "c")
    replay_golden(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed_weights(lambda w: w["output.weight"][7].mul_(1.01)),
            "golden row 0 is answered with a relative error",
        ),
        (changed_weights(lambda w: w["input_norm.bias"].add_(1e-3)), "golden row 0"),
        (changed_weights(lambda w: w["output.bias"][:1].fill_(float("nan"))), "relative error of nan"),
        (changed_config(lambda c: c["features"]["event"].update(scale=1 / 256)), "golden row 0"),
        (changed_config(lambda c: c["adapter"].update(target_dim=48)), None),
        (lambda folder: rewrite(folder, "golden.safetensors", b"nothing"), r"golden\.safetensors cannot be used"),
        (lambda folder: rewrite(folder, "golden.safetensors", save({"event": torch.ones(4, 9)})), "does not fit"),
    ],
)
def test_another_weight_or_config_is_found_by_its_answers_though_every_sum_holds(
    change: Callable[[Path], None], message: str | None, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "c")
    change(folder)
    checkpoint = load_checkpoint(folder)
    if message is None:
        replay_golden(checkpoint)
        return
    with pytest.raises(CheckpointError, match=message):
        replay_golden(checkpoint)


def test_another_formula_is_found_and_another_rounding_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "c"))
    forward = type(checkpoint.adapter).forward

    def rounded(self: Adapter, event_BE: torch.Tensor, noise: None = None) -> torch.Tensor:
        return forward(self, event_BE, noise) * (1 + TOLERANCE / 10)

    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoint.adapter), "forward", rounded)
        replay_golden(checkpoint)
    monkeypatch.setattr(torch, "relu", torch.nn.functional.gelu)
    with pytest.raises(CheckpointError, match=r"golden row 0 .*limit 1e-04.*the version of this program"):
        replay_golden(checkpoint)


def test_a_checkpoint_without_golden_answers_loads_but_cannot_be_replayed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    (folder / "golden.safetensors").unlink()
    rewrite(folder, "config.json", (folder / "config.json").read_bytes())
    checkpoint = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"has no golden\.safetensors.*Train it again"):
        replay_golden(checkpoint)


@pytest.mark.parametrize("row", range(NUM_ROWS))
def test_every_golden_row_is_compared(row: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    golden = load_file(folder / "golden.safetensors")
    golden["aligned"][row] *= 1.01
    rewrite(folder, "golden.safetensors", save(golden))
    with pytest.raises(CheckpointError, match=f"golden row {row} is answered"):
        replay_golden(load_checkpoint(folder))


def test_a_golden_answer_of_zeros_is_right_only_if_the_answer_is_zeros(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    golden = load_file(folder / "golden.safetensors")
    golden["aligned"][1] = 0.0
    rewrite(folder, "golden.safetensors", save(golden))
    with pytest.raises(CheckpointError, match="golden row 1"):
        replay_golden(load_checkpoint(folder))


def test_streamed_weights_make_the_very_files_of_whole_ones(tmp_path: Path) -> None:
    adapter, features = adapter_of(), {"metrics": {}, "provenance": {}, "features": FEATURES}
    save_checkpoint(tmp_path / "whole", adapter, **features)
    streamed = {
        name: StreamedTensor(tuple(weight.shape), iter(weight.split(5)))
        for name, weight in sorted(adapter.state_dict().items())
    }
    save_checkpoint(tmp_path / "streamed", adapter, **features, weights=streamed)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("strategy", [name for name, kind in STRATEGIES.items() if kind.DIVISIBLE])
def test_of_a_whole_checkpoint_a_part_of_the_features_is_read(strategy: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", adapter_of(strategy))
    whole = load_checkpoint(folder).adapter.state_dict()
    for index in range(3):
        adapter = load_checkpoint(folder, FeatureSlice(index, 3)).adapter
        for name, weight in adapter.state_dict().items():
            place = adapter.slices()[name].place if name in adapter.slices() else ()
            assert torch.equal(weight, whole[name][place]), name
    (folder / "model.safetensors").write_bytes(save({name: weight[:1] for name, weight in whole.items()}))
    rewrite(folder, "config.json", (folder / "config.json").read_bytes())
    rewrite(folder, "model.safetensors", (folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load_checkpoint(folder, FeatureSlice(0, 3))
