"""What the true values of one evaluation were: the measured curve, smoothed by what is known of its errors."""

from collections.abc import Iterator

import numpy as np
from scipy import special

from trainers.mismatch import scan
from trainers.mismatch.series import Array, Curve, Integers

# Of the path: in standard errors, those of the difference of two neighbours over the square root of 2.
AMPLITUDES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LENGTHS = (1.0, 3.0, 9.0, 27.0)  # over which the path is correlated, in median distances between versions
JITTER = 1e-6  # of the errors' variance, so that no covariance is singular


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
    errors = scan.floored(curve.covariance)
    variance = np.diag(errors)
    steps = (variance[1:] + variance[:-1] - 2 * np.diag(errors, 1)) / 2
    unit = max(float(np.median(steps)), scan.CONTRAST_FLOOR**2 * float(variance.mean()))
    errors = errors / unit + JITTER * np.eye(len(variance))
    level = float(curve.mean.mean())
    parts = [_regress((curve.mean - level) / np.sqrt(unit), errors, prior) for prior in _priors(curve.versions, rough)]
    evidence = np.array([one for one, _, _ in parts])
    evidence[1:] -= np.log(len(parts) - 1)  # a jump somewhere is as likely beforehand as none
    weight = special.softmax(evidence)
    mean, apart = _centre(weight, np.stack([one for _, one, _ in parts]))
    covariance = np.tensordot(weight, np.stack([one for _, _, one in parts]), 1) + apart
    return level + np.sqrt(unit) * mean, unit * (covariance + covariance.T) / 2


def _regress(values: Array, errors: Array, priors: Array) -> tuple[float, Array, Array]:
    """Return log evidence, posterior mean (n,) and covariance (n, n), averaged over prior covariances (G, n, n)."""
    inverse = np.linalg.inv(priors + errors)
    across = inverse.sum(-1)
    precision = across.sum(-1)
    residual = inverse - across[:, :, None] * across[:, None, :] / precision[:, None, None]
    evidence = (np.linalg.slogdet(inverse)[1] - np.log(precision) - residual @ values @ values) / 2
    weight = special.softmax(evidence)
    mean, apart = _centre(weight, values - residual @ values @ errors)
    covariance = errors - errors @ np.tensordot(weight, residual, 1) @ errors + apart
    return float(special.logsumexp(evidence) - np.log(len(priors))), mean, covariance


def _centre(weight: Array, means: Array) -> tuple[Array, Array]:
    """Return the mean (n,) and the covariance (n, n) of means (G, n) with weights (G,) that sum to 1."""
    mean = weight @ means
    return mean, (weight[:, None] * (means - mean)).T @ (means - mean)


def _priors(versions: Integers, rough: bool) -> Iterator[Array]:
    """Yield covariances (G, n, n) of the path in units of the errors: without a jump, then with one at each place."""
    time = versions / np.median(np.diff(versions))
    distance = np.abs(time[:, None] - time)
    lengths, amplitudes = np.array(LENGTHS)[:, None, None], np.array(AMPLITUDES)[:, None, None, None]
    r = np.sqrt(5) * distance / lengths
    curved = (1 + r + r**2 / 3) * np.exp(-r)
    whole = np.concatenate([np.exp(-distance / lengths), *([] if rough else [curved])])
    yield (amplitudes**2 * whole).reshape(-1, *distance.shape)
    place = np.arange(len(time))
    for jump in range(1, len(time)):
        together = (place < jump)[:, None] == (place < jump)
        yield (amplitudes[1:-1] ** 2 * curved[1:] * together).reshape(-1, *distance.shape)
