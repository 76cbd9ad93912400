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


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_every_result_says_where_it_comes_from(path: Path) -> None:
    origin = json.loads(path.read_text())["provenance"]
    assert {"command", "date", "commit", "cpu", "cores"} <= set(origin)
