"""Noise of the event simulator on flat grey, against the formulas of its model (v2e's).

    python -m benchmarks.data.simulator_noise

Grey that never changes fires by noise alone. Each source of noise runs alone, for three seeds, at several grey
levels, with v2e's spread of thresholds. Writes benchmarks/results/simulator_noise.json.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.provenance import require_commit, save
from ray_app.events.simulator import SMALLEST_THRESHOLD, EventSimulator, SimulatorConfig

STEP_US = 10_000
SEEDS = (0, 1, 2)
GREYS = (10, 128, 250)
SHOT, LEAK = {"shot_noise_hz": 5.0, "leak_rate_hz": 0.0}, {"shot_noise_hz": 0.0, "leak_rate_hz": 5.0}


@dataclass(frozen=True)
class Measured:
    """Events of one run, as rates for each pixel."""

    on_hz: float
    """Brighter."""
    off_hz: float
    """Darker."""


def measure(config: SimulatorConfig, grey: int, seed: int, size: int, seconds: float, warm_s: float) -> Measured:
    """Rates over `seconds`, after `warm_s` in which pixels lose the phase that they started with."""
    simulator = EventSimulator(config, size, size, np.random.default_rng(seed))
    frame = np.full((size, size), grey, np.uint8)
    simulator.start(frame, 0, random_phase=True)
    counts = np.zeros(2, np.int64)
    for t_us in range(STEP_US, round((warm_s + seconds) * 1e6) + 1, STEP_US):
        events = simulator.step(frame, t_us)
        if t_us > warm_s * 1e6:
            counts += np.bincount(events.p, minlength=2)
    off_hz, on_hz = (counts / (size * size * seconds)).tolist()
    return Measured(on_hz, off_hz)


def model(config: SimulatorConfig, grey: int) -> Measured:
    """Mean rates by v2e's equations, integrated over the spread of thresholds and of leak.

    Shot noise of each polarity: shot/2 · (1 − 0.75 · (grey + 20)/275) · E[θ/θ_pixel]; leak: leak · E[10^(spread·N)].
    """
    dark = (0.25 - 1) * (grey + 20) / 275 + 1
    normal = np.linspace(-8, 8, 200_001)
    weight = np.exp(-(normal**2) / 2)
    weight /= weight.sum()

    def shot_hz(theta: float) -> float:
        pixel = np.maximum(theta + config.sigma * normal, SMALLEST_THRESHOLD)
        return config.shot_noise_hz / 2 * dark * float((weight * theta / pixel).sum())

    leak_hz = config.leak_rate_hz * math.exp((config.leak_spread * math.log(10)) ** 2 / 2)
    return Measured(shot_hz(config.theta_on) + leak_hz, shot_hz(config.theta_off))


def compare(noise: dict[str, float], grey: int, size: int, seconds: float, warm_s: float) -> dict[str, Any]:
    """Measured against the model: the worst of the seeds."""
    config = SimulatorConfig(**noise)  # type: ignore[arg-type]
    wanted = model(config, grey)
    found = [measure(config, grey, seed, size, seconds, warm_s) for seed in SEEDS]
    total = wanted.on_hz + wanted.off_hz
    return {
        "grey": grey,
        "model_hz": round(total, 6),
        "measured_hz": [round(one.on_hz + one.off_hz, 6) for one in found],
        "largest_error": round(max(abs((one.on_hz + one.off_hz) / total - 1) for one in found), 5),
        "model_positive_share": round(wanted.on_hz / total, 5),
        "largest_error_of_positive_share": round(
            max(abs(one.on_hz / (one.on_hz + one.off_hz) - wanted.on_hz / total) for one in found), 5
        ),
    }


def main() -> None:
    save(
        "simulator_noise",
        {
            "what": "flat grey, 128 x 128 pixels, 20 s after 5 s; v2e's default thresholds 0.2 ± 0.03 and 300 Hz; "
            "rates are events for each pixel and second, the worst of three seeds",
            "shot_noise_5hz": [compare(SHOT, grey, 128, 20, 5) for grey in GREYS],
            "leak_5hz": [compare(LEAK, grey, 128, 20, 5) for grey in GREYS],
        },
    )


if __name__ == "__main__":
    require_commit()
    main()
