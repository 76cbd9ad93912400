"""The benchmark scripts' own functions, at small sizes: a script that nobody can run here still has to work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_app.core.adapter import AdapterConfig, build_adapter
from ray_app.core.metrics import cos_sim

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_gpu_script_scores_as_the_metrics_do() -> None:
    import gpu_adapter

    adapter = build_adapter(AdapterConfig("lightweight", 300, 300, 8), 0).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    event, target = (torch.randint(1, 256, (6, 300), dtype=torch.uint8, generator=generator) for _ in range(2))
    aligned = adapter(event.to(torch.bfloat16) / 255).float()
    found = gpu_adapter.scores(adapter, event, target)
    assert torch.allclose(found, cos_sim(aligned, target / 255), atol=0.02)  # bf16 has 8 bits of mantissa
    speed = gpu_adapter.throughput(adapter, event, target, 3, torch.device("cpu"), compiled=False)
    assert speed > 0


def test_the_gpu_script_trains() -> None:
    import gpu_adapter

    generator = torch.Generator().manual_seed(0)
    event, target = (torch.randint(1, 256, (70, 40), dtype=torch.uint8, generator=generator) for _ in range(2))
    found = gpu_adapter.train(event, target, 8, 2, torch.device("cpu"))
    assert found["steps"] == 2 * 3
    assert 0 < found["cos_sim_last_batch"] <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the script would run in full")
def test_without_a_gpu_the_script_says_not_run(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks"
    script.mkdir()
    for name in ("gpu_adapter.py", "provenance.py"):
        (script / name).write_text((BENCHMARKS / name).read_text())
    subprocess.run([sys.executable, str(script / "gpu_adapter.py")], check=True, capture_output=True)
    result = json.loads((script / "results" / "gpu_adapter.json").read_text())
    assert result["status"] == "not run"
    assert "CUDA" in result["reason"]


def test_noise_on_flat_grey_is_that_of_the_model() -> None:
    import simulator_noise

    shot = simulator_noise.compare(simulator_noise.SHOT, 128, 48, 10, 0)
    leak = simulator_noise.compare(simulator_noise.LEAK | {"leak_spread": 0.0}, 128, 24, 10, 2)
    assert shot["largest_error"] < 0.03
    assert shot["largest_error_of_positive_share"] < 0.02  # 70,000 events: a standard deviation of 0.002
    assert leak["largest_error"] < 0.01
    assert leak["model_positive_share"] == 1.0


def test_the_model_of_noise_is_worked_by_hand() -> None:
    import simulator_noise

    from ray_app.events.simulator import SimulatorConfig

    exact = SimulatorConfig(sigma=0.0, shot_noise_hz=8.0, leak_rate_hz=3.0, leak_spread=0.0)
    rates = simulator_noise.model(exact, 255)  # the brightest: a quarter of the dark rate
    assert rates.on_hz == pytest.approx(1.0 + 3.0)
    assert rates.off_hz == pytest.approx(1.0)


def test_the_long_drive_is_a_true_sequence_of_the_density_asked_for(tmp_path: Path) -> None:
    import dsec_drive

    from ray_app.sources.dsec import DsecSource
    from ray_app.sources.dsec_events import DsecEvents
    from ray_app.sources.recorded import Cut

    files = dsec_drive.DsecFiles(tmp_path, "drive_00")
    files.events.parent.mkdir(parents=True)
    dsec_drive.write_long_events(files.events, dsec_drive.seconds(2, 60_000, 0), 2)
    with DsecEvents(files.events) as events:
        assert len(events) == pytest.approx(120_000, rel=0.02)
        assert events.index(events.t_offset_us + 1_000_000) == pytest.approx(60_000, rel=0.02)
        (part,) = events.parts(0, len(events))
        assert 0.4 < part.p.mean() < 0.6
    times = [dsec_drive.FIRST_FRAME_US + i * 50_000 for i in range(40)]
    files.timestamps.parent.mkdir(parents=True)
    files.timestamps.write_text("".join(f"{t}\n" for t in times))
    files.images.mkdir(parents=True)
    for i in range(40):
        (files.images / f"{i:06d}.png").touch()
    (task,) = DsecSource(tmp_path, Cut((1_000_000,))).tasks()
    assert task.num_pairs == 2


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_every_result_says_where_it_comes_from(path: Path) -> None:
    origin = json.loads(path.read_text())["provenance"]
    assert {"command", "date", "commit", "cpu", "cores"} <= set(origin)


def test_one_command_runs_every_script_of_the_endpoint_and_names_what_failed() -> None:
    from serve_all import PARTS, all_of

    asked: list[str] = []

    def run(command: str) -> int:
        asked.append(command)
        return int("kills" in command)

    assert all_of(list(PARTS), run) == ["serve_chaos.py kills"]
    scripts = {command.split()[0] for command in asked}
    assert scripts == {"serve_load.py", "serve_chaos.py", "serve_fuzz.py", "serve_memory.py"}
    written = (BENCHMARKS / "serve_chaos.py").read_text()
    for command in asked:
        assert (BENCHMARKS / command.split()[0]).is_file()
        if command.startswith("serve_chaos"):
            assert f'"{command.split()[1]}":' in written
