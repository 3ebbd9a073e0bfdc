"""What the path of an evaluation may be: Gaussian models of its true values, so far and ahead.

Every model is a covariance of the true values, so that its forecast is exact and cheap. Units: values in the amplitude,
about what the curve has moved so far; time t and distance x = sqrt(KL) from the base in what lies behind, so that both
are 1 now.

    level        a random walk around the base, still or moving: persistence, smoothed
    around       a stationary process around the base: what was gained or lost comes back
    trend        the slope reverts to 0 (integrated Ornstein-Uhlenbeck process): from a line to a random walk
    linear       c + a x
    best-of-n    c + x (alpha - beta x), beta >= 0       Gao, Schulman & Hilton 2022
    rl           c + x (alpha - beta log x), beta >= 0   the same
    saturating   c + a (1 - exp(-k x))
    plateau      a line to some version, then level
    concave      a line with one bend down at any version; averaged over where, a concave curve of free form
    convex       the same with a bend up
    jump         a plateau with a jump at its start
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainers.mismatch.series import Array

STILL, UNMOVED = ("level", "around"), 0.3  # models without a trend, and their probability beforehand
WALKS = (0.0, 0.1, 0.3, 1.0)  # standard deviation of a random walk over all that lies behind
MEMORIES, SPREADS = (0.02, 0.1, 0.3), (0.2, 0.6)  # of what happens around the base
REVERSIONS = (0.3, 1.0, 3.0, 10.0)  # of a trend's slope, over all that lies behind
SLOPES = (0.7, 2.0, 6.0)  # standard deviation of a trend's slope
RATES = (2.0, 5.0, 12.0)  # k of a saturating curve
SLOPE, BEND, JUMP = 1.5, 3.0, 1.0  # standard deviations of a line's slope, of what a bend adds to it, of a jump
LAWS = {"best-of-n": (3.0, 1.5), "rl": (2.0, 1.5)}  # of alpha and beta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """G models of N = n + m values, so far and ahead, and of the coefficient that a model holds at 0 or more."""

    names: tuple[str, ...]
    prior: Array  # (G,) probabilities: UNMOVED for those in STILL; the names are equally likely, and the models of one
    covariance: Array  # (G, N + 1, N + 1); the last row is the coefficient's, 0 where a model has none


def models(time: Array, distances: Array, seen: int) -> Models:
    """Return every model at `time` (N,), of which the first `seen` lie behind, and at `distances` (k, N).

    The k rows of `distances` are the ways in which the distance may go on, equally likely.
    """
    found = list(_models(time, distances, seen))
    names = tuple(name for name, _ in found)
    counts = {name: names.count(name) for name in names}
    still = sum(name in STILL for name in counts)
    shares = {name: UNMOVED / still if name in STILL else (1 - UNMOVED) / (len(counts) - still) for name in counts}
    prior = np.array([shares[name] / counts[name] for name in names])
    return Models(names=names, prior=prior, covariance=np.stack([covariance for _, covariance in found]))


def _models(time: Array, distances: Array, seen: int) -> Iterator[tuple[str, Array]]:
    size = len(time)
    for walk in WALKS:
        yield "level", _linear(size) + _padded(walk**2 * np.minimum(time[:, None], time))
    for memory, spread in itertools.product(MEMORIES, SPREADS):
        yield "around", _linear(size) + _padded(spread**2 * np.exp(-np.abs(time[:, None] - time) / memory))
    for reversion, slope in itertools.product(REVERSIONS, SLOPES):
        yield "trend", _linear(size) + _padded(_integrated(time, reversion, slope))
    for x in distances:
        yield "linear", _linear(size, SLOPE * x)
        for k in RATES:
            yield "saturating", _linear(size, SLOPE * np.expm1(-k * x) / np.expm1(-k))
        for name, (alpha, beta) in LAWS.items():
            bend = np.log(np.maximum(x, 1e-300)) if name == "rl" else x
            yield name, _linear(size, alpha * x, bounded=(-x * bend, beta))
    for knot in time[1 : seen - 1]:
        line, after = np.minimum(time, knot) / knot, np.maximum(time - knot, 0)
        yield "plateau", _linear(size, SLOPE * line)
        yield "concave", _linear(size, SLOPE * time, bounded=(-after, BEND))
        yield "convex", _linear(size, SLOPE * time, bounded=(after, BEND))
        yield "jump", _linear(size, SLOPE * line, JUMP * (time > knot))


def _linear(size: int, *columns: Array, bounded: tuple[Array, float] | None = None) -> Array:
    """Covariance (N + 1, N + 1) of a base and `columns` (N,), each times a standard normal coefficient.

    `bounded`: one more column, and the standard deviation of its coefficient, which is the last row.
    """
    rows = np.zeros((size + 1, 1 + len(columns) + (bounded is not None)))
    rows[:-1, 0] = 1
    for place, column in enumerate(columns, 1):
        rows[:-1, place] = column
    if bounded is not None:
        rows[:-1, -1], rows[-1, -1] = bounded[1] * bounded[0], bounded[1]
    return np.asarray(rows @ rows.T)


def _padded(covariance: Array) -> Array:
    return np.pad(covariance, (0, 1))


def _integrated(time: Array, reversion: float, slope: float) -> Array:
    """Covariance (N, N) of the integral from 0 of a stationary Ornstein-Uhlenbeck process of deviation `slope`."""
    left = np.exp(-reversion * time)
    apart = np.exp(-reversion * np.abs(time[:, None] - time))
    together = 2 * reversion * np.minimum(time[:, None], time) + left[:, None] + left - 1 - apart
    return np.asarray((slope / reversion) ** 2 * together)
