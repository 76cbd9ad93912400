"""What a sweep needs and what it may cost: memory, time, and the budget that ends it. Without Ray."""

import io
import os
import pty
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import sized, spec_file, sweep_config

from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.tune.estimate import Estimate, confirm_estimate, kept_share, max_concurrent
from ray_app.commands.tune.search import Budget
from ray_app.commands.tune.trials import Trial
from ray_app.config.tune import TuneConfig
from ray_app.errors import ConfigError, ResourceError


def test_the_error_of_a_space_beyond_the_memory_names_its_largest_setting(small_store: Path, tmp_path: Path) -> None:
    space = {"hidden_dim": {"log": [8, 4_000_000]}, "strategy": ["linear", "bottleneck"]}
    sweep = sized(tmp_path, small_store, space=space)
    info = ClusterInfo(cpus=4, gpus=0, memory_bytes=8 * 2**30, node_cpus=(4,))
    with pytest.raises(
        ResourceError, match=r"hidden_dim 4000000, strategy bottleneck has .* the largest node has 8.0 GiB"
    ):
        max_concurrent(sweep, info)
    bases = sized(tmp_path, small_store, space={"rank": [4, 8]}, base={"strategy": "lowrank"})
    assert max(run.buffer_bytes for run in bases.extreme) == 4 * 2 * (768 + 768 * 8 + 8)

    def concurrent(info: ClusterInfo, parameters: int = 0, buffer_bytes: int = 0, **changes: Any) -> int:
        """Trials at a time of a sweep whose largest trial has this size."""
        run = replace(sweep.extreme[0], parameters=parameters, buffer_bytes=buffer_bytes)
        cfg = sweep.cfg.model_copy(update=changes)
        return max_concurrent(replace(sweep, cfg=cfg, extreme=(run,)), info)

    assert concurrent(info) == 4
    assert concurrent(info, max_concurrent_trials=2) == 2
    assert concurrent(info, parameters=2**28) == 1, "memory for one at a time"
    assert concurrent(info, buffer_bytes=3 * 2**30) == 2, "other tensors count as well as parameters"
    nodes = replace(info, node_cpus=(1, 3), node_memory_bytes=(5 * 2**30, 4 * 2**30))
    assert concurrent(nodes) == 1 + 3
    assert concurrent(nodes, buffer_bytes=2 * 2**30) == 1 + 1, "each node holds one of 3 GiB"
    with pytest.raises(ResourceError, match=r"5\.0 GiB of other tensors.* the largest node has 5\.0 GiB"):
        concurrent(nodes, buffer_bytes=5 * 2**30)
    with pytest.raises(ResourceError, match="1 workers of 8 CPUs need 8 CPUs, the cluster has 4"):
        concurrent(info, cpus_per_worker=8.0)
    with pytest.raises(ResourceError, match="needs 1 GPUs, the cluster has 0"):
        concurrent(info, use_gpu=True)


@pytest.mark.parametrize(("answer", "begins"), [("y", True), ("n", False), ("", False)])
def test_an_estimate_above_a_limit_is_asked_about_on_a_terminal(
    answer: str,
    begins: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cfg = sweep_config(spec_file(tmp_path, max_hours=1.0, max_gpu_hours=2.0, use_gpu=True))
    estimate = Estimate(4, 1, hours=0.9, hours_expected=0.5, gpu_hours=3.0, final_hours=0.25, measured="")
    master, slave = pty.openpty()
    with open(slave) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        os.write(master, f"{answer}\n".encode())
        if begins:
            confirm_estimate(cfg, estimate)
        else:
            with pytest.raises(ConfigError, match="nothing was started"):
                confirm_estimate(cfg, estimate)
    os.close(master)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match=r"3 GPU hours is above max_gpu_hours 2.*--yes"):
        confirm_estimate(cfg, estimate)
    capfd.readouterr()
    confirm_estimate(cfg, replace(estimate, gpu_hours=2.0))
    assert "for 4 trials, 1 at a time, then about 15.0 min for 3 seeds of the winner" in capfd.readouterr().err
    confirm_estimate(cfg.model_copy(update={"final": False}), replace(estimate, gpu_hours=2.0))
    assert "winner" not in capfd.readouterr().err


def test_hours_and_gpu_hours_end_the_search(tmp_path: Path) -> None:
    """GPU hours are those of all trials, one GPU for each worker; of earlier starts, too."""
    cfg = sweep_config(spec_file(tmp_path, max_hours=1.0, max_gpu_hours=2.0, use_gpu=True, num_workers=2))

    def spent(used_s: float, *trial_s: float, cfg: TuneConfig = cfg) -> str:
        trials = [Trial(n, f"t{n}", {}, 1, seconds=seconds) for n, seconds in enumerate(trial_s)]
        return Budget(cfg, used_s, trials).spent or ""

    assert spent(0.0, 1790.0, 1800.0) == ""
    assert "--max-gpu-hours 2 are used up" in spent(0.0, 1800.0, 1800.0)
    assert "--max-hours 1 are used up" in spent(3600.0)
    assert spent(0.0, 1e6, cfg=cfg.model_copy(update={"use_gpu": False})) == ""
    assert Budget(cfg, 0.0, [])("", {"done": True}) is False, "a trial that ends without a report"
    running = Budget(cfg, 0.0, [Trial(0, "a", {}, 1, seconds=1800.0)])
    for name, seconds, ends in (("b", 1000.0, False), ("a", 1900.0, False), ("b", 1700.0, True)):
        assert running("", {"trial": name, "seconds": seconds}) is False, "no trial is stopped alone"
        assert running.stop_all() == ends


def test_what_asha_keeps_by_hand(tmp_path: Path) -> None:
    """Nine epochs, thirds at 1 and 3: 1 + 2/3 + 6/9 of 9."""
    cfg = sweep_config(spec_file(tmp_path, base={"num_epochs": 9}))
    assert kept_share(cfg) == pytest.approx((1 + 2 / 3 + 6 / 9) / 9)
    assert kept_share(cfg.model_copy(update={"scheduler": "none"})) == 1.0
