"""Runs whose truth is known, from the families of benchmarks/instrument.py, as reports and comparisons show them."""

from typing import Any

import numpy as np

from benchmarks.instrument import cells
from cluster.report.view import Sample, View, Warned
from trainers.mismatch import Curve, Series, Settings, correlate, find, from_means

SE = 0.05


def series(family: str, points: int = 10, seed: int = 0, every: int = 4) -> Series:
    """Simulate one run: reward and KL at every version, two evaluations at every `every`-th."""
    cell = next(cell for cell in cells(points) if cell.name == family)
    rng = np.random.default_rng(seed)
    evaluated = list(range(0, every * points, every))
    time = np.arange(evaluated[-1] + 1)
    gold = 0.6 + SE * (cell.truth + cell.errors(rng, points, 1)[:, 0])
    words = 12 + np.arange(points) + rng.normal(0, 0.4, points)
    reward = 2 + 1.5 * (1 - np.exp(-3 * time / time[-1])) + rng.normal(0, SE, len(time))
    kl = 0.4 * (time / time[-1]) ** 1.6 + rng.normal(0, 0.002, len(time))
    return Series(
        reward=from_means("reward/mean", time.tolist(), reward.tolist(), [SE] * len(time)),
        kl=from_means("kl/reference", time.tolist(), kl.tolist(), [0.002] * len(time)),
        evaluations=(
            from_means("helpdesk/gold", evaluated, gold.tolist(), [SE] * points),
            from_means("helpdesk/clarity", evaluated, words.tolist(), [0.4] * points),
        ),
    )


def view(
    family: str = "kink middle drop 6", points: int = 10, seed: int = 0, notes: tuple[str, ...] = (), **fields: Any
) -> View:
    """Build the view of one simulated run."""
    of = series(family, points, seed)
    assert of.kl is not None
    length = Curve(name="rollout/length_mean", versions=of.kl.versions, mean=20 + of.kl.mean, covariance=None)
    defaults: dict[str, Any] = {
        "name": f"simulated: {family}, seed {seed}",
        "findings": find(of, Settings(runs=2_000), notes=notes),
        "windows": correlate(of, window=6, draws=20),
        "warnings": (Warned(curve=length, says="20 at version 0, 20.4 at the last", error_rate="not measured"),),
        "samples": (
            Sample(prompt="My router is broken.", completions={0: "Restart it.", 36: "Thank you! Thank you!"}),
        ),
        "params": {"run.seed": str(seed), "algorithm.kl.coefficient": "0.02"},
        "evaluation_hash": "0123456789ab",
        "seconds": 162.0,
    }
    return View(**{**defaults, **fields})
