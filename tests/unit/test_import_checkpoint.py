"""A checkpoint of the reference comes over with its answers, and nothing in the file is ever run."""

import json
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_app import cli
from ray_app.commands.import_checkpoint import run_import_checkpoint
from ray_app.config.tune import ImportCheckpointConfig
from ray_app.errors import CheckpointError
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.manifest import PIXELS, Features, FeatureSpec
from ray_app.store.reference_checkpoint import read_reference_checkpoint

WIDTH, HIDDEN, SCALE = 20, 6, 0.75
SETTINGS: dict[str, Any] = {
    "event_dim": WIDTH,
    "target_dim": WIDTH,
    "hidden_dim": HIDDEN,
    "num_layers": 2,
    "dropout": 0.1,
    "temperature": 0.07,
    "use_layer_norm": True,
    "freeze_event_encoder": False,
    "use_residual": True,
    "use_whitening": False,
    "adapter_type": "mlp",
}


def pickled_config(
    module: str = "feasible.feature_alignment.lightweight", name: str = "LightweightAlignmentConfig", **changes: Any
) -> Any:
    """An instance of a dataclass that is in `module` only while `saved` writes it."""
    settings = SETTINGS | changes
    cls = make_dataclass(name, settings)
    cls.__module__ = module
    return cls(**settings)


def mlp(event_dim: int = WIDTH, target_dim: int = WIDTH, hidden: int = HIDDEN) -> nn.Sequential:
    """The reference's layers with torch's own modules, of weights that differ from their initial values."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(event_dim, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(hidden, target_dim),
    ).eval()
    for parameter in layers[1].parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return layers


def state_of(layers: nn.Sequential, scale: float = SCALE) -> dict[str, Tensor]:
    """The state dict under the reference's names."""
    weights = {f"adapter.mlp.{key}": tensor for key, tensor in layers.state_dict().items()}
    return {"scale": torch.tensor([scale]), **weights}


def document(**changes: Any) -> dict[str, Any]:
    """What the reference writes, optimizer included."""
    layers = mlp()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    layers(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    return {
        "model_state_dict": state_of(layers),
        "config": pickled_config(),
        "training_stats": {"losses": [], "similarities": [], "epochs": 0},
        "optimizer_state_dict": optimizer.state_dict(),
    } | changes


def saved(path: Path, content: Any, **options: Any) -> Path:
    """torch.save, with the config's class importable for that long and no longer."""
    config = content.get("config") if isinstance(content, dict) else None
    made = {}
    if hasattr(config, "__dataclass_fields__"):
        parts = type(config).__module__.split(".")
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]
        made = {name: types.ModuleType(name) for name in names if name not in sys.modules}
        setattr(made[names[-1]], type(config).__name__, type(config))
    sys.modules.update(made)
    try:
        torch.save(content, path, **options)
    finally:
        for name in made:
            del sys.modules[name]
    return path


def imported(file: Path, out: Path) -> dict[str, Any]:
    result = run_import_checkpoint(ImportCheckpointConfig(file=file, out=out))
    json.dumps(result, allow_nan=False)
    return result


@pytest.mark.parametrize(
    "config",
    [
        pickled_config(),
        pickled_config(module="feature_alignment.base", name="AlignmentConfig"),
        dict(SETTINGS),
        {"event_dim": WIDTH, "target_dim": WIDTH, "hidden_dim": HIDDEN},  # all else is the reference's default
    ],
    ids=["its own class", "the base class", "a dict", "a short dict"],
)
def test_the_imported_adapter_answers_as_the_reference_does(config: Any, tmp_path: Path) -> None:
    content = document(config=config)
    file = saved(tmp_path / "reference.pt", content)
    result = imported(file, tmp_path / "ckpt")
    checkpoint = load_checkpoint(tmp_path / "ckpt")

    layers = mlp()
    layers.load_state_dict(
        {k.removeprefix("adapter.mlp."): v for k, v in content["model_state_dict"].items() if "mlp" in k}
    )
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = (layers.double()(x.double()) + 0.1 * x.double()) * SCALE
    aligned = checkpoint.adapter(x).double()
    torch.testing.assert_close(aligned, expected, rtol=1e-5, atol=1e-6)

    record = result["imported_from"]
    assert record["left_out"] == ["training_stats", "optimizer_state_dict"]
    assert record["sha256"] == sha256_file(file)
    assert checkpoint.provenance["imported_from"] == record
    assert checkpoint.provenance["dataset_fingerprint"] is None
    assert checkpoint.metrics == {}
    spec = FeatureSpec(dtype="float32", shape=(WIDTH,), scale=1.0)
    assert checkpoint.features == Features(event=spec, target=spec)
    assert result["checkpoint_sha256"] == checkpoint.sha256
    assert not any(name.startswith(("feasible", "feature_alignment")) for name in sys.modules)


def test_without_a_residual_connection_the_scale_comes_over_too(tmp_path: Path) -> None:
    layers = mlp(target_dim=9)
    config = pickled_config(target_dim=9, use_residual=False)
    file = saved(tmp_path / "r.pt", document(model_state_dict=state_of(layers, -0.5), config=config))
    imported(file, tmp_path / "ckpt")
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load_checkpoint(tmp_path / "ckpt").adapter(x), layers(x) * -0.5)


def test_half_precision_weights_are_widened_without_loss(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in state_of(mlp()).items()}
    adapter = read_reference_checkpoint(saved(tmp_path / "r.pt", document(model_state_dict=state))).adapter
    assert torch.equal(adapter.state_dict()["output.weight"], state["adapter.mlp.4.weight"].float())


def test_a_feature_as_wide_as_an_image_is_an_image(tmp_path: Path) -> None:
    wide = PIXELS.width
    config = pickled_config(event_dim=wide, target_dim=wide, hidden_dim=1)
    file = saved(tmp_path / "r.pt", document(model_state_dict=state_of(mlp(wide, wide, 1)), config=config))
    assert read_reference_checkpoint(file).features == Features(event=PIXELS, target=PIXELS)


class Command:
    """Pickles as a call of os.system that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("place", ["config", "model_state_dict", "next to it", "whole"])
def test_a_pickle_that_calls_a_program_does_not_run(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command = Command(marker)
    content: Any = command if place == "whole" else document(**{"config": dict(SETTINGS), place: command})
    file = saved(tmp_path / "evil.pt", content)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system; nothing was loaded"):
        imported(file, tmp_path / "ckpt")
    assert not marker.exists()
    assert not (tmp_path / "ckpt").exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "a load that runs pickles would have run the command"


def test_a_call_that_bears_the_configs_name_is_not_made(tmp_path: Path) -> None:
    """`os.AlignmentConfig` passes the list by its name; what it is called with goes nowhere."""
    call = b"\x80\x02cfeasible\nAlignmentConfig\nX\x02\x00\x00\x00ls\x85R."
    blocked = b"\x80\x02cos\nAlignmentConfig\nX\x02\x00\x00\x00ls\x85R."
    for stream in (call, blocked, b"\x80\x02cfeasible\nAlignmentConfig\n)\x81K\x05b."):
        file = with_pickle(saved(tmp_path / "r.pt", {}), stream)
        with pytest.raises(CheckpointError, match="holds a Call, not a dict"):
            read_reference_checkpoint(file)


def with_pickle(file: Path, stream: bytes) -> Path:
    """The same archive around another pickle."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, stream if name.endswith("/data.pkl") else data)
    return file


def changed_state(**changes: Any) -> dict[str, Any]:
    """A document whose state dict has these keys changed, or left out where they are None; `__` is a dot."""
    state = state_of(mlp()) | {key.replace("__", "."): value for key, value in changes.items()}
    return document(model_state_dict={key: value for key, value in state.items() if value is not None})


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in document().items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("config"), r"has no 'config' \(it holds: model_state_dict, training_stats, optimizer_state_dict\)"),
        (without("model_state_dict"), "has no 'model_state_dict'"),
        ([1, 2], "holds a list, not a dict"),
        (document(config=3), "config is a int without fields"),
        (document(config={}), "config.event_dim is None; it must be a whole number"),
        (document(config=pickled_config(num_layers=3)), "config.num_layers is 3; only 2 can be imported"),
        (document(config=pickled_config(adapter_type="linear")), "config.adapter_type is 'linear'; only 'mlp'"),
        (document(config=pickled_config(use_whitening=True)), "config.use_whitening is True"),
        (document(config=pickled_config(use_layer_norm=False)), "config.use_layer_norm is False"),
        (document(config=pickled_config(use_residual=False)), "config.use_residual is False with event_dim 20"),
        (document(config=pickled_config(target_dim=9)), "config.use_residual is True with .* target_dim 9"),
        (document(config=pickled_config(dropout="much")), "config.dropout is 'much'"),
        (document(config=pickled_config(dropout=1.5)), r"dropout \(1\.5\) must be in"),
        (document(config=pickled_config(hidden_dim=0)), r"hidden_dim \(0\) must be at least 1"),
        (
            document(config=pickled_config(hidden_dim=7)),
            r"adapter\.mlp\.0\.weight has shape \[6, 20\], the config asks for \[7, 20\]",
        ),
        (
            document(config=pickled_config(name="ContrastiveAlignmentConfig")),
            r"asks for feasible\.feature_alignment\.lightweight\.ContrastiveAlignmentConfig",
        ),
        (changed_state(scale=None), "model_state_dict has no scale"),
        (changed_state(residual_proj__weight=torch.ones(2)), "has residual_proj.weight, which"),
        (changed_state(scale=torch.ones(2)), r"scale has shape \[2\], the config asks for \[1\]"),
        (changed_state(scale=torch.tensor([float("nan")])), "scale holds NaN"),
        (changed_state(scale=1.0), "scale is a float; it must be a tensor"),
        (changed_state(scale=torch.ones(1, dtype=torch.int64)), "scale is of LongStorage"),
        (changed_state(adapter__mlp__0__weight=torch.zeros(1).expand(HIDDEN, WIDTH)), "is not contiguous"),
        (document(model_state_dict=[1]), "model_state_dict is a list"),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(content: Any, message: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "r.pt", content)
    with pytest.raises(CheckpointError, match=message) as error:
        imported(file, tmp_path / "ckpt")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["r.pt"]


def test_a_file_that_is_no_whole_archive_of_torch_is_named_for_what_it_is(tmp_path: Path) -> None:
    content = document()
    whole = saved(tmp_path / "r.pt", content)
    data = whole.read_bytes()
    weight = content["model_state_dict"]["adapter.mlp.4.weight"].numpy().tobytes()[:16]
    file = tmp_path / "other.pt"

    def refused(content: bytes | None, message: str) -> None:
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            read_reference_checkpoint(file)
        assert "\n" not in str(error.value)

    refused(None, "is not a file")
    refused(b"", "is not a torch checkpoint")
    refused(b"\x93NUMPY and so on", "is not a torch checkpoint")
    refused(pickle.dumps({"config": 1}), "is not a torch checkpoint")
    for share in (0.1, 0.5, 0.99):
        refused(data[: int(len(data) * share)], "is truncated")
    assert data.count(weight) == 1
    at = data.index(weight)
    refused(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], r"is damaged: the checksum of .* does not hold")
    saved(file, document(), _use_new_zipfile_serialization=False)
    refused(None, r"was written by torch before 1\.6")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "text")
    refused(None, "not one of torch.save")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(None, "is compressed")
    with_pickle(saved(file, document()), b"\x80\x02garbage")
    refused(None, "cannot be read as a torch checkpoint")


def test_a_pickle_that_claims_more_numbers_than_the_file_has_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "r.pt", {"config": SETTINGS, "model_state_dict": {"scale": torch.ones(1)}})
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        stream = archive.read(name)
    one_number = b"X\x03\x00\x00\x00cpuq"
    at = stream.index(one_number) + len(one_number) + 1
    assert stream[at : at + 2] == b"K\x01"  # the storage's length
    claims = stream[:at] + b"J\x00\x00\x00\x10" + stream[at + 2 :]
    with_pickle(file, claims.replace(b"K\x01\x85q", b"J\x00\x00\x00\x10\x85q", 1))
    with pytest.raises(CheckpointError):
        read_reference_checkpoint(file)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u.", "nested deeper"),
        (b"\x80\x02}(" + b")" + b"\x85" * 20 + b"K\x01u.", "a key that is no text or number but a tuple"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "more values or levels"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + b"\xff" * 7 + b"\x0f\x85R.", "asks for builtins.bytearray"),
        (b"\x80\x02N" * 500_000 + b".", "more values or levels"),
    ],
    ids=["depth", "key", "lists", "bytearray", "values"],
)
def test_a_pickle_that_would_break_an_unpickler_is_refused(stream: bytes, message: str, tmp_path: Path) -> None:
    file = with_pickle(saved(tmp_path / "r.pt", {}), stream)
    with pytest.raises(CheckpointError, match=message):
        read_reference_checkpoint(file)


@pytest.mark.parametrize("width", [10**12, 2**31, 10**400])
def test_widths_that_no_machine_holds_are_refused_before_anything_is_made(width: int, tmp_path: Path) -> None:
    config = pickled_config(event_dim=width, target_dim=width, hidden_dim=width)
    with pytest.raises(CheckpointError, match=r"config cannot be used|a whole number of"):
        read_reference_checkpoint(saved(tmp_path / "r.pt", document(config=config)))


def test_the_command_writes_a_checkpoint_and_says_what_it_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = saved(tmp_path / "reference.pt", document()), tmp_path / "ckpt"
    assert cli.run(["import-checkpoint", str(file), "--out", str(out)]) == 0
    text = capfd.readouterr().out
    assert "left out: training_stats, optimizer_state_dict" in text
    assert "metrics and training pairs are unknown" in text
    before = load_checkpoint(out).sha256
    assert cli.run(["import-checkpoint", str(file), "--out", str(out)]) == 2
    assert "already exists" in capfd.readouterr().err.replace("\n", " ")
    assert load_checkpoint(out).sha256 == before
