"""Does selection keep the gain and tell its value: simulated runs whose truth is known, seeds fixed beforehand.

    python -m benchmarks.selection --out selection            # every cell: selection.md and selection.csv

Units: the gain of the best version over the base, so a share is a true value. One evaluation has standard error `se`;
the re-evaluation and the untouched sample have the same. Errors are independent and their size known, or those of 100
prompts whose scores correlate between versions, equally (paired) or less with distance (drifting), the covariance
estimated from them. These take three times as long and are measured at a tenth of the gain only. Bias and width are in
standard errors. The KL budget is half of what the run spends, declared without knowing the run.
"""

import argparse
import csv
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import Curve, choose, from_means, from_scores, report, shortlist
from trainers.mismatch.selection import Estimate

Array = NDArray[np.float64]
Sample = Callable[[np.random.Generator, Array, list[int], float], Curve]

SEED, PROMPTS, CORRELATION = 20_240_602, 100, 0.7
LISTED = 3
KEPT = (
    "selected",
    "smoothed best",
    "3-point mean",
    "3-point mean, re-evaluated",
    "raw best",
    "last",
    "highest reward",
    "KL budget",
)
RIVALS = ("smoothed best", "3-point mean", "raw best", "last", "highest reward", "KL budget")
SAMPLES = ("untouched", "curve")
NO_GAIN = ("flat", "only falls")  # there the base is best: the share is the true value itself, at most 0
GOAL_KEPT, GOAL_COVERAGE, GOAL_SE = 0.95, 0.93, 0.1
Told = tuple[float, float, float]  # error, width, 1 if missed


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A truth (K,) with the errors of its evaluations."""

    name: str
    truth: Array
    errors: str  # of ERRORS
    se: float
    seed: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One cell over R runs."""

    kept: dict[str, Array]  # by rule (R,): the true value of what it chose
    value: dict[str, Array]  # by sample (R, 3): error and width in standard errors, 1 if the interval missed
    gain: dict[str, Array]


def truths(points: int) -> dict[str, Array]:
    """Return the paths (K,), 0 at the base and 1 at the best version; for the last two the base is the best one."""
    time = np.linspace(0, 1, points)
    root = np.sqrt(30 * time)
    paths = {
        "kink early": np.minimum(time / 0.3, 1 - 1.2 * (time - 0.3) / 0.7),
        "kink late": np.minimum(time / 0.6, 1 - 1.2 * (time - 0.6) / 0.4),
        "quadratic early": -((time - 0.3) ** 2),
        "quadratic late": -((time - 0.6) ** 2),
        "plateau": np.minimum(time / 0.4, 1),
        "plateau, then a fall": np.minimum(np.minimum(time / 0.3, 1), 1 - 3 * (time - 0.7)),
        "rise to the last": time,
        "saturating": 1 - np.exp(-3 * time),
        "peak at the second": np.where(time > 0, 1 - 1.5 * (time - time[1]), 0.0),
        "cliff": np.where(time <= 0.6, np.minimum(time / 0.6, 1), 0.2),
        "d (1 - log d)": root * (1 - 0.45 * np.log(np.maximum(root, 1e-9))),
    }
    shaped = {name: (path - path[0]) / (path.max() - path[0]) for name, path in paths.items()}
    return {**shaped, "flat": np.zeros(points), "only falls": -time}


def independent(rng: np.random.Generator, truth: Array, versions: list[int], se: float) -> Curve:
    """Means with independent errors of known standard error."""
    return from_means("gold", versions, (truth + se * rng.standard_normal(len(truth))).tolist(), [se] * len(truth))


def paired(rng: np.random.Generator, truth: Array, versions: list[int], se: float) -> Curve:
    """Scores of the same prompts at every version, fresh prompts at every call."""
    own = rng.standard_normal((len(truth), PROMPTS))
    both = np.sqrt(1 - CORRELATION) * own + np.sqrt(CORRELATION) * rng.standard_normal(PROMPTS)
    return from_scores("gold", versions, truth[:, None] + se * np.sqrt(PROMPTS) * both)


def drifting(rng: np.random.Generator, truth: Array, versions: list[int], se: float) -> Curve:
    """Scores as in `paired`, but neighbours answer more alike than distant versions: correlations from 0.83 to 0.5."""
    apart = np.abs(np.subtract.outer(versions, versions))
    correlation = 0.5 + 0.4 * np.exp(-apart / 5) + 0.1 * np.eye(len(versions))
    both = np.linalg.cholesky(correlation) @ rng.standard_normal((len(truth), PROMPTS))
    return from_scores("gold", versions, truth[:, None] + se * np.sqrt(PROMPTS) * both)


ERRORS: dict[str, Sample] = {"independent": independent, "paired": paired, "drifting": drifting}


def cells(errors: Sequence[str], points: Sequence[int], sizes: Sequence[float], seed: int = SEED) -> Iterator[Cell]:
    """Yield every truth with each kind of errors, number of evaluated versions and standard error; see above."""
    for kind, count, se in itertools.product(errors, points, sizes):
        if kind != "independent" and se != GOAL_SE:
            continue
        for number, (name, truth) in enumerate(truths(count).items()):
            key = (seed, list(ERRORS).index(kind), count, round(1000 * se), number)
            yield Cell(name=name, truth=truth, errors=kind, se=se, seed=key)


def averaged(mean: Array) -> Array:
    """Mean over 3 points, over 2 at the ends."""
    ones = np.ones(3)
    return np.convolve(mean, ones, "same") / np.convolve(np.ones(len(mean)), ones, "same")


def measure(cell: Cell, runs: int) -> Measured:
    """Select `runs` times on one truth."""
    rng = np.random.default_rng(cell.seed)
    every = [_one(rng, cell) for _ in range(runs)]
    return Measured(
        kept={rule: np.array([kept[rule] for kept, _, _ in every]) for rule in KEPT},
        value={source: np.array([value[source] for _, value, _ in every]) for source in SAMPLES},
        gain={source: np.array([gain[source] for _, _, gain in every]) for source in SAMPLES},
    )


def _one(rng: np.random.Generator, cell: Cell) -> tuple[dict[str, float], dict[str, Told], dict[str, Told]]:
    """Return the true value of what each rule chose, and what value and gain say from each sample."""
    truth, points, sample = cell.truth, len(cell.truth), ERRORS[cell.errors]

    def evaluate(at: list[int]) -> Curve:
        return sample(rng, truth[at], at, cell.se)

    curve = evaluate(list(range(points)))
    choice = choose(curve, evaluate(list(shortlist(curve, LISTED).versions)))
    early = choose(curve)
    found = {
        "untouched": report(choice, evaluate(sorted({choice.version or 0, 0}))),
        "curve": report(early),
    }
    smooth = averaged(curve.mean)
    listed = sorted({0, *(np.argsort(-smooth[1:])[:LISTED] + 1).tolist()})
    both = (curve.mean[listed] + evaluate(listed).mean) / 2
    reward = np.arange(points) + rng.standard_normal(points)
    chosen = {
        "selected": choice.version,
        "smoothed best": early.version,
        "3-point mean": np.argmax(smooth),
        "3-point mean, re-evaluated": listed[np.argmax(both)],
        "raw best": np.argmax(curve.mean),
        "last": points - 1,
        "highest reward": np.argmax(reward),
        "KL budget": points // 2,
    }
    value = {k: _told(one.value, truth[one.version or 0], cell.se) for k, one in found.items()}
    gain = {k: _told(one.gain, truth[one.version or 0], cell.se) for k, one in found.items()}
    return {rule: float(truth[at or 0]) for rule, at in chosen.items()}, value, gain


def _told(said: Estimate | None, true: float, se: float) -> Told:
    if said is None:
        raise ValueError("nothing was said: a simulated run is never too short")
    miss = not said.low - 1e-9 <= true <= said.high + 1e-9
    return (said.value - true) / se, (said.high - said.low) / se, float(miss)


def row(cell: Cell, measured: Measured) -> dict[str, object]:
    """Return the line of one cell: means over its runs, their standard errors, and the goals that it misses."""
    kept = measured.kept
    runs = len(kept["selected"])
    found: dict[str, object] = {
        "truth": cell.name, "errors": cell.errors, "K": len(cell.truth), "SE": cell.se, "runs": runs,
        **{rule: round(float(kept[rule].mean()), 4) for rule in KEPT},
    }  # fmt: skip
    told = {"value": measured.value, "gain": measured.gain}
    for what, source in itertools.product(told, SAMPLES):
        off, width, miss = told[what][source].T
        found[f"{what} {source} bias"] = round(float(off.mean()), 4)
        found[f"{what} {source} bias ±"] = round(1.96 * float(off.std(ddof=1)) / runs**0.5, 4)
        found[f"{what} {source} coverage"] = round(1 - float(miss.mean()), 4)
        found[f"{what} {source} width"] = round(float(np.median(width)), 3)
    found["misses"] = "; ".join(_misses(cell, measured, found))
    return found


def _misses(cell: Cell, measured: Measured, found: dict[str, object]) -> Iterator[str]:
    kept = measured.kept
    if cell.se <= GOAL_SE and cell.name not in NO_GAIN:
        if kept["selected"].mean() < GOAL_KEPT:
            yield f"keeps less than {GOAL_KEPT:.0%}"
        for rule in RIVALS:
            less = kept[rule] - kept["selected"]
            if less.mean() > 1.96 * less.std(ddof=1) / len(less) ** 0.5:
                yield f"behind {rule}"
    for what in ("value", "gain"):
        bias, half = (float(str(found[f"{what} untouched {name}"])) for name in ("bias", "bias ±"))
        if abs(bias) > half:
            yield f"{what}: bias"
        for source in SAMPLES:
            if float(str(found[f"{what} {source} coverage"])) < GOAL_COVERAGE:
                yield f"{what}, {source}: coverage"


def _measured(job: tuple[Cell, int]) -> dict[str, object]:
    cell, runs = job
    return row(cell, measure(cell, runs))


def table(rows: Sequence[dict[str, object]]) -> str:
    """Return two tables, every cell in each: shares of the gain in percent, then what is said of value and gain."""
    where = ["truth", "errors", "K", "SE"]
    shares = [
        [*(str(one[key]) for key in where), *(f"{100 * float(str(one[rule])):.1f}" for rule in KEPT)] for one in rows
    ]
    samples = [f"{what} {source}" for what in ("value", "gain") for source in SAMPLES]
    parts = ("bias", "bias ±", "coverage", "width")
    told = [
        [
            *(str(one[key]) for key in where),
            *("{:+.2f} ± {:.2f}, {:.3f}, {:.2f}".format(*(one[f"{of} {part}"] for part in parts)) for of in samples),
            str(one["misses"]),
        ]
        for one in rows
    ]
    titles = [f"{of}: bias, coverage, width" for of in samples]
    return f"{_markdown([*where, *KEPT], shares)}\n{_markdown([*where, *titles, 'misses'], told)}"


def summary(rows: Sequence[dict[str, object]]) -> str:
    """Return, for each kind of errors, K and SE, what the rules keep over the truths that have a gain, in percent."""
    where = ("errors", "K", "SE", "runs")
    lines = []
    for key in dict.fromkeys(tuple(one[name] for name in where) for one in rows):
        found = [one for one in rows if tuple(one[name] for name in where) == key and one["truth"] not in NO_GAIN]
        kept = 100 * np.array([[one[rule] for rule in KEPT] for one in found], np.float64)
        lines.append([*map(str, key), f"{kept[:, 0].min():.1f}", *(f"{share:.1f}" for share in kept.mean(0))])
    return _markdown([*where, "selected, least of all truths", *KEPT], lines)


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Measure every cell and write both tables; each line is printed as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 50], help="evaluated versions of a run")
    parser.add_argument("--se", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="standard error over the gain")
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=list(ERRORS))
    parser.add_argument("--seed", type=int, default=SEED, help="another one to develop on")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("selection"), help="without its ending")
    options = parser.parse_args()
    jobs = [(cell, options.runs) for cell in cells(options.errors, options.points, options.se, options.seed)]
    rows: list[dict[str, object]] = []
    with get_context("spawn").Pool(options.processes) as pool, options.out.with_suffix(".csv").open("w") as file:
        for one in pool.imap(_measured, jobs):
            rows.append(one)
            writer = csv.DictWriter(file, list(one), lineterminator="\n")
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(one)
            file.flush()
            print(*(one[key] for key in ("truth", "errors", "K", "SE", "selected", "misses")), sep=" | ", flush=True)
    options.out.with_suffix(".md").write_text(f"{summary(rows)}\n{table(rows)}")


if __name__ == "__main__":
    main()
