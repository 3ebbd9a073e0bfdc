"""The sequential scan for a fall: contrasts of earlier points with the latest ones, and their boundary.

H0, about the true values g of one evaluation: g_t >= max over s < t of g_s, less a margin, at every version t. A
contrast has weights w that sum to 0, whose sums from the first point to any other are at least 0, and whose positive
ones sum to 1. So under H0 the mean of w . values is at most the margin, and

    z = (w . values - margin) / (standard error of w . values, times the noise scale) - handicap

is at most what the same noise gives on a constant path with margin 0, before the noise scale: that one is larger in
distribution where the path bends, and the same where it is straight. So a boundary that is simulated on the constant
path holds for all of H0, rising paths included. Values are winsorised first, which leaves H0 as it is. The scan is the
largest z of a look. Alpha is spent over the looks as in Lan & DeMets 1983.

The contrasts: for a fall that began 3 points ago, each of two shapes of it less its isotonic regression, the contrast
of the most powerful test against the nearest rising path (Robertson, Wright & Dykstra 1988, chapter 2); for all others,
means of an earlier block less the mean of the latest 2 or 4 points. Those are many, so they have a handicap.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import isotonic_regression

from trainers.mismatch.series import Array, Integers

AGE = 3  # points since the peak, of the falls that have a shape
RISE = 1 / 3  # slope before the peak of a kink, of the slope after it
LATEST = {2: 1.0, 4: 1.7}  # the latest block's length: handicap; wide blocks mistake slow errors for a fall
LENGTHS = (2, 4, 8, 16, 32, 64, 128)  # of the earlier block, each moved by half of itself
FURTHEST = 8  # lengths of the earlier block between it and the latest one, at most
WINSORISED = 4.0  # effective standard errors by which one evaluation can fall below the one before
HALF_SPENT = 10  # looks after which half of alpha is spent, when their number is not known
DIAGONAL_FLOOR = 0.5  # of the median standard error so far
CONTRAST_FLOOR = 0.05  # of the standard error of the same contrast, were the versions independent
PRIOR_LOOKS = 12  # weight of the stated standard errors against the ones seen in third differences
ORDER = 3  # of those differences
OUTLIER = 16.0  # a squared standardised third difference counts as at most this
TINY = 1e-12  # of a weight that is 0 but for rounding
CHUNK = 2_000  # simulated runs at a time: they stay in the processor's cache

Runs = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contrasts:
    """The C contrasts of one look. Points [start, stop) are the earlier ones of each, the last `latest` the latest."""

    look: int  # t, the latest point
    weights: Array  # (C, t + 1)
    start: Integers  # (C,)
    stop: Integers  # (C,) of a shape: the point after the peak
    latest: Integers  # (C,)
    handicap: Array  # (C,) in standard errors; of a shape: 0
    sd: Array  # (C,) standard error, in the evaluation's unit


def floored(covariance: Array) -> Array:
    """Raise variances (K, K) of points whose standard error is below half of the median of the positive ones so far.

    Scores near a bound have a standard error near 0 that is itself an accident; noise is added, so no pair becomes
    more certain than it was. Point t depends on points up to t only, or on the first positive one. Raises ValueError
    if there is none.
    """
    se = np.sqrt(np.diag(covariance))
    if not np.any(se > 0):
        raise ValueError("every standard error is 0")
    if se.min() >= DIAGONAL_FLOOR * se.max():
        return covariance  # no median is above the largest
    first = int(np.argmax(se > 0))
    seen = [se[: max(t, first) + 1] for t in range(len(se))]
    lowest = np.array([DIAGONAL_FLOOR * np.median(part[part > 0]) for part in seen])
    return np.asarray(covariance + np.diag(np.maximum(lowest**2 - se**2, 0)))


def contrasts(covariance: Array, look: int) -> Contrasts:
    """Return every contrast of the look at point `look` >= 1, from the covariance (K, K) of the points' errors."""
    weights, stop, handicap = _weights(look)
    seen = covariance[: look + 1, : look + 1]
    variance = np.sum(weights @ seen * weights, 1)
    independent = weights**2 @ np.diag(seen)
    return Contrasts(
        look=look,
        weights=weights,
        start=np.argmax(weights > 0, 1),
        stop=stop,
        latest=np.argmax(weights[:, ::-1] >= 0, 1),
        handicap=handicap,
        sd=np.sqrt(np.maximum(variance, CONTRAST_FLOOR**2 * independent)),
    )


@functools.lru_cache(maxsize=256)
def _weights(look: int) -> tuple[Array, Integers, Array]:
    """Return weights (C, t + 1), stop (C,) and handicap (C,) of every contrast, not to be written to."""
    found = [*_shapes(look), *_blocks(look)]
    weights, handicap = np.stack([one for one, _, _ in found]), np.array([one for _, _, one in found])
    return weights, np.array([one for _, one, _ in found]), handicap


def _shapes(look: int) -> Iterator[tuple[Array, int, float]]:
    """Yield weights (t + 1,), stop and handicap of the kink and the parabola."""
    age = min(AGE, look)
    time = np.arange(look + 1) - float(look - age)
    for shape in (np.where(time < 0, RISE * time, -time), -(time**2)):
        weights = shape - isotonic_regression(shape).x
        weights[np.abs(weights) < TINY] = 0
        yield weights / np.sum(weights[weights > 0]), look - age + 1, 0.0


def _blocks(look: int) -> Iterator[tuple[Array, int, float]]:
    """Yield weights (t + 1,), stop and handicap of the blocks; one of 2 points ends next to the latest ones only."""
    for latest, handicap in LATEST.items():
        for length in LENGTHS:
            for gap in range(0, FURTHEST * length + 1 if length > 2 else 3, length // 2):
                stop = look + 1 - latest - gap
                if stop < length:
                    break
                weights = np.zeros(look + 1)
                weights[stop - length : stop] = 1 / length
                weights[-latest:] = -1 / latest
                yield weights, stop, handicap


def effective_errors(covariance: Array) -> Array:
    """Return standard deviations of the differences of neighbours over the square root of 2 (K - 1,), of (K, K)."""
    variance = np.diag(covariance)
    return np.asarray(np.sqrt(np.maximum(variance[1:] + variance[:-1] - 2 * np.diag(covariance, 1), 0) / 2))


def winsorised(values: Array, covariance: Array) -> Array:
    """Let no point of series (K, S) fall below the one before by more than 4 effective standard errors of (K, K).

    So a single outlier is no fall; a fall that lasts is seen in full one point later. Of a path within H0, what is left
    lies within H0: each value stays between the two that it is made of.
    """
    out = values.copy()
    out[1:] = np.maximum(values[1:], values[:-1] - WINSORISED * effective_errors(covariance)[:, None])
    return out


def null_paths(covariance: Array, runs: int, seed: int) -> Array:
    """Simulate errors (K, runs) of `covariance` (K, K); row t depends on the first t + 1 points only."""
    points = len(covariance)
    root = np.linalg.cholesky(covariance + 1e-9 * covariance.trace() / points * np.eye(points))
    return np.asarray(root @ np.stack([np.random.default_rng([seed, t]).standard_normal(runs) for t in range(points)]))


def null_maxima(covariance: Array, runs: int, seed: int, versions: Integers | None = None) -> Runs:
    """Simulate the scan's maximum at each look, (K, runs), on a constant path with errors of `covariance` (K, K).

    `versions` (K,) of the points; none: at equal distances. Row t depends on the first t + 1 points only, so that a
    boundary does not move when points are added.
    """
    return path_maxima(null_paths(covariance, runs, seed), covariance, versions=versions)


def path_maxima(
    paths: Array,
    covariance: Array,
    margins: Array | None = None,
    *,
    versions: Integers | None = None,
    last_only: bool = False,
) -> Runs:
    """Return the scan's maximum at each look (K, S) of S series (K, S), errors of `covariance` (K, K).

    `margins` (K,) by look, in the evaluation's unit; none: 0. `versions` (K,) of the points; none: at equal distances.
    Row 0 is minus infinity: one point has nothing to be compared with; with `last_only` so are all rows but the last.
    """
    points, runs = paths.shape
    unit = float(np.sqrt(covariance.trace() / points))
    less = np.zeros(points) if margins is None else margins
    looks = [contrasts(covariance, look) for look in range(points - 1 if last_only else 1, points)]
    maxima = np.full((points, runs), -np.inf, np.float32)
    for first in range(0, runs, CHUNK):
        part = slice(first, first + CHUNK)
        scale = noise_scale(paths[:, part], covariance, versions).astype(np.float32)
        values = (winsorised(paths[:, part], covariance) - paths[0, part]) / unit
        values = values.astype(np.float32)
        for at in looks:
            weights = (at.weights * (unit / at.sd)[:, None]).astype(np.float32)
            z = weights @ values[: at.look + 1] - (less[at.look] / at.sd).astype(np.float32)[:, None]
            z /= scale[at.look]
            z -= at.handicap.astype(np.float32)[:, None]
            maxima[at.look, part] = z.max(0)
    return maxima


def boundary(maxima: Runs, alpha: float, planned: int | None = None) -> Array:
    """Return the boundary (K,) which `maxima` (K, S) of a constant path cross in at most `alpha` of the runs.

    `planned` points known beforehand: alpha is spent evenly over their looks. None: by look t, alpha t / (t + 10) is
    spent (Lan & DeMets 1983: any increasing function will do), which never runs out and costs power. Both use only what
    is known by look t. Entry 0 is infinite, as are the entries past `planned`.
    """
    points, runs = maxima.shape
    alive, out = np.ones(runs, bool), np.full(points, np.inf)
    for look in range(1, points if planned is None else min(points, planned)):
        spent = look / (look + HALF_SPENT) if planned is None else look / (planned - 1)
        crossing = int(alpha * spent * runs) - int(np.sum(~alive))
        if crossing > 0:  # one more run lies beyond the n-th largest of m with probability n / (m + 1)
            row = maxima[look][alive]
            out[look] = np.partition(row, -crossing)[-crossing]
            beyond = row >= out[look]
            if np.sum(beyond) > crossing:  # ties, as where a statistic cannot be had yet: only what lies above crosses
                beyond = row > out[look]
            alive[alive] = ~beyond
    return out


def for_prompts(bound: Array, prompts: int | None) -> Array:
    """Widen a boundary (K,) for a covariance estimated from `prompts` prompts: the same tail of Student's t."""
    if prompts is None:
        return bound
    return np.asarray(stats.t.isf(stats.norm.sf(bound), prompts - 1))


def noise_scale(values: Array, covariance: Array, versions: Integers | None = None) -> Array:
    """Return by how much, at least 1, series (K, S) show their standard errors to be understated, at each look (K, S).

    The mean squared third divided difference up to the look, each in units of its own variance under `covariance`
    (K, K), averaged with 12 looks' worth of 1 (difference-based, as in Hall, Kay & Titterington 1990, of an order to
    which a parabola adds nothing). `versions` (K,) of the points; none: at equal distances. Slow errors
    (autocorrelation) escape it.
    """
    points, runs = values.shape
    if points <= ORDER:
        return np.ones((points, runs))
    time = np.arange(points, dtype=np.float64) if versions is None else versions / np.median(np.diff(versions))
    weights = np.zeros((points - ORDER, points))
    for row in range(points - ORDER):
        window = time[row : row + ORDER + 1]
        apart = window[:, None] - window + np.eye(ORDER + 1)
        weights[row, row : row + ORDER + 1] = 1 / apart.prod(1)
    variance = np.sum(weights @ covariance * weights, 1)
    squares = np.minimum((weights @ values) ** 2 / variance[:, None], OUTLIER)
    seen = np.arange(1, len(weights) + 1)[:, None]
    scale = np.sqrt((PRIOR_LOOKS + np.cumsum(squares, 0)) / (PRIOR_LOOKS + seen))
    return np.concatenate([np.ones((ORDER, runs)), np.maximum(scale, 1)])
