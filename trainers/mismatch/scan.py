"""The sequential scan for a drop: contrasts of an earlier block with the latest points, and their boundary.

H0, about the true values g of one evaluation: g_t >= max over s < t of g_s, less a margin, at every version t. Every
contrast

    z = (mean of an earlier block - mean of the latest 1 to 4 points - margin) / its standard error

then has an expectation of at most 0, whatever the path: under any such path the maximum over contrasts and looks is at
most what the same noise gives on a constant path with margin 0. A boundary simulated there holds for all of H0, rising
paths included. Alpha is spent over the looks as in Lan & DeMets 1983.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trainers.mismatch.series import Array, Integers

LATEST = 4  # the longest block of latest points
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of the earlier block
HALF_SPENT = 10  # looks after which half of alpha is spent, when their number is not known
DIAGONAL_FLOOR = 0.5  # of the median standard error so far
CONTRAST_FLOOR = 0.05  # of the standard error of the same contrast, were the versions independent
PRIOR_LOOKS = 8  # weight of the stated standard errors against the ones seen in second differences
OUTLIER = 16.0  # a squared standardised second difference counts as at most this
CHUNK = 2_000  # simulated runs at a time: they stay in the processor's cache

Runs = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contrasts:
    """The C contrasts of one look: points [start, stop) against the last `latest` of the t + 1 points seen."""

    look: int  # t, the latest point
    start: Integers  # (C,)
    stop: Integers  # (C,)
    latest: Integers  # (C,)
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
    first = int(np.argmax(se > 0))
    seen = [se[: max(t, first) + 1] for t in range(len(se))]
    lowest = np.array([DIAGONAL_FLOOR * np.median(part[part > 0]) for part in seen])
    return np.asarray(covariance + np.diag(np.maximum(lowest**2 - se**2, 0)))


def contrasts(covariance: Array, look: int) -> Contrasts:
    """Return every contrast of the look at point `look` >= 1, from the covariance (K, K) of the points' errors."""
    start, stop, latest = [], [], []
    for m in range(1, min(LATEST, look) + 1):
        for length in LENGTHS:
            ends = np.arange(length, look + 2 - m)
            start.append(ends - length)
            stop.append(ends)
            latest.append(np.full(len(ends), m))
    a, b, m_all = np.concatenate(start), np.concatenate(stop), np.concatenate(latest)
    c, e = look + 1 - m_all, np.full(len(a), look + 1)
    sums = np.pad(np.cumsum(np.cumsum(covariance, 0), 1), ((1, 0), (1, 0)))
    spread = np.concatenate([[0], np.cumsum(np.diag(covariance))])
    before = (sums[b, b] - sums[a, b] - sums[b, a] + sums[a, a]) / (b - a) ** 2
    after = (sums[e, e] - sums[c, e] - sums[e, c] + sums[c, c]) / m_all**2
    between = (sums[b, e] - sums[a, e] - sums[b, c] + sums[a, c]) / ((b - a) * m_all)
    independent = (spread[b] - spread[a]) / (b - a) ** 2 + (spread[e] - spread[c]) / m_all**2
    variance = np.maximum(before + after - 2 * between, CONTRAST_FLOOR**2 * independent)
    return Contrasts(look=look, start=a, stop=b, latest=m_all, sd=np.sqrt(variance))


def differences(of: Contrasts, values: Array) -> Array:
    """Return mean of the earlier block - mean of the latest points (C,) of `values` (K,), in their unit."""
    sums = np.concatenate([[0.0], np.cumsum(values - values[0])])
    last = of.look + 1
    before = (sums[of.stop] - sums[of.start]) / (of.stop - of.start)
    return np.asarray(before - (sums[last] - sums[last - of.latest]) / of.latest)


def null_maxima(covariance: Array, runs: int, seed: int) -> Runs:
    """Simulate the scan's maximum at each look, (K, runs), on a constant path with errors of `covariance` (K, K).

    Row t depends on the first t + 1 points only, so that a boundary does not move when points are added. Row 0 is
    minus infinity: one point has nothing to be compared with.
    """
    points = len(covariance)
    root = np.linalg.cholesky(covariance + 1e-9 * covariance.trace() / points * np.eye(points))
    normal = np.stack([np.random.default_rng([seed, t]).standard_normal(runs) for t in range(points)])
    return path_maxima(root @ normal, covariance)


def path_maxima(paths: Array, covariance: Array, margins: Array | None = None) -> Runs:
    """Return the scan's maximum at each look (K, S) of S series (K, S), errors of `covariance` (K, K).

    `margins` (K,) by look, in the evaluation's unit; none: 0. Row 0 is minus infinity.
    """
    points, runs = paths.shape
    unit = float(np.sqrt(covariance.trace() / points))
    scaled, less = paths / unit, (np.zeros(points) if margins is None else margins / unit).astype(np.float32)
    looks = [contrasts(covariance / unit**2, t) for t in range(1, points)]
    maxima = np.full((points, runs), -np.inf, np.float32)
    for first in range(0, runs, CHUNK):
        part = slice(first, first + CHUNK)
        maxima[1:, part] = _maxima((scaled[:, part] - scaled[0, part]).astype(np.float32), looks, less)
    return maxima


def _maxima(paths: Runs, looks: list[Contrasts], margins: Runs) -> Runs:
    """Maximum over the contrasts at each look (K - 1, S) of paths (K, S), in the order that `contrasts` has them."""
    points, runs = paths.shape
    sums = np.concatenate([np.zeros((1, runs), np.float32), np.cumsum(paths, 0)])
    blocks = {n: (sums[n:] - sums[:-n]) / np.float32(n) for n in LENGTHS if n < points}
    out = np.full((points - 1, runs), -np.inf, np.float32)
    for row, look in enumerate(looks):
        last, done = look.look + 1, 0
        inverse = (1 / look.sd).astype(np.float32)[:, None]
        for m in range(1, min(LATEST, look.look) + 1):
            now = (sums[last] - sums[last - m]) / np.float32(m) + margins[look.look]
            for length in LENGTHS:
                ends = last - m - length + 1
                if ends > 0:
                    z = (blocks[length][:ends] - now) * inverse[done : done + ends]
                    np.maximum(out[row], z.max(0), out=out[row])
                    done += ends
    return out


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
        row = maxima[look][alive]
        place = len(row) - crossing - 1
        out[look] = np.partition(row, place)[place]
        alive[alive] = row <= out[look]
    return out


def for_prompts(bound: Array, prompts: int | None) -> Array:
    """Widen a boundary (K,) for a covariance estimated from `prompts` prompts: the same tail of Student's t."""
    if prompts is None:
        return bound
    return np.asarray(stats.t.isf(stats.norm.sf(bound), prompts - 1))


def noise_scale(values: Array, covariance: Array) -> Array:
    """Return by how much, at least 1, series (K, S) show their standard errors to be understated, at each look (K, S).

    The mean squared second difference up to the look, each in units of its own variance under `covariance` (K, K),
    averaged with 8 looks' worth of 1 (the estimator of Gasser, Sroka & Jennen-Steinmetz 1986 at equal steps).
    It only ever lowers a statistic, so no boundary is broken by it. Slow errors (autocorrelation) escape it.
    """
    points, runs = values.shape
    if points < 3:
        return np.ones((points, runs))
    weights = np.zeros((points - 2, points))
    for shift, weight in enumerate((1.0, -2.0, 1.0)):
        weights[np.arange(points - 2), np.arange(points - 2) + shift] = weight
    variance = np.einsum("ij,jk,ik->i", weights, covariance, weights)
    squares = np.minimum((weights @ values) ** 2 / variance[:, None], OUTLIER)
    seen = np.arange(1, points - 1)[:, None]
    scale = np.sqrt((PRIOR_LOOKS + np.cumsum(squares, 0)) / (PRIOR_LOOKS + seen))
    return np.concatenate([np.ones((2, runs)), np.maximum(scale, 1)])
