"""Early warnings: has a quantity that needs no evaluation left the way it went?

Entropy, length, KL and their like drift in healthy runs too, so a drift is no news. The rule: a quantity may go on
along the straight line through what it did so far, slow down, or stand still. It is warned of when its latest 2 to 4
points lie outside what is between its latest level and that line, measured in the noise around the line. The points are
means between evaluated versions, so a warning comes with an evaluation, or never.

The statistic does not change with the quantity's unit or level, nor with a straight drift, so one boundary serves all.
It is simulated on noise with heavy tails whose neighbours correlate by 0.6, and alpha is spent over the looks and
shared by the quantities (Bonferroni): at most alpha of the runs in which all drift straight, or not at all, get any
warning. benchmarks/early.py measures other drifts and other noise; AUTOCORRELATION and TAILS were chosen on other seeds
of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.mismatch import scan
from trainers.mismatch.series import Array, Curve, Integers

SHORTEST, LATEST = 2, 4  # blocks of latest points: one odd point is no way
FEWEST = 6  # points that a line goes through before anything is said
AUTOCORRELATION, TAILS = 0.6, 5  # of neighbours in the simulated noise; degrees of freedom of Student's t behind it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Early:
    """What is said about one quantity; `curve` as it was measured."""

    kind: str
    curve: Curve
    false_warning_rate: float  # per run, of this quantity alone
    warned: int | None  # evaluated version at which the warning came first; None: no warning
    not_enough: str | None = None  # why nothing is said


def warn(
    quantities: Sequence[tuple[str, Curve]],
    evaluated: Integers,
    *,
    alpha: float,
    planned: int | None,
    runs: int,
    seed: int,
) -> tuple[Early, ...]:
    """Ask the rule about each of (kind, curve) at each of the `evaluated` versions (K,).

    `alpha` false warnings per run, of all together; `planned` evaluated versions of the run, None: not known; `runs`
    simulated for the boundary.
    """
    share = alpha / max(len(quantities), 1)
    points = len(evaluated) if len(evaluated) >= FEWEST + SHORTEST else 0
    bound = scan.boundary(null(points, runs, seed), share, planned) if points else np.zeros(0)
    return tuple(_one(kind, curve, evaluated, bound, share) for kind, curve in quantities)


def _one(kind: str, curve: Curve, evaluated: Integers, bound: Array, share: float) -> Early:
    versions, values, grains = between(curve, evaluated)
    why, warned = None, None
    if len(values) < FEWEST + SHORTEST:
        why = f"not enough: {len(values)} evaluated versions have it, {FEWEST + SHORTEST} are needed"
    elif grains[-1] == 0:
        why = "it has not varied"
    else:
        crossed = departure(values[:, None], grains)[:, 0] > bound[: len(values)]
        warned = int(versions[np.argmax(crossed)]) if crossed.any() else None
    return Early(kind=kind, curve=curve, false_warning_rate=share, warned=warned, not_enough=why)


def between(curve: Curve, evaluated: Integers) -> tuple[Integers, Array, Array]:
    """Return the evaluated versions (n,) before which a curve was measured, and its means since the one before (n,).

    And at each the smallest difference between two values so far (n,), 0 if none differ: the grain of what is counted,
    as truncated answers are. What was measured after the last evaluated version has its turn at the next one.
    """
    places = np.searchsorted(evaluated, curve.versions)
    inside = places < len(evaluated)
    kept, values = places[inside], curve.mean[inside]
    counts = np.bincount(kept, minlength=len(evaluated))
    sums = np.bincount(kept, values, minlength=len(evaluated))
    there = counts > 0
    grains = []
    for last in np.cumsum(counts)[there]:
        steps = np.diff(np.unique(values[:last]))
        grains.append(steps.min() if len(steps) else 0.0)
    return evaluated[there], sums[there] / counts[there], np.array(grains)


def departure(values: Array, grains: Array | None = None) -> Array:
    """Return how far the latest points have left the way of those before, at each look (K, S) of series (K, S).

    The distance of the mean of the latest 2 to 4 points from the interval between the least-squares line at the last
    point before them and at their own time, over the standard error of a forecast by that line; the largest of the
    three. The noise is that of the line's own residuals, and at least `grains` (K,). Rows before there are 6 points for
    a line are 0.
    """
    points, runs = values.shape
    least = np.zeros(points) if grains is None else grains
    y = values - values[0]
    index = np.arange(points, dtype=np.float64)[:, None]
    zero = np.zeros((1, runs))
    sums, moments, squares = (np.concatenate([zero, np.cumsum(part, 0)]) for part in (y, index * y, y**2))
    span = np.maximum.accumulate(values, 0) - np.minimum.accumulate(values, 0)
    out = np.zeros((points, runs))
    for look in range(FEWEST, points):
        for latest in range(SHORTEST, min(LATEST, look + 1 - FEWEST) + 1):
            n = look + 1 - latest
            middle, spread = (n - 1) / 2, n * (n**2 - 1) / 12
            slope = (moments[n] - middle * sums[n]) / spread
            residual = np.maximum(squares[n] - sums[n] ** 2 / n - slope**2 * spread, 0) / (n - 2)
            noise = np.maximum(np.sqrt(residual), np.maximum(least[look], 1e-6 * span[look]))
            ahead = look - (latest - 1) / 2 - middle
            level, line = (sums[n] / n + slope * x for x in (middle, ahead))
            now = (sums[look + 1] - sums[n]) / latest
            outside = np.maximum(np.minimum(level, line) - now, now - np.maximum(level, line))
            error = noise * np.sqrt(1 / latest + 1 / n + ahead**2 / spread)
            z = np.divide(outside, error, out=np.zeros(runs), where=error > 0)
            out[look] = np.maximum(out[look], z)
    return out


def null(points: int, runs: int, seed: int) -> scan.Runs:
    """Simulate the departure at each look (points, runs) of autocorrelated noise; row t depends on t points only."""
    noise = np.stack([np.random.default_rng([seed, t]).standard_t(TAILS, runs) for t in range(points)])
    for t in range(1, points):
        noise[t] = AUTOCORRELATION * noise[t - 1] + np.sqrt(1 - AUTOCORRELATION**2) * noise[t]
    out = np.empty((points, runs), np.float32)
    for first in range(0, runs, scan.CHUNK):
        part = slice(first, first + scan.CHUNK)
        out[:, part] = departure(noise[:, part])
    return out
