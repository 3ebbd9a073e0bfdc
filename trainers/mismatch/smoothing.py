"""What the true values of one evaluation were: the measured curve, smoothed by what is known of its errors.

Shapes: n versions, G paths (kernel, length, amplitude), the last C = G / 2 of them curved, J = n - 1 places of a jump,
B sizes of it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from trainers.mismatch import scan
from trainers.mismatch.series import Array, Curve, Integers

# Of the path: in standard errors, those of the difference of two neighbours over the square root of 2.
AMPLITUDES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
JUMPS = (3.0, 10.0, 30.0, 100.0)  # standard deviations of a jump's size, in the same unit
LENGTHS = (1.0, 3.0, 9.0, 27.0)  # over which the path is correlated, in median distances between versions
JITTER = 1e-6  # of the errors' variance, so that no covariance is singular
KEPT = 4  # covariances whose inverses are kept: a curve is shortlisted, chosen from, valued, and its rivals too


def smooth(curve: Curve, *, rough: bool = False) -> tuple[Array, Array]:
    """Return posterior mean (n,) and covariance (n, n) of the true values, in the evaluation's unit and its square.

    Gaussian process regression with the known covariance of the errors and a flat prior on the level (Rasmussen &
    Williams 2006, sections 2.7 and 4.2.1), averaged by marginal likelihood over amplitudes, correlation lengths and
    paths: Matern 5/2 without or with one jump anywhere (cliffs, a first step that gains most), and Matern 1/2 (kinks).
    `rough`: of those without a jump only Matern 1/2, which flattens a peak less. A mean over 3 points knows neither how
    large the errors are nor where the path turns, and flattens every peak. Raises ValueError without standard errors.
    """
    if curve.covariance is None:
        raise ValueError(f"{curve.name}: smoothing needs standard errors")
    errors = steadied(scan.floored(curve.covariance), curve.prompts)
    variance = np.diag(errors)
    steps = (variance[1:] + variance[:-1] - 2 * np.diag(errors, 1)) / 2
    unit = max(float(np.median(steps)), scan.CONTRAST_FLOOR**2 * float(variance.mean()))
    errors = errors / unit + JITTER * np.eye(len(variance))
    level = float(curve.mean.mean())
    prior = _prior(curve.versions.tobytes(), errors.tobytes(), rough)
    mean, covariance = _regress((curve.mean - level) / np.sqrt(unit), errors, prior)
    return level + np.sqrt(unit) * mean, unit * (covariance + covariance.T) / 2


def steadied(covariance: Array, prompts: int | None) -> Array:
    """Draw the correlations (n, n) that few prompts have estimated towards their mean; the variances stay.

    As if n - 1 further prompts had shown equal correlations (the posterior mean under an inverse Wishart prior, as in
    Ledoit & Wolf 2004 with this target): the inverse of a matrix of about as many rows as prompts is mostly noise.
    """
    size = len(covariance)
    if prompts is None or size < 2:
        return covariance
    sd = np.sqrt(np.diag(covariance))
    both = np.outer(sd, sd)
    mean = float(((covariance / both).sum() - size) / (size * (size - 1)))
    equal = both * (mean + (1 - mean) * np.eye(size))
    share = (size - 1) / (prompts + size - 1)
    return np.asarray((1 - share) * covariance + share * equal)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prior:
    """What regression needs of the paths and the errors, but not of the values; all in units of the errors."""

    residual: Array  # (G, n, n) inverse of path + errors, without the level
    evidence: Array  # (G,) log density of the values 0
    plain: Array  # (G,) log prior of a path without a jump
    jumps: Array  # (C, J, n) residual of a step of size 1
    shrink: Array  # (C, J, B) variance of a jump's size, given the values
    jumping: Array  # (C, J, B) log prior of a path with that jump, and what it adds to the log density of the values 0


@lru_cache(maxsize=KEPT)
def _prior(versions: bytes, errors: bytes, rough: bool) -> _Prior:
    """Invert path + errors for every path.

    A step h of variance b² turns the residual R into R - v vᵀ b² / (1 + b² s), v = R h and s = hᵀ R h (Sherman &
    Morrison 1950), and the determinant grows by 1 + b² s: a jump costs no inverse of its own.
    """
    paths = _paths(np.frombuffer(versions, np.int64))
    inverse = np.linalg.inv(paths + np.frombuffer(errors).reshape(paths.shape[1:]))
    across = inverse.sum(-1)
    precision = across.sum(-1)
    residual = inverse - across[:, :, None] * across[:, None, :] / precision[:, None, None]
    half = len(paths) // 2
    jumps = _after(residual[half:])
    size = np.array(JUMPS) ** 2
    grown = 1 + size * _after(jumps)[:, range(jumps.shape[1]), range(jumps.shape[1]), None]
    return _Prior(
        residual=residual,
        evidence=(np.linalg.slogdet(inverse)[1] - np.log(precision)) / 2,
        plain=np.repeat([-np.log(half), -np.inf], half) if rough else np.full(len(paths), -np.log(len(paths))),
        jumps=jumps,
        shrink=size / grown,
        jumping=-np.log(grown) / 2 - np.log(grown.size),
    )


def _regress(values: Array, errors: Array, prior: _Prior) -> tuple[Array, Array]:
    """Return posterior mean (n,) and covariance (n, n) of values (n,), averaged over all paths and jumps.

    A jump somewhere is as likely beforehand as none.
    """
    plain = prior.residual @ values  # (G, n)
    curved = plain[-len(prior.jumps) :]
    along = _after(curved)  # (C, J) jumps @ values
    evidence = prior.evidence - plain @ values / 2
    jumping = prior.jumping + prior.shrink * along[:, :, None] ** 2 / 2 + evidence[-len(curved) :, None, None]
    weight = special.softmax(np.concatenate([prior.plain + evidence, jumping.ravel()]))
    of_path, of_jump = weight[: len(plain)], weight[len(plain) :].reshape(jumping.shape)
    of_path[-len(curved) :] += of_jump.sum((1, 2))
    once = (of_jump * prior.shrink).sum(-1)  # (C, J)
    twice = (of_jump * prior.shrink**2).sum(-1)
    # The posterior mean of one path is values - errors @ shift, shift = plain - shrink * along * jumps.
    moved = np.einsum("cj,cjn->cn", once * along, prior.jumps)
    shift = of_path @ plain - moved.sum(0)
    steps = prior.jumps.reshape(-1, len(values))
    within = np.tensordot(of_path, prior.residual, 1) - (steps.T * (once + twice * along**2).ravel()) @ steps
    between = (plain.T * of_path) @ plain - curved.T @ moved - moved.T @ curved
    return values - errors @ shift, errors - errors @ (within - between + np.outer(shift, shift)) @ errors


def _after(values: Array) -> Array:
    """Sum the last axis (n) from each place but the first to the end, and put these places (J) before what is left."""
    sums = np.cumsum(values[..., ::-1], -1)[..., -2::-1]
    return sums if values.ndim == 2 else np.moveaxis(sums, -1, 1)


def _paths(versions: Integers) -> Array:
    """Return covariances (G, n, n) of the path in units of the errors: Matern 1/2, then the curved ones, Matern 5/2."""
    time = versions / np.median(np.diff(versions))
    distance = np.abs(time[:, None] - time)
    lengths, amplitudes = np.array(LENGTHS)[:, None, None], np.array(AMPLITUDES)[:, None, None]
    r = np.sqrt(5) * distance / lengths
    curved = (1 + r + r**2 / 3) * np.exp(-r)
    kernels = np.concatenate([np.exp(-distance / lengths), curved])
    return np.asarray(amplitudes**2 * kernels[:, None]).reshape(-1, *distance.shape)
