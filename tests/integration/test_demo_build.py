"""`demo build` on tiny models: a target that `decode` takes, the same after interruptions, and judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_eye

from ray_app.commands.decode.command import run_decode
from ray_app.commands.demo import build
from ray_app.commands.demo.build import run_demo_build
from ray_app.commands.demo.decode import write_prompts
from ray_app.config.decode import DecodeConfig
from ray_app.config.demo import DemoBuildConfig
from ray_app.errors import InputError, ResourceError, StoreError
from ray_app.scenes.captions import FACTS
from ray_app.store.atomic import sha256_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "encoder": tiny_eye.save_encoder(folder / "encoder"),
        "language_model": tiny_eye.save_language_model(folder / "language_model"),
    }


def settings(folder: Path, models: dict[str, Path], **changed: Any) -> DemoBuildConfig:
    tracking = f"sqlite:///{folder}/mlflow.db"
    return DemoBuildConfig(
        out=folder / "demo", size="small", num_test_drives=3, tracking_uri=tracking, **models, **changed
    )


def weights(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.suffix in (".safetensors",)}


def test_an_interrupted_build_ends_with_the_same_weights_and_decode_takes_them(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    cfg, again = settings(tmp_path / "one", models), settings(tmp_path / "two", models)
    result = run_demo_build(cfg)
    assert set(result["sight"]["kinds"]) == set(FACTS)
    assert not result["kept"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for stage in ("write_rows", "run_train", "write_parts", "join_parts"):
        with monkeypatch.context() as patch:
            patch.setattr(build, stage, killed)
            with pytest.raises(KeyboardInterrupt):
                run_demo_build(again)
    run_demo_build(again)
    assert weights(cfg.out) == weights(again.out)
    assert len(weights(cfg.out)) == 3
    golden = [json.loads((each.out / "golden.json").read_text(encoding="utf-8")) for each in (cfg, again)]
    assert golden[0] == golden[1]
    kept = run_demo_build(cfg)
    assert kept["kept"]
    assert kept["sight"] == result["sight"]

    prompts = write_prompts(tmp_path / "pictures", 3, seed=0)
    decode = DecodeConfig(
        source=(prompts,), target=cfg.out, out=tmp_path / "out", drafter=("hybrid",), max_new_tokens=8, watch=True
    )
    assert run_decode(decode)["results"]["hybrid"]["texts_that_differ"] == 0

    with pytest.raises(StoreError, match=r"demo holds another model"):
        run_demo_build(cfg.model_copy(update={"seed": 1}))
    (cfg.out / "facts.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"facts\.json is missing or damaged"):
        run_demo_build(cfg)


def test_what_cannot_be_built_is_said_before_anything_is_written(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.build").mkdir()
    (tmp_path / "demo.build" / "notes.txt").touch()
    with pytest.raises(StoreError, match=r"demo\.build holds something else"):
        run_demo_build(settings(tmp_path, models))
    monkeypatch.setattr(build, "MEMORY_FACTOR", 1e12)
    with pytest.raises(ResourceError, match=r"building needs .* GiB of memory, .* GiB are free"):
        run_demo_build(settings(tmp_path, models))
    with pytest.raises(InputError, match="no language model of Llama's kind"):
        run_demo_build(settings(tmp_path, {**models, "language_model": models["encoder"]}))
