"""Paths that the true evaluation may have taken and may take: two laws and four plainer curves, averaged.

Along x, the distance d = sqrt(KL) from the reference (or the version, where no KL is given), with c the value at d = 0:

    best-of-n    c + d (alpha - beta d)            Gao, Schulman & Hilton 2022, peak at alpha / (2 beta)
    rl           c + d (alpha - beta log d)        the same, peak at exp(alpha / beta - 1)
    saturating   c + a (1 - exp(-k d))
    linear       c + a d
    concave      any concave curve
    level        no trend at all

All but `concave` are linear in their parameters (beta >= 0) and hold for a random walk over the evaluations around them
too, so that under a weak normal prior their posterior is exact. Weights are exp(-BIC / 2) (Schwarz 1978), which only
knows the points so far: `level` keeps at least LEVEL_FLOOR of the draws. What no fit can foresee is drawn apart, see
`_surprised`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from configs.errors import UserError
from trainers.mismatch import scan
from trainers.mismatch.series import Array, Curve

LawName = Literal["best-of-n", "rl"]
LAWS: tuple[LawName, ...] = ("best-of-n", "rl")

FEWEST = 6  # evaluated versions
LEVEL_FLOOR = 0.25  # of the draws: a trend so far need not go on
WALKS = (0.0, 0.1, 0.3, 1.0)  # standard deviation of a walk's step, in units of the pace
RATES = (2.0, 5.0, 12.0)  # k of a saturating curve, where the largest distance so far is 1
PRIOR = {"base": 2.0, "slope": 2.0, "beta": 1.0}  # standard deviations, in swings over the distance so far
KNOTS = 6  # where the concave curve may bend
REFITS = 30  # of the concave curve to simulated measurements
BENDS = 3.0  # shape of the gamma process of bends to come, per length of x seen
DAMPING = 0.5  # at least this part of a concave curve's last slope is left a step later
FALLS, RISES = 0.035, 0.035  # share of the draws in which a surprise comes at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Law:
    """One law fitted to n points; value and `alpha`, `beta` in units of the evaluation and of d."""

    name: LawName
    base: float  # c, the value at d = 0
    alpha: float
    beta: float
    covariance: Array  # (3, 3) of base, alpha, beta
    bic: float
    peak: float | None  # d at which the law peaks; None: it has no peak at d > 0
    gain: float | None  # from the base to that peak


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """An evaluation at n versions in units of its own: x at most 1, values from `centre` in units of `swing`."""

    x: Array  # (n,) distance from the base
    steps: Array  # (n,) evaluations since the first version
    mean: Array  # (n,)
    covariance: Array  # (n, n)
    pace: float  # the steepest change so far, a step, less what the errors add to it
    steepest: float  # the same, errors included
    centre: float
    swing: float  # what the value has moved so far, at least 3 standard errors
    length: float  # x = 1, in sqrt(KL) or versions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paths:
    """S draws of the true values, in the evaluation's unit."""

    seen: Array  # (S, n) at the evaluated versions
    smooth: Array  # (S, m) at the future points, were there no surprise
    ahead: Array  # (S, m) at the same points
    weights: tuple[tuple[str, float], ...]  # of the models, the sum is 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fit:
    """The posterior of a linear model with a random walk of standard deviation `walk` a step around it."""

    name: str
    rate: float  # k, of a saturating curve
    walk: float
    bic: float
    theta: Array  # (p,)
    covariance: Array  # (p, p)


def errors_of(curve: Curve) -> Array:
    """Return the covariance (n, n) of a curve's errors, floored and, where prompts are few, shrunk to its diagonal.

    A covariance estimated from fewer prompts than versions has no inverse; n / prompts of it is replaced. Raises
    ValueError where it is not known or every standard error is 0.
    """
    if curve.covariance is None:
        raise ValueError(f"{curve.name} has no covariance")
    covariance = scan.floored(curve.covariance)
    share = 1e-3 if curve.prompts is None else float(np.clip(len(covariance) / curve.prompts, 1e-3, 1))
    return np.asarray((1 - share) * covariance + share * np.diag(np.diag(covariance)))


def standardise(curve: Curve, distance: Array) -> Seen:
    """Bring a curve of n >= FEWEST versions, at `distance` (n,) from the base, to units of its own.

    Errors are widened where the second differences show that they are understated (`scan.noise_scale`). Raises
    ValueError as `errors_of` does, or where no distance is positive.
    """
    if distance.max() <= 0:
        raise ValueError(f"{curve.name}: no distance is positive")
    covariance = errors_of(curve)
    scale = float(scan.noise_scale(curve.mean[:, None], covariance)[-1, 0])
    variance = np.diag(covariance)
    between = variance[1:] + variance[:-1] - 2 * np.diag(covariance, 1)  # neighbours share a part of their errors
    se = scale * float(np.median(np.sqrt(between / 2)))
    smooth = np.convolve(curve.mean - curve.mean[0], np.full(3, 1 / 3), "valid")
    swing = float(np.hypot(np.ptp(smooth), 3 * se))
    versions = curve.versions.astype(np.float64)
    steps = (versions - versions[0]) / float(np.median(np.diff(versions)))
    apart = max(2, len(steps) // 3)
    moved, over = curve.mean[apart:] - curve.mean[:-apart], steps[apart:] - steps[:-apart]
    pace = float(np.max(np.sqrt(np.maximum(moved**2 - 2 * se**2, 0)) / over))
    return Seen(
        x=distance / distance.max(),
        steps=steps,
        mean=(curve.mean - curve.mean[0]) / swing,
        covariance=covariance * scale**2 / swing**2,
        pace=max(pace, se / float(steps[-1])) / swing,
        steepest=float(np.max(np.abs(moved) / over)) / swing,
        centre=float(curve.mean[0]),
        swing=swing,
        length=float(distance.max()),
    )


def fit_law(name: LawName, distance: Array, mean: Array, covariance: Array) -> Law:
    """Fit one of Gao et al.'s laws by generalised least squares; points (n,) in any order, covariance (n, n).

    `distance` is d = sqrt(KL), 0 or more. Raises UserError for fewer than three distinct distances, which leave the
    parameters undetermined.
    """
    if len(np.unique(distance)) < 3 or distance.min() < 0:
        raise UserError(f"a law needs three different distances of 0 or more, not {np.unique(distance).tolist()}")
    length = float(distance.max())
    theta, uncertainty, bic = _least_squares(_basis(name, distance / length), mean, covariance)
    back = np.diag([1, 1 / length, 1 / length if name == "rl" else 1 / length**2])
    if name == "rl":  # x log x = (d / length) (log d - log length)
        back[1, 2] = np.log(length) / length
    base, alpha, beta = (float(number) for number in back @ theta)
    peak = gain = None
    if name == "rl" and beta > 0 and alpha / beta < 700:
        peak = float(np.exp(alpha / beta - 1))
        gain = beta * peak
    elif name == "best-of-n" and beta > 0 and alpha > 0:
        peak, gain = alpha / (2 * beta), alpha**2 / (4 * beta)
    spread = back @ uncertainty @ back.T
    return Law(name=name, base=base, alpha=alpha, beta=beta, covariance=spread, bic=bic, peak=peak, gain=gain)


def draw_paths(seen: Seen, x: Array, steps: Array, seed: int) -> Paths:
    """Draw S paths through the points so far and on to x (S, m), `steps` (m,) evaluations after the last one."""
    rng = np.random.default_rng(seed)
    fits, hinges = _fits(seen), _Hinges.of(seen)
    names = [*(fit.name for fit in fits), "concave"]
    weights = _weights(names, np.array([*(fit.bic for fit in fits), hinges.bic]))
    edges = np.round(np.concatenate([[0.0], np.cumsum(weights)]) * len(x)).astype(int)
    parts = []
    for number, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if last > first:
            rows = x[first:last]
            linear = number < len(fits)
            parts.append(_draw(fits[number], seen, rows, steps, rng) if linear else hinges.draw(seen, rows, rng))
    past, smooth = (np.concatenate(both) for both in zip(*parts, strict=True))
    ahead = _surprised(past[:, -1], smooth, seen, steps, rng)
    by_name = {name: float(weights[[one == name for one in names]].sum()) for name in dict.fromkeys(names)}
    past, smooth, ahead = (seen.centre + seen.swing * values for values in (past, smooth, ahead))
    return Paths(seen=past, smooth=smooth, ahead=ahead, weights=tuple(by_name.items()))


def _fits(seen: Seen) -> list[_Fit]:
    kinds = [*((name, 0.0) for name in (*LAWS, "linear", "level")), *(("saturating", rate) for rate in RATES)]
    fits = [_fit(seen, name, rate, walk * seen.pace) for name, rate in kinds for walk in WALKS]
    return [fit for fit in fits if fit is not None]


def _weights(names: list[str], bic: Array) -> Array:
    """Return the weights (M,) of the models: the kinds are equally likely beforehand, and so are the models of each."""
    counts = np.array([len(WALKS) * (len(RATES) if name == "saturating" else 1) for name in names], np.float64)
    counts[[name == "concave" for name in names]] = 1
    weights = np.exp(-(bic - bic.min()) / 2) / counts
    weights /= weights.sum()
    level = np.array([name == "level" for name in names])
    if (share := float(weights[level].sum())) < LEVEL_FLOOR:
        among = np.exp(-(bic[level] - bic[level].min()) / 2)
        weights *= (1 - LEVEL_FLOOR) / (1 - share)
        weights[level] = LEVEL_FLOOR * among / among.sum()
    return np.asarray(weights)


def _basis(name: str, x: Array, rate: float = 0.0) -> Array:
    """Columns (..., p) of a model that is linear in its parameters, along x (...)."""
    if name == "level":
        return np.ones((*x.shape, 1))
    if name == "linear":
        return np.stack([np.ones_like(x), x], -1)
    if name == "saturating":
        return np.stack([np.ones_like(x), np.expm1(-rate * x) / np.expm1(-rate)], -1)
    bend = np.log(np.maximum(x, 1e-300)) if name == "rl" else x
    return np.stack([np.ones_like(x), x, -x * bend], -1)


def _least_squares(columns: Array, mean: Array, covariance: Array) -> tuple[Array, Array, float]:
    """Return the estimate (p,), its covariance (p, p) and the BIC."""
    root = np.linalg.cholesky(covariance)
    q, r = np.linalg.qr(np.linalg.solve(root, columns))
    white = np.linalg.solve(root, mean)
    theta = np.linalg.solve(r, q.T @ white)
    inverse = np.linalg.inv(r)
    deviance = float(np.sum((white - q @ (q.T @ white)) ** 2)) + 2 * float(np.sum(np.log(np.diag(root))))
    return theta, inverse @ inverse.T, deviance + columns.shape[1] * float(np.log(len(mean)))


def _walk_covariance(seen: Seen, walk: float) -> Array:
    return walk**2 * np.minimum(seen.steps[:, None], seen.steps)


def _fit(seen: Seen, name: str, rate: float, walk: float) -> _Fit | None:
    """Return a model's posterior; None: a law whose beta is 0 or more with next to no probability."""
    columns = _basis(name, seen.x, rate)
    precision = np.array(list(PRIOR.values())[: columns.shape[1]]) ** -2.0
    root = np.linalg.cholesky(seen.covariance + _walk_covariance(seen, walk))
    white, mean = np.linalg.solve(root, columns), np.linalg.solve(root, seen.mean)
    inverse = white.T @ white + np.diag(precision)
    theta, covariance = np.linalg.solve(inverse, white.T @ mean), np.linalg.inv(inverse)
    bic = float(np.sum((mean - white @ theta) ** 2) + precision @ theta**2 + 2 * np.sum(np.log(np.diag(root))))
    bic += (len(theta) + (walk > 0)) * float(np.log(len(mean)))
    if name in LAWS:
        chance = float(stats.norm.cdf(theta[2] / np.sqrt(covariance[2, 2])))
        if chance < 1e-6:
            return None
        bic -= 2 * float(np.log(chance))
    return _Fit(name=name, rate=rate, walk=walk, bic=bic, theta=theta, covariance=covariance)


def _draw(fit: _Fit, seen: Seen, x: Array, steps: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw from the exact posterior: values at the points so far (S, n) and ahead (S, m)."""
    count, n = len(x), len(seen.x)
    theta = fit.theta + rng.standard_normal((count, len(fit.theta))) @ np.linalg.cholesky(fit.covariance).T
    if fit.name in LAWS:  # the posterior of beta is cut at 0, the others follow it
        sd = float(np.sqrt(fit.covariance[2, 2]))
        lowest = stats.norm.sf(fit.theta[2] / sd)
        beta = fit.theta[2] + sd * stats.norm.ppf(lowest + (1 - lowest) * rng.uniform(1e-9, 1, count))
        theta += (beta - theta[:, 2])[:, None] * (fit.covariance[2] / sd**2)
    past = theta @ _basis(fit.name, seen.x, fit.rate).T
    future = np.einsum("sp,smp->sm", theta, _basis(fit.name, x, fit.rate))
    if fit.walk == 0:
        return past, future
    around = _walk_covariance(seen, fit.walk)
    moves = np.sqrt(np.diff(seen.steps, prepend=0.0)) * fit.walk
    prior = np.cumsum(rng.standard_normal((count, n)) * moves, 1)  # Matheron's rule turns it into a posterior draw
    errors = rng.standard_normal((count, n)) @ np.linalg.cholesky(seen.covariance).T
    residual = seen.mean - past - prior - errors
    walked = prior + residual @ np.linalg.solve(seen.covariance + around, around)
    onward = np.cumsum(rng.standard_normal(x.shape) * np.sqrt(np.diff(steps, prepend=0.0)) * fit.walk, 1)
    return past + walked, future + walked[:, -1:] + onward


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Hinges:
    """The concave curve a + s x - sum of b_j (x - k_j)+ with b_j >= 0, by non-negative least squares."""

    knots: Array  # (J,)
    weights: Array  # (4 + J,) of a, -a, s, -s, b
    bic: float

    @classmethod
    def of(cls, seen: Seen) -> "_Hinges":
        different = np.unique(seen.x)
        inner = different[1 : -max(2, len(different) // 4)]
        knots: Array = inner
        if len(inner):
            knots = np.asarray(np.quantile(inner, np.linspace(0, 1, min(KNOTS, len(inner)))), np.float64)
        root = np.linalg.cholesky(seen.covariance)
        columns, white = np.linalg.solve(root, _columns(seen.x, knots)), np.linalg.solve(root, seen.mean)
        weights, distance = optimize.nnls(columns, white)
        free = 2 + int(np.sum(weights[4:] > 0))
        deviance = distance**2 + 2 * float(np.sum(np.log(np.diag(root))))
        return cls(knots=knots, weights=weights, bic=deviance + free * float(np.log(len(seen.x))))

    def draw(self, seen: Seen, x: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Refit to simulated measurements (parametric bootstrap); ahead, the slope is damped and bends on come."""
        root = np.linalg.cholesky(seen.covariance)
        whitened = np.linalg.solve(root, _columns(seen.x, self.knots))
        fitted = whitened @ self.weights
        refits = min(REFITS, len(x))
        errors = rng.standard_normal((refits, len(seen.x)))
        weights = np.stack([optimize.nnls(whitened, fitted + error)[0] for error in errors])
        weights = weights[np.arange(len(x)) % refits]
        past = weights @ _columns(seen.x, self.knots).T
        span, top = float(np.ptp(seen.x)), float(seen.x.max())
        future = np.einsum("sp,smp->sm", weights, _columns(np.minimum(x, top), self.knots))
        slope = weights[:, 2] - weights[:, 3] - weights[:, 4:].sum(1)
        left = rng.uniform(DAMPING, 1, len(x))[:, None]
        step = span / (len(seen.x) - 1)
        future += slope[:, None] * step * left * (1 - left ** (np.maximum(x - top, 0) / step)) / (1 - left)
        # Bends to come: none in half of the draws, else a gamma process with up to the mean of what was seen.
        total = weights[:, 4:].sum(1) * np.maximum(rng.uniform(-1, 1, len(x)), 0) ** 2
        edges = np.maximum.accumulate(np.maximum(np.concatenate([np.full((len(x), 1), top), x], 1), top), 1)
        bends = rng.gamma(BENDS * np.diff(edges, axis=1) / span) * (total / BENDS)[:, None]
        middles = (edges[:, 1:] + edges[:, :-1]) / 2
        return past, future - np.cumsum(bends, 1) * edges[:, 1:] + np.cumsum(bends * middles, 1)


def _columns(x: Array, knots: Array) -> Array:
    ones = np.ones((*x.shape, 1))
    bent = np.maximum(x[..., None] - knots, 0)
    return np.concatenate([ones, -ones, x[..., None], -x[..., None], -bent], -1)


def _surprised(last: Array, smooth: Array, seen: Seen, steps: Array, rng: np.random.Generator) -> Array:
    """Replace a small share of paths (S, m) by what no curve so far announces, from the last value (S,).

    A fall of 3/4 of the swing at once, and on at the steepest change so far; or a rise at 2.5 times that change. Each
    times 1 + |z| / 2 for a standard normal z, and away from the last measured value too. They are few, so that they
    cost little where nothing happens, and far, so that 95 % intervals contain cliffs, kinks and second rises. The sizes
    were chosen on simulated runs outside the laws (benchmarks/forecast.py).
    """
    order = rng.permutation(len(last))
    falling, rising = int(np.ceil(FALLS * len(last))), int(np.ceil(RISES * len(last)))
    size = 1 + np.abs(rng.standard_normal((len(last), 1))) / 2
    low, high = (bound(last, seen.mean[-1])[:, None] for bound in (np.minimum, np.maximum))
    out = smooth.copy()
    down, up = order[:falling], order[falling : falling + rising]
    out[down] = np.minimum(smooth[down], low[down] - size[down] * (0.75 + seen.steepest * steps))
    out[up] = np.maximum(smooth[up], high[up] + size[up] * 2.5 * seen.steepest * steps)
    return out
