"""An event camera after v2e (Hu, Liu, Delbruck, arXiv 2006.07722): frames in, events out.

Log intensity, first-order low pass whose bandwidth grows with brightness, thresholds that differ from pixel
to pixel, leak, shot noise, refractory time. Unlike v2e, times are whole microseconds, interpolated linearly
between frames, and shot noise comes at any time of a step.

Shapes: H, W = sensor rows and columns, P = H · W pixels, F = pixels that fire in a step, N = events.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError

LINEAR_BELOW = 20.0
"""Grey level up to which log intensity is linear (v2e)."""
SHOT_DARK_FACTOR = 0.25
"""Shot noise of the brightest pixel relative to the darkest (v2e)."""
SMALLEST_THRESHOLD = 0.01
"""Thresholds drawn below this are raised to it (v2e)."""

Float = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """One camera. The defaults are v2e's."""

    theta_on: float = 0.2
    """Rise of log intensity that makes an ON event."""
    theta_off: float = 0.2
    """Fall of log intensity that makes an OFF event."""
    sigma: float = 0.03
    """Standard deviation of both thresholds over pixels."""
    cutoff_hz: float = 300.0
    """Bandwidth of the brightest pixel, −3 dB; 0 for infinite."""
    leak_rate_hz: float = 0.01
    """ON events for each pixel that nothing caused."""
    leak_spread: float = 0.1
    """Decades of spread of the leak over pixels."""
    shot_noise_hz: float = 0.001
    """Noise events for each dark pixel, half of them ON."""
    refractory_us: int = 500
    """Events that follow one of the same pixel within this time are lost."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ConfigError(f"simulator: {name} ({getattr(self, name)}) must not be negative")
        for name in ("theta_on", "theta_off"):
            if getattr(self, name) < SMALLEST_THRESHOLD:
                raise ConfigError(f"simulator: {name} ({getattr(self, name)}) must be at least {SMALLEST_THRESHOLD}")


@dataclass(frozen=True, slots=True)
class SimulatedEvents:
    """Events of one step in time order; arrays of length N."""

    x: NDArray[np.uint16]
    """Column."""
    y: NDArray[np.uint16]
    """Row."""
    t_us: NDArray[np.int64]
    """Time."""
    p: NDArray[np.uint8]
    """1 brighter, 0 darker."""

    @staticmethod
    def none() -> "SimulatedEvents":
        """No event."""
        return SimulatedEvents(
            np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.int64), np.zeros(0, np.uint8)
        )

    @staticmethod
    def joined(steps: list["SimulatedEvents"]) -> "SimulatedEvents":
        """Events of following steps as one."""
        return SimulatedEvents(
            *(np.concatenate([getattr(s, name) for s in steps]) for name in ("x", "y", "t_us", "p"))
        )


def log_intensity(grey: Float) -> Float:
    """Linear below 20, logarithmic above, continuous; float32, rounded to 1e-8 so that ON and OFF cancel."""
    grey = np.asarray(grey)
    slope = np.log(LINEAR_BELOW) / LINEAR_BELOW
    if grey.dtype == np.float32:  # 1e-8 is finer than float32 here
        return np.where(grey <= LINEAR_BELOW, grey * np.float32(slope), np.log(np.maximum(grey, np.float32(1))))
    value = np.where(grey <= LINEAR_BELOW, grey * slope, np.log(np.maximum(grey, 1.0)))
    return (np.round(value * 1e8) / 1e8).astype(np.float32)


class EventSimulator:
    """One camera's state from step to step.

    With `cutoff_hz` 0 the memorised level is float32, otherwise float64, as in v2e: on 8-bit video the other
    choice moves counts by about 1 %.
    """

    def __init__(self, config: SimulatorConfig, height: int, width: int, rng: np.random.Generator) -> None:
        self.config, self.height, self.width = config, height, width
        self._rng = rng
        pixels = height * width
        self._theta_on, self._theta_off = (
            np.maximum(theta + config.sigma * rng.standard_normal(pixels, np.float32), SMALLEST_THRESHOLD).astype(
                np.float32
            )
            if config.sigma
            else np.full(pixels, theta, np.float32)
            for theta in (config.theta_on, config.theta_off)
        )
        self._leak_hz = np.float32(config.leak_rate_hz) * np.power(
            np.float32(10), np.float32(config.leak_spread) * rng.standard_normal(pixels, np.float32)
        )
        self._last_us = np.full(pixels, np.iinfo(np.int64).min // 2, np.int64)
        self._t_us: int | None = None

    @property
    def t_us(self) -> int:
        """Time of the last frame."""
        assert self._t_us is not None, "start() comes first"
        return self._t_us

    def start(self, grey_HW: Float, t_us: int, *, random_phase: bool = False) -> None:
        """Return the first frame, grey levels 0 to 255, emits nothing.

        `random_phase` puts each pixel's memorised level anywhere between its two thresholds, as in a camera
        that has been running: without it no pixel fires until a whole threshold has been crossed.
        """
        level_P: Float = log_intensity(grey_HW).ravel()
        kind = np.float64 if self.config.cutoff_hz else np.float32
        self._level_P: Float = level_P.astype(kind)
        self._base_P: Float = level_P.astype(kind)
        if random_phase:
            phase_P = self._rng.random(level_P.size, np.float32)
            self._base_P += self._theta_off - phase_P * (self._theta_on + self._theta_off)
        self._t_us = t_us

    def step(self, grey_HW: Float, t_us: int) -> SimulatedEvents:
        """Events between the last frame's time and `t_us`, as this frame shows them."""
        assert t_us > self.t_us, "frames come in time order"
        config, before_us, before_P = self.config, self.t_us, self._level_P
        length_s = (t_us - before_us) * 1e-6
        grey_P: Float = np.asarray(grey_HW).ravel()
        level_P = self._filtered(log_intensity(grey_P), grey_P, length_s)
        if config.leak_rate_hz:
            self._base_P -= np.float32(length_s) * self._leak_hz * self._theta_on
        diff_P = level_P - self._base_P
        (fired,) = np.nonzero((diff_P >= self._theta_on) | (diff_P <= -self._theta_off))
        events = self._crossings(fired, diff_P[fired], before_P[fired], level_P[fired], before_us, t_us)
        if config.shot_noise_hz:
            events = [a + b for a, b in zip(events, self._shot_noise(grey_P, level_P, before_us, t_us), strict=True)]
        self._level_P, self._t_us = level_P, t_us
        pixel, time_us, polarity = (np.concatenate(parts) for parts in events)
        order = np.argsort(_narrow(time_us - before_us), kind="stable")
        y, x = np.divmod(pixel[order], self.width)
        return SimulatedEvents(x.astype(np.uint16), y.astype(np.uint16), time_us[order], polarity[order])

    def _filtered(self, log_P: Float, grey_P: Float, length_s: float) -> Float:
        """First-order low pass; its bandwidth is proportional to brightness."""
        if not self.config.cutoff_hz:
            return log_P
        brightness_P = (grey_P + 20.0) / 275.0
        share_P = np.minimum(brightness_P * (length_s * 2.0 * np.pi * self.config.cutoff_hz), 1.0)
        return (1.0 - share_P) * self._level_P + share_P * log_P

    def _crossings(
        self,
        fired: NDArray[np.intp],
        diff_F: Float,
        before_F: Float,
        after_F: Float,
        before_us: int,
        t_us: int,
    ) -> list[list[NDArray[Any]]]:
        """[pixels], [times], [polarities] of the thresholds crossed; the memorised level follows."""
        on_F = diff_F > 0
        theta_F = np.where(on_F, self._theta_on[fired], self._theta_off[fired])
        count_F = np.floor_divide(np.abs(diff_F), theta_F).astype(np.int64)
        total = int(count_F.sum())
        first_N = np.repeat(np.cumsum(count_F) - count_F, count_F)
        nth_N = np.arange(total) - first_N + 1
        source_N = np.repeat(np.arange(len(fired)), count_F)
        # Where between the frames |level − base| reached the n-th threshold.
        sign_F = np.where(on_F, 1.0, -1.0)
        start_F = (before_F - self._base_P[fired]) * sign_F
        rise_F = np.maximum((after_F - before_F) * sign_F, 1e-9)
        share_N = np.clip((nth_N * theta_F[source_N] - start_F[source_N]) / rise_F[source_N], 0.0, 1.0)
        time_N = before_us + np.rint(share_N * (t_us - before_us)).astype(np.int64)
        kept_N, kept_F = np.ones(total, bool), count_F
        if self.config.refractory_us:
            kept_N = self._outside_refractory(fired, source_N, nth_N, time_N)
            kept_F = np.bincount(source_N[kept_N], minlength=len(fired))
        move_F = kept_F.astype(np.float32) * theta_F
        self._base_P[fired] += np.where(on_F, move_F, -move_F)
        source_N = source_N[kept_N]
        return [[fired[source_N]], [time_N[kept_N]], [on_F[source_N].astype(np.uint8)]]

    def _outside_refractory(
        self, fired: NDArray[np.intp], source_N: NDArray[Any], nth_N: NDArray[Any], time_N: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Mark events that come late enough after the last one kept of their pixel; one round for each n."""
        kept_N = np.zeros(len(time_N), bool)
        by_nth = np.argsort(_narrow(nth_N), kind="stable")
        for members in np.split(by_nth, np.cumsum(np.bincount(nth_N)[1:])[:-1]) if len(nth_N) else []:
            pixels = fired[source_N[members]]
            late = time_N[members] - self._last_us[pixels] > self.config.refractory_us
            self._last_us[pixels[late]] = time_N[members[late]]
            kept_N[members[late]] = True
        return kept_N

    def _shot_noise(self, grey_P: Float, level_P: Float, before_us: int, t_us: int) -> list[list[NDArray[Any]]]:
        """Noise events; each sets its pixel's memorised level to the present one."""
        config = self.config
        length_s = (t_us - before_us) * 1e-6
        found: list[list[NDArray[Any]]] = [[], [], []]
        for polarity, theta, theta_P in (
            (1, config.theta_on, self._theta_on),
            (0, config.theta_off, self._theta_off),
        ):
            # Candidates at the highest rate of any pixel, thinned to each pixel's own (Lewis and Shedler).
            most = config.shot_noise_hz / 2 * length_s * theta / float(theta_P.min())
            candidates = self._rng.integers(0, grey_P.size, self._rng.poisson(most * grey_P.size))
            dark = (SHOT_DARK_FACTOR - 1.0) * (grey_P[candidates] + 20.0) / 275.0 + 1.0
            rate = config.shot_noise_hz / 2 * length_s * dark * theta / theta_P[candidates]
            pixels = candidates[self._rng.random(len(candidates)) * most < rate]
            self._base_P[pixels] = level_P[pixels]
            found[0].append(pixels)
            found[1].append(self._rng.integers(before_us + 1, t_us + 1, len(pixels)))
            found[2].append(np.full(len(pixels), polarity, np.uint8))
        return found


def _narrow(whole: NDArray[np.int64]) -> NDArray[Any]:
    """Return the same numbers as uint16 where they fit: NumPy sorts those by radix, some ten times faster."""
    return whole.astype(np.uint16) if whole.size and whole.min() >= 0 and whole.max() < 65536 else whole
