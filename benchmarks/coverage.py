"""Do the intervals of correlations, gap and length's share contain what they name: coverage on simulated runs.

    python -m benchmarks.coverage --runs 1000 --out /tmp/coverage

Units: the change of the reward and the gain of the evaluation are 1; errors of the reward have standard deviation 0.03,
those of the evaluation `se`. A truth stands still from run to run; the errors are drawn. Seeds are fixed.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.forecast import line, written
from trainers.mismatch import Curve, Series, between, from_means, length_share, length_share_of_prompts, proxy_gold_gap

Array = NDArray[np.float64]
Said = tuple[float, float] | None  # an interval; None: not enough

SEED = 20_240_604
REWARD_SE, LENGTH_SE = 0.03, 0.5
POINTS, SES, DRAWS = (10, 20), (0.05, 0.1, 0.2), 300
PROMPTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the intervals of one number were worth in `runs` runs of one truth."""

    number: str
    truth: str
    points: int
    se: float
    true: float
    runs: int
    coverage: float  # in the runs where something was said
    width: float  # their median
    silent: float  # share of the runs


def golds(points: int) -> dict[str, Array]:
    """Return evaluations (K,), with a gain of 1 where there is one."""
    time = np.linspace(0, 1, points)
    kink = np.where(time < 0.6, time / 0.6, 1 - 2 * (time - 0.6))
    return {
        "rising": time,
        "saturating": np.expm1(-4 * time) / np.expm1(-4),
        "wave": time + 0.3 * np.sin(12 * time),
        "inverted U": 4 * time * (1 - time),
        "kink": kink,
        "cliff": np.where(time < 0.7, time / 0.7, 0.2),
        "plateau, ties": np.minimum(2 * time, 1),
        "falling": 1 - time,
    }


def curved(points: int) -> Array:
    """Return a reward (K,) that rises throughout, at a pace that changes."""
    time = np.linspace(0, 1, points)
    return np.asarray(time + 0.15 * np.sin(5 * time))


def lengths(points: int) -> dict[str, tuple[Array, Array]]:
    """Return lengths in words and rewards (K,): the share of the rise that length buys, and moves of its own."""
    time = np.linspace(0, 1, points)
    rng = np.random.default_rng(SEED)
    words = 20 + 8 * time + 2 * rng.standard_normal(points)
    words[-1] = words[0] + 8
    own = 0.02 * rng.standard_normal(points)
    bought = (words - words[0]) / 8
    return {
        "none": (words, time),
        "half": (words, 0.5 * bought + 0.5 * time),
        "all": (words, bought),
        "half, own moves": (words, 0.5 * bought + 0.5 * time + own),
    }


def correlations(runs: int) -> Iterator[Cell]:
    """Yield the cells of Pearson, Spearman and Kendall of reward and evaluation."""
    oracles = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    for points, se in itertools.product(POINTS, SES):
        reward = curved(points)
        for number, (name, gold) in enumerate(golds(points).items()):
            rng = np.random.default_rng([SEED, 1, points, round(1000 * se), number])
            said: dict[str, list[Said]] = {kind: [] for kind in oracles}
            for _ in range(runs):
                for one in between(*_curves(rng, (reward, gold), (REWARD_SE, se)), draws=DRAWS):
                    said[one.kind].append(_interval(one.low, one.high))
            for kind, of in oracles.items():
                yield _cell(kind, name, points, se, float(of(reward, gold).statistic), said[kind])


def gaps(runs: int) -> Iterator[Cell]:
    """Yield the cells of the slope of gains on gains."""
    for points, se in itertools.product(POINTS, SES):
        reward = curved(points)
        for number, (name, gold) in enumerate(golds(points).items()):
            rng = np.random.default_rng([SEED, 2, points, round(1000 * se), number])
            x, y = reward[1:] - reward[0], gold[1:] - gold[0]
            true = float(x @ y / np.sqrt((x @ x) * (y @ y)))
            said: list[Said] = []
            for _ in range(runs):
                pair = _curves(rng, (reward, gold), (REWARD_SE, se))
                one = proxy_gold_gap(Series(reward=pair[0], evaluations=(pair[1],)), draws=DRAWS)
                said.append(_interval(one.low, one.high))
            yield _cell("gap", name, points, se, true, said)


def shares(runs: int) -> Iterator[Cell]:
    """Yield the cells of length's share, from curves and from prompts."""
    for points in POINTS:
        for number, (name, (words, reward)) in enumerate(lengths(points).items()):
            rng = np.random.default_rng([SEED, 3, points, number])
            said: list[Said] = []
            for _ in range(runs):
                pair = _curves(rng, (reward, words), (REWARD_SE, LENGTH_SE))
                one = length_share(Series(reward=pair[0], evaluations=(pair[0],)), pair[1])
                said.append(_interval(one.low, one.high))
            moves, changes = (np.diff(curve) - np.diff(curve).mean() for curve in (words, reward))
            slope = float(moves @ changes / (moves @ moves))
            true = slope * float(words[-1] - words[0]) / float(reward[-1] - reward[0])
            yield _cell("length's share, curves", name, points, REWARD_SE, true, said)
    for number, bought in enumerate((0.0, 0.5, 1.0)):
        rng = np.random.default_rng([SEED, 4, number])
        said = [_of_prompts(rng, bought) for _ in range(runs)]
        yield _cell("length's share, prompts", f"{bought:g} bought", 5, 0.0, bought, said)


def _of_prompts(rng: np.random.Generator, bought: float) -> Said:
    """Prompts are a sample: the population's slope is 0.1 a word and its mean length rises by 8 words."""
    part = np.linspace(0, 1, 5)[:, None]
    words = 30 + 8 * part + rng.normal(0, 10, PROMPTS) + rng.normal(0, 5, (5, PROMPTS))
    hard = rng.normal(0, 1, PROMPTS) - 0.3 * words.mean(0)
    rewards = bought * 0.1 * words + (1 - bought) * 0.8 * part + hard + rng.normal(0, 0.3, (5, PROMPTS))
    one = length_share_of_prompts(range(5), rewards, words, draws=DRAWS)
    return _interval(one.low, one.high)


def _curves(rng: np.random.Generator, truths: tuple[Array, Array], ses: tuple[float, float]) -> list[Curve]:
    versions = range(len(truths[0]))
    return [
        from_means(name, versions, (truth + se * rng.standard_normal(len(truth))).tolist(), [se] * len(truth))
        for name, truth, se in zip(("reward", "gold"), truths, ses, strict=True)
    ]


def _interval(low: float | None, high: float | None) -> Said:
    return None if low is None or high is None else (low, high)


def _cell(number: str, truth: str, points: int, se: float, true: float, said: list[Said]) -> Cell:
    low, high = np.array([one for one in said if one is not None]).reshape(-1, 2).T
    told = len(low) > 0
    return Cell(
        number=number,
        truth=truth,
        points=points,
        se=se,
        true=true,
        runs=len(said),
        coverage=float(np.mean((low - 1e-9 <= true) & (true <= high + 1e-9))) if told else float("nan"),
        width=float(np.median(high - low)) if told else float("nan"),
        silent=1 - len(low) / len(said),
    )


def by_truth(cells: list[Cell]) -> list[dict[str, object]]:
    """Put the standard errors of a number and truth side by side: coverage, median width, share silent where not 0."""
    rows: dict[tuple[str, str, int], dict[str, object]] = {}
    for cell in cells:
        first = {"number": cell.number, "truth": cell.truth, "K": cell.points, "true": f"{cell.true:+.2f}"}
        row = rows.setdefault((cell.number, cell.truth, cell.points), first)
        silent = f", silent {cell.silent:.2f}" if cell.silent else ""
        row[f"SE {cell.se:g}"] = f"{cell.coverage:.3f}, {cell.width:.2f}{silent}"
    return list(rows.values())


def main() -> None:
    """Print one line a cell; write coverage.csv, and tables by what is said, a row a truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {"correlations": correlations, "gap": gaps, "length": shares}
    every: list[dict[str, object]] = []
    for name, measured in tables.items():
        cells = []
        for cell in measured(options.runs):
            cells.append(cell)
            print(line(asdict(cell)), flush=True)
        every += [asdict(cell) for cell in cells]
        rows = by_truth(cells)
        for place, kind in enumerate(dict.fromkeys((*row,) for row in rows)):  # prompts have no standard error to vary
            written([row for row in rows if (*row,) == kind], options.out / (f"{name}_{place}" if place else name))
    written(every, options.out / "coverage")


if __name__ == "__main__":
    main()
