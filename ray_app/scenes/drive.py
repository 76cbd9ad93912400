"""Motion of the ego vehicle: a speed that changes and comes to halts, along a road that bends.

Both are endless: speeds repeat after about `DRIVE_S`, bends after `ROAD_M`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Generator = np.random.Generator

DRIVE_S = 300.0
ROAD_M = 3000.0
VIEW_M = 140.0
"""Distance up to which things are drawn."""
FINE_M = 0.5
"""Distance between samples of the road's course."""


@dataclass(frozen=True, slots=True)
class Halt:
    """A halt of the ego vehicle."""

    begin_s: float
    """Time at which it comes to a stop."""
    end_s: float
    """Time at which it starts again."""
    s: float
    """Position in metres along the road."""


class Drive:
    """Speed against time: straight pieces between knots. Distance is their exact integral."""

    def __init__(self, rng: Generator, cruise: float, halt_share: float) -> None:
        """`cruise`: usual speed in metres per second; `halt_share`: share of speed changes that are halts."""
        first = v = cruise * rng.uniform(0.8, 1.1)
        times, speeds = [0.0], [first]
        while times[-1] < DRIVE_S:
            if rng.random() < halt_share:
                then = cruise * rng.uniform(0.6, 1.2)
                phases = [(v / 3.0, 0.0), (rng.uniform(1.5, 5.0), 0.0), (then / 2.2, then)]
            else:
                then = cruise * rng.uniform(0.55, 1.3)
                phases = [(rng.uniform(1.5, 3.5), then), (rng.uniform(1.0, 6.0), then)]
            for length, v in phases:
                times.append(times[-1] + length)
                speeds.append(v)
        times.append(times[-1] + 3.0)
        speeds.append(first)
        self._t, self._v = np.array(times), np.array(speeds)
        pieces = np.diff(self._t) * (self._v[1:] + self._v[:-1]) / 2
        self._s = np.concatenate([[0.0], np.cumsum(pieces)])
        standing = np.flatnonzero((self._v[:-1] == 0.0) & (self._v[1:] == 0.0))
        self._halts = [Halt(float(self._t[i]), float(self._t[i + 1]), float(self._s[i])) for i in standing]

    def at(self, t_s: float) -> tuple[float, float]:
        """Distance driven in metres, and speed in metres per second."""
        rounds, t = divmod(t_s, self._t[-1])
        i = min(int(np.searchsorted(self._t, t, side="right")) - 1, len(self._t) - 2)
        since = t - self._t[i]
        rate = (self._v[i + 1] - self._v[i]) / (self._t[i + 1] - self._t[i])
        v = self._v[i] + rate * since
        return float(rounds * self._s[-1] + self._s[i] + (self._v[i] + v) / 2 * since), float(v)

    def halts_near(self, t_s: float) -> list[Halt]:
        """Halts that begin between 15 s before `t_s` and 30 s after it."""
        now, period_s, period_m = t_s // self._t[-1], float(self._t[-1]), float(self._s[-1])
        shifted = [
            Halt(halt.begin_s + k * period_s, halt.end_s + k * period_s, halt.s + k * period_m)
            for k in (now - 1, now, now + 1)
            if k >= 0
            for halt in self._halts
        ]
        return [halt for halt in shifted if -15.0 < halt.begin_s - t_s < 30.0]


class Road:
    """Curvature along the road, and what it does to the view.

    Bends are small-angle: distance ahead is distance along the road, and a bend moves what is there aside.
    """

    GRID_M: FloatArray = np.arange(0.0, VIEW_M + 41.0)
    """Distances at which `bend` answers."""

    def __init__(self, rng: Generator, most: float) -> None:
        """`most`: greatest curvature, 1 / radius in metres."""
        at, bends = [0.0], [0.0]
        while at[-1] < ROAD_M - 500.0:
            kappa = float(rng.choice([-1, 1]) * most * rng.uniform(0.25, 1.0))
            ramp = rng.uniform(6.0, 16.0)
            hold = min(rng.uniform(0.15, 1.2) / abs(kappa), 250.0)
            for length, value in ((rng.uniform(10.0, 110.0), 0.0), (ramp, kappa), (hold, kappa), (ramp, 0.0)):
                at.append(at[-1] + length)
                bends.append(value)
        self._s = np.arange(0.0, ROAD_M + self.GRID_M[-1] + 2 * FINE_M, FINE_M)
        kappa_fine = np.interp(self._s % ROAD_M, [*at, ROAD_M], [*bends, 0.0])
        self._heading = _integral(kappa_fine)
        self._aside = _integral(self._heading)

    def heading(self, s: float) -> float:
        """Radians turned to the right since s = 0."""
        rounds, rest = divmod(s, ROAD_M)
        per_round, turned = np.interp([ROAD_M, rest], self._s, self._heading)
        return float(rounds * per_round + turned)

    def bend(self, s: float) -> FloatArray:
        """Offset of the road's middle to the right, in metres, at each distance of `GRID_M` from `s`."""
        rest = s % ROAD_M
        ahead = np.interp(rest + self.GRID_M, self._s, self._aside)
        return ahead - ahead[0] - np.interp(rest, self._s, self._heading) * self.GRID_M


def _integral(values: FloatArray) -> FloatArray:
    return np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * FINE_M)])
