"""Paths that the true evaluation may have taken and may take: the average of many models, and Gao et al.'s laws alone.

The models (`trainers.mismatch.models`) are weighted by how well each would have forecast every evaluation from those
before it: the product of their one-step predictive densities (prequential weights, Dawid 1984). A random walk, which is
persistence with its error, is among them and keeps LEVEL_FLOOR; in STOPS of the other draws the path stays where it is
now. A mixture's CRPS is at most the mixture of the CRPS, so that the average keeps near persistence where trends end.
What no curve can announce is drawn apart, see `_broken` and `_surprised`. The shares were chosen on simulated runs of
other shapes than those that benchmarks/forecast.py reports.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from configs.errors import UserError
from trainers.mismatch import scan
from trainers.mismatch.models import models
from trainers.mismatch.series import Array, Curve, Integers

Which = NDArray[np.bool_]
Places = NDArray[np.intp]
LawName = Literal["best-of-n", "rl"]
LAWS: tuple[LawName, ...] = ("best-of-n", "rl")

FEWEST = 6  # evaluated versions
LEVEL_FLOOR = 0.1  # of the draws follow a random walk, at least
STOPS = 0.45  # of the other draws stay where they are
BREAKS = 1.0  # expected in as many evaluations as lie behind
FALLS, RISES = 0.035, 0.035  # share of the draws in which a surprise comes at once
RISE, LEAP = 1.5, 0.6  # of a rise that comes as a surprise: its pace, in the steepest so far; at least, in swings
CHUNK = 64  # models at a time


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
    """One evaluation at n versions in R runs, from its first value, in units of its standard error."""

    x: Array  # (n,) distance from the base, at most 1
    steps: Array  # (n,) evaluations since the first version
    mean: Array  # (R, n)
    covariance: Array  # (n, n) of the errors
    start: Array  # (R,) first value, in the evaluation's unit
    unit: Array  # (R,) standard error, widened where it is understated, in the evaluation's unit
    swing: Array  # (R,) what the value has moved so far, at least 3 standard errors
    pace: Array  # (R,) the steepest change so far, a step, less what the errors add to it
    fall: Array  # (R,) over the last two steps, a step, less one standard error
    length: float  # x = 1, in sqrt(KL) or versions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paths:
    """S draws of the true values of R runs, in the evaluation's unit."""

    seen: Array  # (R, S, n) at the evaluated versions
    smooth: Array  # (R, S, m) at the future points; breaks come as often as curves have them
    ahead: Array  # (R, S, m) the same with a few surprises at once, however rare they are
    weights: dict[str, Array]  # by name of the models (R,), the sum is 1


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


def standardise(mean: Array, covariance: Array, versions: Integers, distance: Array) -> Seen:
    """Bring R curves (R, n) of n >= FEWEST versions, at `distance` (n,) from the base, to units of their own.

    All have errors of `covariance` (n, n), widened where the run shows that they are understated
    (`scan.noise_scale`). Raises ValueError where no distance is positive.
    """
    if distance.max() <= 0:
        raise ValueError("no distance is positive")
    variance = np.diag(covariance)
    between = variance[1:] + variance[:-1] - 2 * np.diag(covariance, 1)  # neighbours share a part of their errors
    se = float(np.median(np.sqrt(between / 2)))
    unit = se * scan.noise_scale(mean.T, covariance, versions)[-1].astype(np.float64)
    values = (mean - mean[:, :1]) / unit[:, None]
    smooth = (values[:, 2:] + values[:, 1:-1] + values[:, :-2]) / 3
    time = versions.astype(np.float64)
    steps = (time - time[0]) / float(np.median(np.diff(time)))
    apart = max(2, len(steps) // 3)
    moved, over = np.abs(values[:, apart:] - values[:, :-apart]), steps[apart:] - steps[:-apart]
    pace = np.maximum(np.max(np.sqrt(np.maximum(moved**2 - 2, 0)) / over, 1), 1 / steps[-1])
    return Seen(
        x=distance / distance.max(),
        steps=steps,
        mean=values,
        covariance=covariance / se**2,
        start=mean[:, 0],
        unit=unit,
        swing=np.hypot(np.ptp(smooth, 1), 3),
        pace=pace,
        fall=np.maximum(values[:, -3] - values[:, -1] - np.sqrt(2), 0) / (steps[-1] - steps[-3]),
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


def draw_paths(seen: Seen, x: Array, steps: Array, draws: int, seed: int) -> Paths:
    """Draw S = `draws` paths of each run, through the points so far and on, `steps` (m,) evaluations after the last.

    `x` (k, m) are k equally likely ways in which the distance may go on. Every run meets the same random numbers.
    """
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((draws, len(seen.x) + len(steps) + 1))
    uniform = rng.permutation((np.arange(draws) + 0.5) / draws)
    broken, surprised = rng.spawn(2)
    values, moving = np.empty((len(seen.mean), draws, normal.shape[1] - 1)), np.empty((len(seen.mean), draws), bool)
    time = np.append(seen.steps, seen.steps[-1] + steps) / seen.steps[-1]
    distances = np.concatenate([np.tile(seen.x, (len(x), 1)), x], 1)
    among = models(time, distances, len(seen.x))
    names = np.array(among.names)
    weights = np.empty((len(seen.mean), len(names)))
    octave = np.round(np.log2(seen.swing))  # the models' amplitude: runs of one octave share their algebra
    for one in np.unique(octave):
        rows = octave == one
        posterior = _posterior(seen, rows, among.covariance, 4.0**one, among.prior, names == "level")
        weights[rows] = posterior.weights
        values[rows], chosen = _drawn(posterior, normal, uniform)
        moving[rows] = (names != "level")[chosen]
    past, smooth = np.split(values, [len(seen.x)], axis=2)
    smooth = _broken(past[:, :, -1], smooth, moving, seen, steps, broken)
    ahead = _surprised(past[:, :, -1], smooth, seen, steps, surprised)
    start, unit = seen.start[:, None, None], seen.unit[:, None, None]
    past, smooth, ahead = (start + unit * one for one in (past, smooth, ahead))
    by_name = {name: weights[:, names == name].sum(1) for name in dict.fromkeys(among.names)}
    return Paths(seen=past, smooth=smooth, ahead=ahead, weights=by_name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Posterior:
    """What G models make of R runs: N values so far and ahead, and the coefficient that is held at 0 or more."""

    weights: Array  # (R, G)
    covariance: Array  # (G, N + 1, N + 1) of the models, before anything was seen
    scale: float  # of the covariance
    errors: Array  # (n, n) covariance
    mean: Array  # (n, R) what was seen


def _posterior(seen: Seen, rows: Which, covariance: Array, scale: float, prior: Array, still: Which) -> _Posterior:
    """Condition models with `covariance` (G, N + 1, N + 1), times `scale`, on the runs at `rows`."""
    values, scores = seen.mean[rows].T, np.empty((len(covariance), int(rows.sum())))
    for first in range(0, len(covariance), CHUNK):  # all at once would be gigabytes, where there are many versions
        part = scale * covariance[first : first + CHUNK]
        lower, inverse = _whitening(part, seen.covariance)
        surprise = inverse @ values  # (G, n, R), each value's from those before it: standard normal
        score = -(surprise**2).sum(1) / 2 - np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)[:, None]
        bounded = part[:, -1, -1] > 0
        gain = np.swapaxes(inverse[bounded] @ part[bounded, : len(values), -1:], 1, 2)  # (G, 1, n) of the coefficient
        left = part[bounded, -1, -1] - (gain[:, 0] ** 2).sum(1)
        score[bounded] += special.log_ndtr((gain @ surprise[bounded])[:, 0] / np.sqrt(left)[:, None])
        score[bounded] += np.log(2)  # the prior is cut at 0 too
        scores[first : first + CHUNK] = score
    weights = _weights(scores.T + np.log(prior), still)
    return _Posterior(weights=weights, covariance=covariance, scale=scale, errors=seen.covariance, mean=values)


def _whitening(covariance: Array, errors: Array) -> tuple[Array, Array]:
    """Return the Cholesky factor (..., n, n) of the first n of a model's values with errors (n, n), and its inverse."""
    lower = np.asarray(np.linalg.cholesky(covariance[..., : len(errors), : len(errors)] + errors), np.float64)
    return lower, np.asarray(np.linalg.inv(lower))


def _weights(scores: Array, still: Which) -> Array:
    """Return weights (R, G) from log scores; those of the models that are `still` (G,) sum to LEVEL_FLOOR or more."""
    weights = special.softmax(scores, axis=1)
    share = weights[:, still].sum(1, keepdims=True)
    floored = (1 - LEVEL_FLOOR) / np.maximum(1 - share, 1e-300) * weights
    floored[:, still] = LEVEL_FLOOR * special.softmax(scores[:, still], axis=1)
    return np.where(share < LEVEL_FLOOR, floored, weights)


def _drawn(posterior: _Posterior, normal: Array, uniform: Array) -> tuple[Array, Places]:
    """Draw values (R, S, N) and their models (R, S) with random numbers (S, N + 1) and, for the choice, (S,)."""
    edges = np.cumsum(posterior.weights, 1)
    run = np.arange(len(edges))[:, None]
    edges = run + np.minimum(edges / edges[:, -1:], 1)
    chosen = np.searchsorted(edges.ravel(), (run + uniform).ravel()).reshape(len(run), -1) - run * edges.shape[1]
    values = np.empty((*chosen.shape, normal.shape[1]))
    order = np.argsort(chosen, axis=None, kind="stable")
    used, first = np.unique(chosen.ravel()[order], return_index=True)
    for model, pairs in zip(used, np.split(order, first[1:]), strict=True):  # most models are never drawn from
        of_run, draw = np.unravel_index(pairs, chosen.shape)
        mean, root = _of_model(posterior, model)
        around = (normal @ root.T)[draw] if len(draw) > len(normal) else normal[draw] @ root.T
        values[of_run, draw] = _truncated(mean[of_run], around, root)
    return values[:, :, :-1], chosen


def _of_model(posterior: _Posterior, model: int) -> tuple[Array, Array]:
    """Return mean (R, N + 1) and a root (N + 1, N + 1) of the covariance that one model has of the values."""
    prior = posterior.scale * posterior.covariance[model]
    _, inverse = _whitening(prior, posterior.errors)
    gain = prior[:, : len(inverse)] @ inverse.T
    sizes, vectors = np.linalg.eigh(prior - gain @ gain.T)
    return (gain @ (inverse @ posterior.mean)).T, vectors * np.sqrt(np.maximum(sizes, 0))


def _truncated(mean: Array, around: Array, root: Array) -> Array:
    """Return P draws (P, N + 1), `around` a mean, with the coefficient at 0 or more; the others follow it."""
    values = mean + around
    spread = root @ root[-1]  # of every value with the coefficient
    if spread[-1] > 0:
        sd, centre = float(np.sqrt(spread[-1])), mean[:, -1]
        above = special.ndtr(centre / sd) * special.ndtr(-around[:, -1] / sd)
        cut = centre - sd * special.ndtri(np.maximum(above, 1e-300))
        values += ((cut - values[:, -1]) / sd**2)[:, None] * spread
    return np.asarray(values)


def _broken(last: Array, smooth: Array, moving: Which, seen: Seen, steps: Array, rng: np.random.Generator) -> Array:
    """Give paths (R, S, m) breaks, from the last value (R, S); STOPS of those that are `moving` stand still instead.

    BREAKS come in as many evaluations as lie behind: one that was never seen. From there on the slope is 0 in half of
    the paths; in the others it is of either sign, its size exponential with mean the pace.
    """
    draws = smooth.shape[1]
    wait = np.asarray(rng.exponential(len(seen.x) / BREAKS, draws))
    slope = rng.choice([0.0, 1.0, -1.0], draws, p=[0.5, 0.25, 0.25]) * rng.exponential(1, draws)
    before = np.concatenate([last[:, :, None], smooth], 2)
    at = np.append(0.0, steps)
    out = smooth.copy()
    stops = rng.uniform(size=draws) < STOPS
    for s in np.flatnonzero(wait < steps[-1]):
        k = int(np.searchsorted(at, wait[s], "right")) - 1  # the last evaluation before the break
        out[:, s, k:] = before[:, s, k, None] + slope[s] * seen.pace[:, None] * (steps[k:] - at[k])
    return np.where((stops & moving)[:, :, None], last[:, :, None], out)


def _surprised(last: Array, smooth: Array, seen: Seen, steps: Array, rng: np.random.Generator) -> Array:
    """Replace a small share of paths (R, S, m) by what no curve so far announces, from the last value (R, S).

    A fall by the swing at once, all that was moved so far, and on at the pace and twice the present fall; or a rise at
    RISE times the pace, by LEAP of the swing at least. Away from the last measured value too. They are few, and far, so
    that 95 % intervals contain cliffs, kinks and second rises.
    """
    draws = smooth.shape[1]
    order = rng.permutation(draws)
    falls, rises = int(np.ceil(FALLS * draws)), int(np.ceil(RISES * draws))
    down, up = order[:falls], order[falls : falls + rises]
    latest = seen.mean[:, -1:]
    swing, pace, falling = (one[:, None, None] for one in (seen.swing, seen.pace, seen.fall))
    fall, rise = swing + (pace + 2 * falling) * steps, np.maximum(LEAP * swing, RISE * pace * steps)
    out = smooth.copy()
    out[:, down] = np.minimum(smooth[:, down], np.minimum(last[:, down], latest)[:, :, None] - fall)
    out[:, up] = np.maximum(smooth[:, up], np.maximum(last[:, up], latest)[:, :, None] + rise)
    return out


def _basis(name: LawName, x: Array) -> Array:
    """Columns (..., 3) of a law, which is linear in its parameters, along x (...)."""
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
