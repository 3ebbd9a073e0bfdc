"""Correlation of reward and of KL with each evaluation over one run, corrected for measurement error, with intervals.

The estimand is a property of this run: the correlation of the *true* values at the versions where both were measured.
The path of the policy is the signal; only the errors of measurement are random (Lambert & Calandra, Fig. 4). It says
nothing about other runs. Exact ties among true values make rank correlations jump: an interval may then miss. Where the
true orders may agree throughout, a rank correlation of 1 is at the edge of what is possible, where a bootstrap covers
too little: that case is tested apart, see `_may_agree`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from trainers.mismatch.series import Array, Curve, Series, symmetric_root

Kind = Literal["pearson", "spearman", "kendall"]
KINDS: tuple[Kind, ...] = ("pearson", "spearman", "kendall")

FEWEST = 5  # joint versions
LEAST_RELIABILITY = 0.3  # share of a curve's spread that is not measurement error
WINDOW = 8  # versions of a moving window


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """One coefficient between two curves over n joint versions, without unit."""

    kind: Kind
    x: str
    y: str
    first_version: int | None
    last_version: int | None
    n: int
    measured: float | None  # of the measured values, as scipy has it; None: not enough
    estimate: float | None  # of the true values
    low: float | None
    high: float | None
    level: float
    estimand: str
    not_enough: str | None  # why there is no number


def correlate(
    series: Series, *, window: int | None = None, level: float = 0.95, draws: int = 1_000, seed: int = 0
) -> tuple[Correlation, ...]:
    """Return Pearson, Spearman and Kendall's tau-b of the reward, and of the KL if there is one, with each evaluation.

    `window` None: over the whole run; else over every `window` consecutive joint versions. Spearman 1904 for the
    correction of Pearson's coefficient, Efron & Tibshirani 1993, ch. 6, for the parametric bootstrap. A series that is
    too short, constant or mostly noise gets a reason instead of a number.
    """
    return tuple(
        one
        for x in (series.reward, *([] if series.kl is None else [series.kl]))
        for y in series.evaluations
        for one in between(x, y, window=window, level=level, draws=draws, seed=seed)
    )


def between(
    x: Curve, y: Curve, *, window: int | None = None, level: float = 0.95, draws: int = 1_000, seed: int = 0
) -> tuple[Correlation, ...]:
    """Return the three coefficients of two curves, over the run or in every window (see `correlate`)."""
    joint = np.intersect1d(x.versions, y.versions)
    if window is None or len(joint) <= window:
        return _coefficients(x.at(joint), y.at(joint), level, draws, seed)
    parts = [joint[first : first + window] for first in range(len(joint) - window + 1)]
    return tuple(one for part in parts for one in _coefficients(x.at(part), y.at(part), level, draws, seed))


def coefficient(kind: Kind, x: Array, y: Array) -> Array:
    """Return a coefficient (...) of x and y (..., n) along the last axis; NaN where one is constant."""
    if kind == "spearman":
        return _pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))
    if kind == "pearson":
        return _pearson(x, y)
    i, j = np.triu_indices(x.shape[-1], 1)
    a, b = np.sign(x[..., i] - x[..., j]), np.sign(y[..., i] - y[..., j])
    return _ratio((a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1))


def _pearson(x: Array, y: Array, noise: tuple[float, float] = (0.0, 0.0)) -> Array:
    """Pearson's coefficient, the spread of each series less what its errors add to it; it may then exceed 1."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return _ratio((x * y).mean(-1), (x * x).mean(-1) - noise[0], (y * y).mean(-1) - noise[1])


def _ratio(product: Array, first: Array, second: Array) -> Array:
    good = (first > 0) & (second > 0)
    root = np.sqrt(np.where(good, first, 1.0)) * np.sqrt(np.where(good, second, 1.0))
    return np.asarray(np.where(good, product / root, np.nan))


def _coefficients(x: Curve, y: Curve, level: float, draws: int, seed: int) -> tuple[Correlation, ...]:
    (u, root_u, noise_u, why_u), (v, root_v, noise_v, why_v) = _standard(x), _standard(y)
    why = why_u or why_v
    rng = np.random.default_rng(seed)
    n = len(x.versions)
    worlds = None
    if not why:
        true_u, true_v = np.sqrt(1 - noise_u) * u, np.sqrt(1 - noise_v) * v
        drawn_u = true_u + rng.standard_normal((draws, n)) @ root_u.T
        drawn_v = true_v + rng.standard_normal((draws, n)) @ root_v.T
        worlds = (true_u, true_v, drawn_u, drawn_v)
    out = []
    for kind in KINDS:
        numbers: tuple[float, ...] | None = None
        reason = why
        if worlds is not None:
            numbers = _interval(kind, u, v, (noise_u, noise_v), worlds, level)
            if numbers is not None and kind != "pearson":
                numbers = _to_the_edge(kind, numbers, u, v, worlds, level)
            if numbers is None:
                reason = "not enough: the spread of a series is not clearly larger than its measurement error"
        measured, estimate, low, high = numbers or (None, None, None, None)
        out.append(
            Correlation(
                kind=kind,
                x=x.name,
                y=y.name,
                first_version=int(x.versions[0]) if n else None,
                last_version=int(x.versions[-1]) if n else None,
                n=n,
                measured=measured,
                estimate=estimate,
                low=low,
                high=high,
                level=level,
                estimand=_estimand(kind, x, y),
                not_enough=None if numbers else reason,
            )
        )
    return tuple(out)


def _standard(curve: Curve) -> tuple[Array, Array, float, str | None]:
    """Return values of mean 0 and variance 1 (n,), a root (n, n) of their errors' covariance, its share, or why not."""
    n = len(curve.versions)
    empty = np.zeros(n), np.zeros((n, n)), 0.0
    if n < FEWEST:
        return *empty, f"not enough: {n} versions have both, {FEWEST} are needed"
    centred = curve.mean - curve.mean.mean()
    spread = float(np.sqrt(np.mean(centred**2)))
    if spread <= 1e-12 * float(np.max(np.abs(curve.mean))):
        return *empty, f"not enough: {curve.name} is constant"
    if curve.covariance is None:
        return centred / spread, np.zeros((n, n)), 0.0, None
    centre = np.eye(n) - 1 / n
    covariance = centre @ curve.covariance @ centre / spread**2  # a shift of all versions changes no correlation
    share = float(np.trace(covariance)) / n
    if 1 - share < LEAST_RELIABILITY:
        return *empty, f"not enough: {min(share, 1):.0%} of the spread of {curve.name} is measurement error"
    return centred / spread, symmetric_root(covariance), share, None


def _interval(
    kind: Kind,
    u: Array,
    v: Array,
    noise: tuple[float, float],
    worlds: tuple[Array, Array, Array, Array],
    level: float,
) -> tuple[float, ...] | None:
    """Return (measured, estimate, low, high); None where the bootstrap's spread is often no larger than the noise.

    The bootstrap's truth is the measured path, shrunk to the spread that is left when the errors' is taken away.
    Pearson is corrected for the errors in each draw; ranks lose the bias that the errors add there. The interval spans
    the basic, the corrected and the plain percentile one (Davison & Hinkley 1997, ch. 5): one alone covers too little.
    """
    measured = float(coefficient(kind, u, v))
    true_u, true_v, drawn_u, drawn_v = worlds
    drawn = _pearson(drawn_u, drawn_v, noise) if kind == "pearson" else coefficient(kind, drawn_u, drawn_v)
    kept = drawn[np.isfinite(drawn)]
    if len(kept) < 0.99 * len(drawn):
        return None
    quantiles: NDArray[np.float64] = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    inner = float(coefficient(kind, true_u, true_v))
    corrected = float(_pearson(u, v, noise)) if kind == "pearson" else measured
    bias = 0.0 if kind == "pearson" else float(kept.mean()) - inner
    estimate = corrected - bias
    low = min(quantiles[0], quantiles[0] - 2 * bias, corrected + inner - quantiles[1])
    high = max(quantiles[1], quantiles[1] - 2 * bias, corrected + inner - quantiles[0])
    clipped = [float(np.clip(number, -1, 1)) for number in (estimate, low, high)]
    return measured, clipped[0], min(clipped[:2]), max(clipped[0], clipped[2])


def _to_the_edge(
    kind: Kind,
    numbers: tuple[float, ...],
    u: Array,
    v: Array,
    worlds: tuple[Array, Array, Array, Array],
    level: float,
) -> tuple[float, ...]:
    """Extend (measured, estimate, low, high) of a rank correlation to 1 or -1 where a test does not reject it."""
    measured, estimate, low, high = numbers
    errors = worlds[2] - worlds[0], worlds[3] - worlds[1]
    if measured > 0 and high < 1 and _may_agree(kind, u, v, errors, level):
        high = 1.0
    if measured < 0 and low > -1 and _may_agree(kind, u, -v, (errors[0], -errors[1]), level):
        low = -1.0
    return measured, estimate, low, high


def _may_agree(kind: Kind, u: Array, v: Array, errors: tuple[Array, Array], level: float) -> bool:
    """Whether the measured rank correlation of u and v (n,) could come from true orders that agree throughout.

    The truth that the test simulates is one such: isotonic regressions of both along one order, that of their sum in
    units of their errors. Its ties leave more to the errors (S, n) than strict order would, so that the test keeps
    an agreement rather than rejects it.
    """
    sizes = [np.sqrt((error**2).mean(0)) for error in errors]
    exact = [bool(np.all(size == 0)) for size in sizes]
    if all(exact):
        return False  # nothing is uncertain
    if any(exact):
        along = u if exact[0] else v
    else:
        along = u / float(np.sqrt((sizes[0] ** 2).mean())) + v / float(np.sqrt((sizes[1] ** 2).mean()))
    order = np.argsort(along, kind="stable")
    drawn = []
    for values, error in zip((u, v), errors, strict=True):
        truth = np.empty(len(values))
        truth[order] = optimize.isotonic_regression(values[order]).x
        drawn.append(truth + error)
    simulated = coefficient(kind, drawn[0], drawn[1])
    return bool(np.mean(simulated <= coefficient(kind, u, v) + 1e-12) > (1 - level) / 2)


def _estimand(kind: Kind, x: Curve, y: Curve) -> str:
    exact = [curve.name for curve in (x, y) if curve.covariance is None]
    of = f"{kind} correlation of the true {x.name} and {y.name} at this run's versions where both were measured"
    return of + (f"; {' and '.join(exact)} taken as exact: no standard error" if exact else "")
