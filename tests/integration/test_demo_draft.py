"""`demo draft` on tiny models: a drafter that `decode` takes, the same after interruptions."""

from pathlib import Path
from typing import Any

import pytest
import tiny_target

from ray_app.commands.decode.command import run_decode
from ray_app.commands.demo import draft
from ray_app.commands.demo.decode import write_prompts
from ray_app.commands.demo.draft import run_demo_draft
from ray_app.config.decode import DecodeConfig
from ray_app.config.demo import DemoDraftConfig
from ray_app.errors import ConfigError, InputError, StoreError
from ray_app.store.atomic import sha256_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target.save_target(tmp_path_factory.mktemp("models"))


def test_an_interrupted_drafter_ends_with_the_same_weights_and_decode_takes_it(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(name: str) -> DemoDraftConfig:
        (tmp_path / name).mkdir()
        tracking = f"sqlite:///{tmp_path / name}/mlflow.db"
        out = tmp_path / name / "drafter"
        return DemoDraftConfig(target=target, out=out, size="small", num_test_drives=3, tracking_uri=tracking)

    cfg, again = settings("one"), settings("two")
    result = run_demo_draft(cfg)
    rates = result["tokens_per_target_pass"]
    for each in rates.values():
        low, high = each["interval95"]
        assert 1.0 <= low <= each["mean"] <= high <= 9.0

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for stage in ("write_draft_stores", "run_train", "write_drafter"):
        with monkeypatch.context() as patch:
            patch.setattr(draft, stage, killed)
            with pytest.raises(KeyboardInterrupt):
                run_demo_draft(again)
    assert run_demo_draft(again)["tokens_per_target_pass"] == rates
    for part in ("early_exit.safetensors", "event_tokens.safetensors"):
        assert sha256_file(cfg.out / part) == sha256_file(again.out / part)
    assert run_demo_draft(cfg)["kept"]

    prompts = write_prompts(tmp_path / "pictures", 3, seed=0)
    decode = DecodeConfig(
        source=(prompts,), target=target, out=tmp_path / "out", drafter=(str(cfg.out),), max_new_tokens=8, watch=True
    )
    assert run_decode(decode)["results"]["drafter"]["texts_that_differ"] == 0

    for other in ({"loss": "lk"}, {"kind": "eagle_head"}):
        with pytest.raises(StoreError, match=r"drafter\.build is of a build of other settings"):
            run_demo_draft(cfg.model_copy(update=other))
    with pytest.raises(InputError, match="build it first: ray-app demo build"):
        run_demo_draft(cfg.model_copy(update={"target": tmp_path / "none"}))
    with pytest.raises(InputError, match="is no target that `demo build` made"):
        run_demo_draft(cfg.model_copy(update={"target": target / "language_model"}))


def test_a_head_on_the_targets_states_is_trained_measured_and_decoded_with(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = DemoDraftConfig(
        kind="eagle_head",
        target=target,
        out=tmp_path / "head",
        size="small",
        num_test_drives=3,
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(draft, "write_drafter", killed)
        with pytest.raises(KeyboardInterrupt):
            run_demo_draft(cfg)
    result = run_demo_draft(cfg)
    ((name, rate),) = result["tokens_per_target_pass"].items()
    low, high = rate["interval95"]
    assert name == "the target's own states"
    assert 1.0 <= low <= rate["mean"] <= high <= 9.0
    assert {path.name for path in cfg.out.iterdir()} == {
        "drafter.json",
        "eagle_head.safetensors",
        "provenance.json",
        "MANIFEST.sha256",
    }
    assert run_demo_draft(cfg)["kept"]

    prompts = write_prompts(tmp_path / "pictures", 2, seed=0)
    decode = DecodeConfig(
        source=(prompts,), target=target, out=tmp_path / "out", drafter=(str(cfg.out),), max_new_tokens=8, watch=True
    )
    assert run_decode(decode)["results"]["head"]["texts_that_differ"] == 0
    with pytest.raises(ConfigError, match="--loss lk is for the image tokens of events; an eagle_head learns by KL"):
        DemoDraftConfig(kind="eagle_head", loss="lk")
