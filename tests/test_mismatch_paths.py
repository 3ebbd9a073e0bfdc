"""Draws of paths, one model at a time: the same numbers as from all models at once, which is slow and obvious."""

import numpy as np
import pytest
from scipy import special

from trainers.mismatch import paths
from trainers.mismatch.models import models

DRAWS = 300


def all_at_once(
    seen: paths.Seen,
    covariance: np.ndarray,
    prior: np.ndarray,
    still: np.ndarray,
    normal: np.ndarray,
    uniform: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights (R, G), values (R, S, N) and models (R, S): every model is conditioned and drawn from S times."""
    n = len(seen.x)
    lower = np.linalg.cholesky(covariance[:, :n, :n] + seen.covariance)
    inverse = np.linalg.inv(lower)
    surprise = inverse @ seen.mean.T
    gain = covariance[:, :, :n] @ np.swapaxes(inverse, 1, 2)
    mean = np.swapaxes(gain @ surprise, 1, 2)
    left = covariance - gain @ np.swapaxes(gain, 1, 2)
    sizes, vectors = np.linalg.eigh(left)
    root = vectors * np.sqrt(np.maximum(sizes, 0))[:, None]
    scores = -(surprise**2).sum(1) / 2 - np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)[:, None]
    bounded = covariance[:, -1, -1] > 0
    scores[bounded] += special.log_ndtr(mean[bounded, :, -1] / np.sqrt(left[bounded, -1, -1])[:, None]) + np.log(2)
    weights = paths._weights(scores.T + np.log(prior), still)
    chosen = np.array([np.searchsorted(np.minimum(np.cumsum(row) / row.sum(), 1), uniform) for row in weights])
    run = np.arange(len(weights))[:, None]
    around = (normal @ np.swapaxes(root, 1, 2))[chosen, np.arange(len(uniform))]
    values = mean[chosen, run] + around
    spread = np.einsum("gij,gj->gi", root, root[:, -1])[chosen]
    for r, s in np.argwhere(spread[:, :, -1] > 0):
        sd, centre = np.sqrt(spread[r, s, -1]), mean[chosen[r, s], r, -1]
        above = special.ndtr(centre / sd) * special.ndtr(-around[r, s, -1] / sd)
        cut = centre - sd * special.ndtri(above)
        values[r, s] += (cut - values[r, s, -1]) / sd**2 * spread[r, s]
    return weights, values[:, :, :-1], chosen


@pytest.mark.parametrize("points", [6, 14, 25])  # of 25 versions the models come in more than one part
def test_one_model_at_a_time_changes_no_number(points: int) -> None:
    rng, time, steps = np.random.default_rng(points), np.linspace(0, 1, points), np.arange(1.0, 5)
    mean = np.minimum(2 * time, 1.5 - time) + 0.2 * rng.normal(size=(4, points))
    seen = paths.standardise(mean, 0.04 * np.eye(points), np.arange(points), np.sqrt(time))
    x = np.concatenate([np.tile(seen.x, (2, 1)), 1 + np.outer([0.05, 0.1], steps)], 1)
    among = models(np.append(seen.steps, seen.steps[-1] + steps) / seen.steps[-1], x, points)
    still = np.array(among.names) == "level"
    assert points < 25 or len(still) > paths.CHUNK
    normal, uniform = rng.standard_normal((DRAWS, points + 5)), (rng.permutation(DRAWS) + 0.5) / DRAWS
    of_all, rows = all_at_once(seen, 16 * among.covariance, among.prior, still, normal, uniform), np.ones(4, bool)
    posterior = paths._posterior(seen, rows, among.covariance, 16.0, among.prior, still)
    values, chosen = paths._drawn(posterior, normal, uniform)
    np.testing.assert_allclose(posterior.weights, of_all[0], rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(chosen, of_all[2])
    np.testing.assert_allclose(values, of_all[1], rtol=0, atol=1e-12 * np.abs(of_all[1]).max())
