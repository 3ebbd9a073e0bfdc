"""How often early warnings are false, and how far ahead they come, on simulated runs; seeds fixed beforehand.

    python -m benchmarks.early --runs 1000 --points 10 20 50

Each run has 8 quantities, measured at every evaluated version, and warnings at 5 % a run for all together. Units: the
standard deviation of a quantity's noise.

In the first table nothing happens, but for two drifts that the rule takes for a change though they may be harmless: the
share of runs with any warning, and of quantities with one.

In the second, one quantity changes two evaluations before the evaluation's peak, by a jump or by a ramp over three
evaluations, and the evaluation falls by 6 of its standard errors in the three after the peak. A warning
counts from the change on. `by the peak`: before anything is lost. `before the alarm`: of the runs in which the alarm of
`trainers.mismatch` finds the fall within 8 evaluations of the peak, those warned of earlier; `ahead`: by how many
evaluations, median of the runs with both.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import scan
from trainers.mismatch.alarm import margin_by_look
from trainers.mismatch.early import departure, null

Array = NDArray[np.float64]

ALPHA, SEED, BOUNDARY_RUNS, QUANTITIES = 0.05, 20_240_702, 20_000, 8
LEAD, RAMP, DROP, WAITED = 2, 3, 6.0, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the quantities of a run do: a drift (K,), and noise around it."""

    name: str
    drift: Array
    correlation: float = 0.3  # of neighbours
    tails: bool = False  # Student's t with 4 degrees of freedom
    count: float | None = None  # the mean of a Poisson count, instead of all this


def families(points: int) -> Iterator[Family]:
    """Yield what harmless runs do at `points` evaluated versions."""
    time = np.arange(points, dtype=np.float64)
    flat, way = np.zeros(points), time / (points - 1)
    for correlation in (0.0, 0.3, 0.6, 0.8):
        yield Family(name=f"no drift, AR(1) {correlation:g}", drift=flat, correlation=correlation)
    yield Family(name="straight drift, 20 in all", drift=20 * way)
    yield Family(name="saturating drift, 20 in all", drift=20 * -np.expm1(-4 * way))
    yield Family(name="quadratic drift, 5 in all", drift=5 * way**2)
    yield Family(name="no drift, heavy tails", drift=flat, tails=True)
    yield Family(name="counts, 0.3 on average", drift=flat, count=0.3)
    yield Family(name="counts, 3 on average", drift=flat, count=3.0)
    yield Family(name="by the rule a change: quadratic, 20 in all", drift=20 * way**2)
    yield Family(name="by the rule a change: there and back, 20 each", drift=20 * (1 - np.abs(2 * way - 1)))


def simulate(family: Family, runs: int, rng: np.random.Generator) -> Array:
    """Draw series (K, runs)."""
    shape = (len(family.drift), runs)
    if family.count is not None:
        return rng.poisson(family.count, shape).astype(np.float64)
    noise = rng.standard_t(4, shape) / np.sqrt(2) if family.tails else rng.standard_normal(shape)
    for t in range(1, len(noise)):
        noise[t] = family.correlation * noise[t - 1] + np.sqrt(1 - family.correlation**2) * noise[t]
    return np.asarray(family.drift[:, None] + noise)


def first_warned(values: Array, bound: Array, *, counts: bool = False) -> NDArray[np.int64]:
    """Return the look of the first warning of each series (K, S), K where there is none."""
    grains = np.ones(len(values)) if counts else None
    crossed = departure(values, grains) > bound[:, None]
    return np.where(crossed.any(0), crossed.argmax(0), len(values))


def false_warnings(family: Family, bound: Array, runs: int, seed: Sequence[int]) -> tuple[float, float]:
    """Return the share of runs with any warning, and of quantities with one."""
    values = simulate(family, runs * QUANTITIES, np.random.default_rng(seed))
    warned = first_warned(values, bound, counts=family.count is not None) < len(values)
    return float(warned.reshape(QUANTITIES, runs).any(0).mean()), float(warned.mean())


def ahead(
    size: float, ramp: bool, bound: Array, alarm: Array, runs: int, seed: Sequence[int]
) -> tuple[float, float, float]:
    """Return the shares warned of by the peak and before the alarm, and the median lead, of runs that fall."""
    points = len(bound)
    peak, rng = points // 2, np.random.default_rng(seed)
    change = peak - LEAD
    time = np.arange(points, dtype=np.float64)
    step = np.clip((time - change + 1) / RAMP, 0, 1) if ramp else (time >= change).astype(np.float64)
    values = simulate(Family(name="", drift=size * step), runs, rng)
    crossed = departure(values) > bound[:, None]
    crossed[:change] = False
    warned = np.where(crossed.any(0), crossed.argmax(0), points)
    gold = DROP / 9 * np.minimum(time - peak, 0) - DROP / 3 * np.maximum(time - peak, 0)
    stated = np.eye(points)
    measured = gold[:, None] + rng.standard_normal((points, runs))
    z = scan.path_maxima(measured, stated, margin_by_look(stated, None)) / scan.noise_scale(measured, stated)
    fell = z > alarm[:, None]
    fell[: peak + 1] = False
    raised = np.where(fell.any(0), fell.argmax(0), points)
    found = raised <= peak + WAITED
    both = found & (raised < points) & (warned < points)
    lead = float(np.median((raised - warned)[both])) if both.any() else np.nan
    return float((warned <= peak).mean()), float((warned < raised)[found].mean()), lead


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 50], help="evaluated versions of a run")
    options = parser.parse_args()
    bounds = {}
    print("| nothing happens | K | runs | any warning, K known | K unknown | a quantity's, K known | K unknown |")
    print("|---|---|---|---|---|---|---|")
    for points in options.points:
        maxima, falls = null(points, BOUNDARY_RUNS, SEED), scan.null_maxima(np.eye(points), BOUNDARY_RUNS, SEED)
        share = ALPHA / QUANTITIES
        bounds[points] = [(scan.boundary(maxima, share, k), scan.boundary(falls, ALPHA, k)) for k in (points, None)]
        for number, family in enumerate(families(points)):
            seed = (SEED, points, number)
            rates = [false_warnings(family, bound, options.runs, seed) for bound, _ in bounds[points]]
            columns = " | ".join(f"{rate[which]:.3f}" for which in (0, 1) for rate in rates)
            print(f"| {family.name} | {points} | {options.runs} | {columns} |", flush=True)
    print("\n| change | K | by the peak, K known | K unknown | before the alarm | K unknown | ahead | K unknown |")
    print("|---|---|---|---|---|---|---|---|")
    for points in options.points:
        for number, (size, ramp) in enumerate((size, ramp) for ramp in (False, True) for size in (4.0, 8.0, 16.0)):
            seed = (SEED, points, 100 + number)
            found = [ahead(size, ramp, *bound, options.runs, seed) for bound in bounds[points]]
            columns = " | ".join(f"{one[which]:.2f}" for which in (0, 1, 2) for one in found)
            print(f"| {'ramp' if ramp else 'jump'} of {size:g} | {points} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
