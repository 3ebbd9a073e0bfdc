"""Does the alarm tell the truth: false alarms and power on simulated runs whose truth is known, seeds fixed beforehand.

    python -m benchmarks.instrument --runs 1000 --points 10 20 50 --out alarm.csv

Units: one standard error of an evaluation, as it is stated to the alarm; with paired prompts, that of a difference
over the square root of 2. A row is the share of runs with a false alarm, or of those where the fall was found: raised
after the peak, at most three evaluations later, where the truth has fallen by the drop in the row's name; a slow drift
may be found until the end of the run. Beside the alarm stand the plain scan (no shapes, no winsorising, no noise scale;
margin 0, K known) and what is possible: a test that knows the fall's shape but not its peak, by simulation, and one
that knows shape, drop and peak, with margin 0 and the default one (Neyman & Pearson: the distance from the fall to H0).
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.optimize import isotonic_regression, nnls

from benchmarks.runs import WITHIN, Cell, Shape, cells, measured_scores, near_ceiling, paired, quadratic
from trainers.mismatch import scan
from trainers.mismatch.alarm import MARGIN_SE, margin_by_look
from trainers.mismatch.series import Array

ALPHA, SEED, BOUNDARY_RUNS = 0.05, 20_240_601, 20_000
PROMPTS = 400
OTHERS = 3
PLAIN_LATEST, PLAIN_LENGTHS = 4, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
GOALS = {"6": 0.95, "5": 0.85, "4": 0.6}  # by drop: share found
ROBUST = ("null SE understated", "null jitter", "null AR(1)")  # 2 alpha, with the default margin
HEADS = ("plain", "0, known", "0, unknown", "default, known", "default, unknown", "shape", "all", "all, default")
MARGINS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Shares of runs of one cell; None: the cell is no null at that margin, or nobody can say."""

    cell: str
    points: int
    runs: int
    plain: float | None
    zero_known: float | None  # margin 0, K known
    zero_unknown: float | None
    default_known: float | None  # the default margin
    default_unknown: float | None
    knows_shape: float | None = None
    knows_all: float | None = None
    knows_all_default: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bounds:
    """Boundaries (K,) for one number of points whose errors are independent, of standard deviation 1."""

    known: Array
    unknown: Array
    plain: Array


def bounds(points: int, runs: int, alpha: float = ALPHA) -> Bounds:
    """Simulate the alarm's boundaries and that of the plain scan."""
    maxima = scan.null_maxima(np.eye(points), runs, SEED)
    plain = plain_maxima(scan.null_paths(np.eye(points), runs // 2, SEED))
    return Bounds(
        known=scan.boundary(maxima, alpha, points),
        unknown=scan.boundary(maxima, alpha),
        plain=scan.boundary(plain, alpha, points),
    )


def plain_maxima(paths: Array) -> scan.Runs:
    """Scan (K, S) as notes say: every earlier block against the mean of the latest 1 to 4 points; errors known."""
    points, runs = paths.shape
    sums = np.concatenate([np.zeros((1, runs)), np.cumsum(paths - paths[0], 0)]).astype(np.float32)
    blocks = {n: (sums[n:] - sums[:-n]) / np.float32(n) for n in PLAIN_LENGTHS if n < points}
    out = np.full((points, runs), -np.inf, np.float32)
    for look in range(1, points):
        for m in range(1, min(PLAIN_LATEST, look) + 1):
            now = (sums[look + 1] - sums[look + 1 - m]) / np.float32(m)
            for length, block in blocks.items():
                if length <= look + 1 - m:
                    best = block[: look + 2 - m - length].max(0)
                    out[look] = np.maximum(out[look], (best - now) / np.float32(np.sqrt(1 / length + 1 / m)))
    return out


def share(crossed: scan.Runs, cell: Cell) -> float:
    """Return the share of runs (of crossed looks (K, S)) with a false alarm, or with the fall found in time."""
    if cell.peak is None:
        return float(crossed.any(0).mean())
    last = len(crossed) if cell.to_the_end else cell.peak + 1 + WITHIN
    return float((~crossed[: cell.peak + 1].any(0) & crossed[cell.peak + 1 : last].any(0)).mean())


def measure(cell: Cell, bound: Bounds, runs: int, seed: Sequence[int]) -> Row:
    """Simulate one cell of independent errors, stated as 1."""
    points = len(cell.truth)
    paths = cell.truth[:, None] + cell.errors(np.random.default_rng(seed), points, runs)
    errors, margins = np.eye(points), margin_by_look(np.eye(points), None)
    default = scan.path_maxima(paths, errors, margins, versions=cell.versions)
    zero = None if cell.within_margin else scan.path_maxima(paths, errors, versions=cell.versions)
    plain = None if cell.within_margin else plain_maxima(paths)
    return Row(
        cell=cell.name,
        points=cell.planned or points,
        runs=runs,
        plain=None if plain is None else share(plain > bound.plain[:points, None], cell),
        zero_known=None if zero is None else share(zero > bound.known[:points, None], cell),
        zero_unknown=None if zero is None else share(zero > bound.unknown[:points, None], cell),
        default_known=share(default > bound.known[:points, None], cell),
        default_unknown=share(default > bound.unknown[:points, None], cell),
        **oracles(cell, runs, seed),
    )


def oracles(cell: Cell, runs: int, seed: Sequence[int]) -> dict[str, float]:
    """Return what tests that know more would find."""
    if cell.peak is None or cell.shape is None:
        return {}
    fall = cell.truth[: cell.peak + 1 + WITHIN]
    return {
        "knows_shape": knows_shape(cell, cell.shape, runs, seed),
        "knows_all": float(stats.norm.sf(stats.norm.isf(ALPHA) - distance(fall, 0.0))),
        "knows_all_default": float(stats.norm.sf(stats.norm.isf(ALPHA) - distance(fall, MARGIN_SE))),
    }


def knows_shape(cell: Cell, shape: Shape, runs: int, seed: Sequence[int]) -> float:
    """Return the share of runs in which the best contrast for a fall that peaked three looks ago finds it there."""
    points = len(cell.truth)
    time = np.arange(points, dtype=np.float64)
    weights = np.zeros((points, points))
    for look in range(1, points):
        path = shape(time[: look + 1] - max(look - WITHIN, 0))
        weights[look, : look + 1] = path - isotonic_regression(path).x
        weights[look] /= np.sqrt(np.sum(weights[look] ** 2))
    noise = scan.null_paths(np.eye(points), BOUNDARY_RUNS, SEED)
    bound = scan.boundary((weights @ noise).astype(np.float32), ALPHA, points)
    paths = cell.truth[:, None] + cell.errors(np.random.default_rng(seed), points, runs)
    return share(weights @ paths > bound[:, None], cell)


def distance(path: Array, margin: float) -> float:
    """Return the distance of a path (n,) to the nearest one that never falls by more than `margin`.

    Least distance programming by non-negative least squares (Lawson & Hanson 1974, chapter 23).
    """
    path = path[-12:]  # a rise that lies further back is within H0 already
    late, early = np.tril_indices(len(path), -1)
    rows = np.arange(len(late))
    constraints = np.zeros((len(late), len(path)))
    constraints[rows, late], constraints[rows, early] = 1, -1
    right = -margin - constraints @ path
    stacked = np.concatenate([constraints.T, right[None]])
    target = np.zeros(len(path) + 1)
    target[-1] = 1
    residual = stacked @ nnls(stacked, target)[0] - target
    return float(np.sqrt(np.sum((residual[:-1] / residual[-1]) ** 2)))


def from_scores(name: str, points: int, bound: Bounds, runs: int, seed: Sequence[int]) -> Row:
    """Simulate scores of the same prompts: standard errors and covariance are estimated, run by run."""
    binomial = name.startswith("null near ceiling")
    peak = None if name.startswith("null") else points // 2
    drop = 6.0 if peak is not None else 0.0
    truth = drop * quadratic(np.arange(points) - float(points // 2)) if drop else np.zeros(points)
    cell = Cell(name=name, truth=truth, errors=paired, peak=peak)
    widened = [scan.for_prompts(one, PROMPTS)[:, None] for one in (bound.known, bound.unknown)]
    found = np.zeros((2, 2, points, runs), bool)
    for run in range(runs):
        rng = np.random.default_rng([*seed, run])
        scores = near_ceiling(rng, points, PROMPTS) if binomial else measured_scores(rng, truth, PROMPTS)
        mean, covariance = scores.mean(1)[:, None], scan.floored(np.atleast_2d(np.cov(scores)) / PROMPTS)
        for row, margin in enumerate((0.0, None)):
            maxima = scan.path_maxima(mean, covariance, margin_by_look(covariance, margin))
            found[row, :, :, run] = [(maxima > one)[:, 0] for one in widened]
    shares = [share(one, cell) for one in found.reshape(4, points, runs)]
    return Row(
        cell=name,
        points=points,
        runs=runs,
        plain=None,
        zero_known=shares[0],
        zero_unknown=shares[1],
        default_known=shares[2],
        default_unknown=shares[3],
    )


def several(points: int, runs: int, seed: Sequence[int]) -> list[Row]:
    """A flat primary evaluation and three others, errors correlated by 0.5, of which the last falls: by Holm 1979."""
    truth = 6.0 * quadratic(np.arange(points) - float(points // 2))
    fall = Cell(name="", truth=truth, errors=paired, peak=points // 2)
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((points, runs))
    paths = [np.sqrt(0.5) * (shared + rng.standard_normal((points, runs))) for _ in range(1 + OTHERS)]
    paths[-1] = paths[-1] + truth[:, None]
    levels = {alpha: bounds(points, BOUNDARY_RUNS, alpha) for alpha in (ALPHA, *(ALPHA / j for j in range(2, 4)))}
    shares = []
    for margin in (0.0, None):
        less = margin_by_look(np.eye(points), margin)
        maxima = [scan.path_maxima(one, np.eye(points), less) for one in paths]
        for which in ("known", "unknown"):
            crossed = {
                alpha: np.stack([one > getattr(level, which)[:, None] for one in maxima])
                for alpha, level in levels.items()
            }
            level = holm(np.stack([crossed[ALPHA / j][1:].any(1) for j in range(OTHERS, 0, -1)]))
            raised = np.stack([crossed[ALPHA / j] for j in range(OTHERS, 0, -1)])
            final = np.take_along_axis(raised[:, 1:], level[None, None, None], 0)[0]
            shares.append((crossed[ALPHA][0].any(0).mean(), final[:-1].any((0, 1)).mean(), share(final[-1], fall)))
    names = ("null several: the primary one", "null several: the flat others, Holm", "several: quadratic middle drop 6")
    return [
        Row(
            cell=name,
            points=points,
            runs=runs,
            plain=None,
            zero_known=float(shares[0][place]),
            zero_unknown=float(shares[1][place]),
            default_known=float(shares[2][place]),
            default_unknown=float(shares[3][place]),
        )
        for place, name in enumerate(names)
    ]


def holm(rejected: Array) -> Array:
    """Return the step (S,) at which Holm 1979 ends, from rejections (step, evaluation, S): alpha / J first."""
    step = np.zeros(rejected.shape[2], np.int64)
    for _ in range(len(rejected) - 1):
        count = np.take_along_axis(rejected.sum(1), step[None], 0)[0]
        step = np.minimum(np.maximum(step, count), len(rejected) - 1)
    return step


def trade_off(points: int, bound: Bounds, runs: int) -> Iterator[str]:
    """Yield a table: what each margin lets through, and what it finds."""
    names = ("null heavy tails t(4)", "null SE understated 1.25", "null jitter 1 SE", "null AR(1) 0.8")
    names += tuple(f"{shape} middle drop {drop}" for shape in ("kink", "quadratic") for drop in (4, 5, 6))
    found = {cell.name: (number, cell) for number, cell in enumerate(cells(points))}
    yield "| margin, SE | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for margin in MARGINS:
        shares = []
        for number, cell in (found[name] for name in names):
            paths = cell.truth[:, None] + cell.errors(np.random.default_rng((SEED, points, number)), points, runs)
            maxima = scan.path_maxima(paths, np.eye(points), np.full(points, margin))
            shares.append(share(maxima > bound.known[:, None], cell))
        yield f"| {margin} | " + " | ".join(f"{one:.3f}" for one in shares) + " |"


def table(points: int, runs: int, bound: Bounds) -> Iterator[Row]:
    """Yield every row for `points` evaluated versions."""
    for number, cell in enumerate(cells(points)):
        yield measure(cell, bound, runs, (SEED, points, number))
    names = ("null paired prompts", "null near ceiling 0.97", "paired prompts: quadratic middle drop 6")
    for number, name in enumerate(names):
        yield from_scores(name, points, bound, runs, (SEED, points, 1_000 + number))
    yield from several(points, runs, (SEED, points, 2_000))


def misses(row: Row, column: str, value: float) -> bool:
    """Say whether the alarm misses its goal in that column; what it is compared with has none."""
    if not column.startswith(("zero", "default")):
        return False
    if row.cell.startswith("null"):
        robust = row.cell.startswith(ROBUST)
        return value > 2 * ALPHA if robust and column.startswith("default") else not robust and value > ALPHA
    goal = GOALS.get(row.cell.rpartition(" ")[2])
    return goal is not None and value < goal


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the markdown table: one line a cell, in each column one share a K, a star where the goal is missed."""
    columns = [field.name for field in fields(Row)][3:]
    yield "| cell | " + " | ".join(HEADS) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in dict.fromkeys(row.cell for row in rows):
        of = [row for row in rows if row.cell == name]
        yield f"| {name} | " + " | ".join(_shares(of, column) for column in columns) + " |"


def _shares(rows: Sequence[Row], column: str) -> str:
    values = [(row, getattr(row, column)) for row in rows]
    shown = (
        f"{value:.3f}".removeprefix("0") + "*" * misses(row, column, value)
        for row, value in values
        if value is not None
    )
    return " ".join(shown)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON or CSV, by the file's ending."""
    if path.suffix == ".json":
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    """Print the tables, and write the rows after each K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 50], help="evaluated versions of a run")
    parser.add_argument("--out", type=Path, help="also write the rows to this .csv or .json")
    options = parser.parse_args()
    rows: list[Row] = []
    for points in options.points:
        for row in table(points, options.runs, bounds(points, BOUNDARY_RUNS)):
            rows.append(row)
            print(f"K = {points}: {row.cell}", file=sys.stderr)
        if options.out:
            write(rows, options.out)
    print(f"K = {', '.join(map(str, options.points))}; {options.runs} runs a cell.\n")
    print("\n".join(summary(rows)), flush=True)
    for points in options.points[len(options.points) // 2 :][:1]:
        print(f"\nThe margin, K = {points} known:\n")
        for text in trade_off(points, bounds(points, BOUNDARY_RUNS), options.runs):
            print(text, flush=True)


if __name__ == "__main__":
    main()
