"""Does the alarm tell the truth: false alarms and power on simulated runs whose truth is known, seeds fixed beforehand.

    python -m benchmarks.instrument --runs 1000 --points 10 20 50

Units: one standard error of an evaluation, as it is stated to the alarm. `drop` is the true fall from the peak to three
evaluations after it. An alarm counts as found when it is raised after the peak, at most three evaluations later.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import scan
from trainers.mismatch.alarm import margin_by_look

Array = NDArray[np.float64]
Errors = Callable[[np.random.Generator, int, int], Array]

ALPHA, SEED, BOUNDARY_RUNS = 0.05, 20_240_601, 20_000
DROPS = (4.0, 5.0, 6.0)
WITHIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A truth (K,), the errors around it, and the peak of the truth, if it falls."""

    name: str
    truth: Array
    errors: Errors
    peak: int | None = None


def independent(sd: float) -> Errors:
    """Errors of standard deviation `sd`, stated as 1."""
    return lambda rng, points, runs: sd * rng.standard_normal((points, runs))


def autoregressive(rng: np.random.Generator, points: int, runs: int) -> Array:
    """Errors of standard deviation 1 whose neighbours correlate by 0.6."""
    errors = rng.standard_normal((points, runs))
    for point in range(1, points):
        errors[point] = 0.6 * errors[point - 1] + 0.8 * errors[point]
    return errors


def heavy(rng: np.random.Generator, points: int, runs: int) -> Array:
    """Errors of Student's t with 4 degrees of freedom, standard deviation 1."""
    return np.asarray(rng.standard_t(4, (points, runs)) / np.sqrt(2))


def cells(points: int) -> Iterator[Cell]:
    """Yield the null families and the falls for `points` evaluated versions."""
    time = np.arange(points, dtype=np.float64)
    flat, right = np.zeros(points), independent(1.0)
    yield Cell(name="null flat", truth=flat, errors=right)
    yield Cell(name="null slow rise", truth=0.3 * time, errors=right)
    yield Cell(name="null plateau", truth=2.0 * np.minimum(time, points // 3), errors=right)
    two_stages = 2.0 * np.minimum(time, points // 4) + 2.0 * np.maximum(time - points // 2, 0)
    yield Cell(name="null two-stage rise", truth=two_stages, errors=right)
    yield Cell(name="null heavy tails", truth=flat, errors=heavy)
    yield Cell(name="null SE understated 1.1", truth=flat, errors=independent(1.1))
    yield Cell(name="null SE understated 1.25", truth=flat, errors=independent(1.25))
    yield Cell(name="null jitter 1 SE", truth=flat, errors=independent(float(np.sqrt(2))))
    yield Cell(name="null AR(1) 0.6", truth=flat, errors=autoregressive)
    for where, peak in (("early", 1), ("middle", points // 2), ("late", points - 1 - WITHIN)):
        after = np.maximum(time - peak, 0)
        rise = np.minimum(time - peak, 0)
        for drop in DROPS:
            falls = {
                "kink": drop / 9 * rise - drop / 3 * after,
                "quadratic": -drop * ((time - peak) / 3) ** 2,
                "cliff": np.where(after > 0, -drop, 0.0),
            }
            for shape, truth in falls.items():
                yield Cell(name=f"{shape} {where} drop {drop:g}", truth=truth, errors=right, peak=peak)


def measure(cell: Cell, bound: Array, margins: Array, runs: int, seed: Sequence[int]) -> float:
    """Return the share of `runs` with a false alarm, or of those where the fall was found in time."""
    points = len(cell.truth)
    measured = cell.truth[:, None] + cell.errors(np.random.default_rng(seed), points, runs)
    stated = np.eye(points)
    crossed = scan.path_maxima(measured, stated, margins) / scan.noise_scale(measured, stated) > bound[:, None]
    if cell.peak is None:
        return float(crossed.any(0).mean())
    before = crossed[: cell.peak + 1].any(0)
    return float((~before & crossed[cell.peak + 1 : cell.peak + 1 + WITHIN].any(0)).mean())


def main() -> None:
    """Print one line a cell: the share without a margin and with the default one, the plan known and not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 50], help="evaluated versions of a run")
    options = parser.parse_args()
    print("| cell | K | runs | margin 0, K known | margin 0, K unknown | default, K known | default, K unknown |")
    print("|---|---|---|---|---|---|---|")
    for points in options.points:
        stated = np.eye(points)
        maxima = scan.null_maxima(stated, BOUNDARY_RUNS, SEED)
        bounds = [scan.boundary(maxima, ALPHA, planned) for planned in (points, None)]
        margins = [margin_by_look(stated, margin) for margin in (0.0, None)]
        for number, cell in enumerate(cells(points)):
            seed = (SEED, points, number)
            shares = [measure(cell, bound, less, options.runs, seed) for less in margins for bound in bounds]
            columns = " | ".join(f"{share:.3f}" for share in shares)
            print(f"| {cell.name} | {points} | {options.runs} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
