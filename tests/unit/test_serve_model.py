"""Precision and layout of a model in service: other bytes, the same answers."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from endpoints import WIDTH, make_checkpoint
from small_adapters import save_image_tokens

import serve.model.loaded_model
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.errors import CheckpointError
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from serve.model.loaded_model import (
    AMD,
    PackedLinear,
    Precision,
    chosen_precision,
    cpu,
    load_served,
    optimise_for_device,
    use_packed_linear,
)
from serve.model.model_source import model_source

CPU = torch.device("cpu")
onednn = pytest.mark.skipif(not use_packed_linear("bf16"), reason="oneDNN does not multiply bfloat16 on this machine")
TOKENS = (4, 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(make_checkpoint(Path(tmp_path_factory.mktemp("model")) / "checkpoint"))


@onednn
@pytest.mark.parametrize("strategy", ["linear", "lightweight", "bottleneck", "token_bottleneck", "token_attention"])
def test_weights_that_lie_in_other_order_answer_as_those_that_do_not(checkpoint: Checkpoint, strategy: str) -> None:
    if strategy.startswith("token"):
        width = TOKENS[0] * TOKENS[1]
        config = AdapterConfig(strategy, width, width, hidden_dim=16, event_shape=TOKENS, target_shape=TOKENS)
        event = torch.randn(3, TOKENS[0] * TOKENS[1])
    else:
        config = AdapterConfig(strategy, WIDTH, WIDTH, hidden_dim=16)
        event = torch.rand(3, WIDTH)
    plain = build_adapter(config, 0).eval()
    packed = optimise_for_device(replace(checkpoint, adapter=copy.deepcopy(plain)), "bf16", CPU)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for rows in (1, 3):
            torch.testing.assert_close(packed(event[:rows]), plain(event[:rows]), atol=1e-2, rtol=1e-2)


@onednn
@pytest.mark.parametrize("packed", [True, False])
def test_weights_are_narrowed_when_a_model_is_loaded_and_not_in_each_pass(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """No copy in a pass is larger than the input: the first layer's matrix is `hidden` times that."""
    monkeypatch.setattr(serve.model.loaded_model, "use_packed_linear", lambda _: packed)
    adapter = optimise_for_device(replace(checkpoint, adapter=copy.deepcopy(checkpoint.adapter)), "bf16", CPU)
    layers = [module for module in adapter.modules() if isinstance(module, PackedLinear | torch.nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile(record_shapes=True) as passes,
    ):
        for _ in range(2):
            adapter(torch.rand(1, WIDTH))
    copied = [math.prod(e.input_shapes[0]) for e in passes.events() if e.name in ("aten::_to_copy", "aten::copy_")]
    assert WIDTH in copied
    assert max(copied) <= WIDTH


@onednn
@pytest.mark.parametrize("vendor", ["GenuineIntel", AMD])
def test_float32_stays_float32_with_either_library(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, vendor: str
) -> None:
    monkeypatch.setattr(serve.model.loaded_model, "cpu", lambda: {"vendor_id": vendor})
    adapter = optimise_for_device(replace(checkpoint, adapter=copy.deepcopy(checkpoint.adapter)), "fp32", CPU)
    assert any(isinstance(module, PackedLinear) for module in adapter.modules()) == (vendor == AMD)
    event = torch.rand(2, WIDTH)
    with torch.inference_mode():
        difference = (adapter(event) - checkpoint.adapter(event)).abs().max()
    assert difference < 1e-5 if vendor == AMD else difference == 0


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [("sse2 avx2", "fp32"), ("avx512f avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), ("", "fp32")],
)
def test_it_computes_in_bf16_where_the_hardware_does(
    monkeypatch: pytest.MonkeyPatch, flags: str, chosen: str
) -> None:
    monkeypatch.setattr(serve.model.loaded_model, "cpu", lambda: {"flags": flags})
    assert chosen_precision("auto", CPU) == chosen
    assert chosen_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_answers_otherwise_here_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    identity = model_source(str(folder), None).current()
    assert load_served(folder, identity, precision, use_gpu=False, max_batch=1).precision == precision
    monkeypatch.setitem(serve.model.loaded_model.LIMITS, precision, -1.0)
    monkeypatch.setattr(serve.model.loaded_model, "cpu", lambda: {"vendor_id": AMD})
    with pytest.raises(
        CheckpointError, match=rf"in {precision} on cpu its answers have a relative error of .*; serve it"
    ):
        load_served(folder, identity, precision, use_gpu=False, max_batch=1)


def test_image_tokens_are_not_served(tmp_path: Path) -> None:
    folder = save_image_tokens(tmp_path / "tokens")
    with pytest.raises(CheckpointError, match=r"tokens makes image tokens for a language model"):
        load_served(folder, model_source(str(folder), None).current(), "fp32", use_gpu=False, max_batch=1)


def test_what_linux_says_of_this_cpu_is_understood() -> None:
    assert {"flags", "Features"} & set(cpu())  # as x86 and Arm call them
