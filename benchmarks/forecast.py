"""Do headroom and forecasts tell the truth: coverage and CRPS on simulated runs inside and outside the laws.

    python -m benchmarks.forecast --runs 1000

Units: the gain from the base to the peak of the truth, which is at evaluation 16. A run is seen up to a share of that
d*; then the true values 1, 3 and 5 evaluations later are forecast, and the headroom up to 1.25 d*. Seeds are fixed.
CRPS stands against persistence: a normal of the last measured value and its standard error.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import Series, from_means
from trainers.mismatch.headroom import Answer, Forecast, crps, crps_normal, forecast, headroom_within

Array = NDArray[np.float64]

SEED = 20_240_602
PEAK, POINTS, STEP = 16, 22, 0.2  # evaluation of the peak, evaluations in all, sqrt(KL) an evaluation
AHEAD = (1, 3, 5)
SES = (0.03, 0.1, 0.2)
SHARES = (0.375, 0.5, 0.75, 1.0)
BUDGET = 1.25  # of d*


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Truths (POINTS,) drawn for a run; `se` is given since jitter is measured in it."""

    name: str
    truth: Callable[[np.random.Generator, float], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What `runs` runs gave; one entry a horizon, NaN where every answer was "not identified"."""

    ratio: Array  # (3,) mean CRPS over that of persistence, in the runs where something was said
    spread: Array  # (3,) its standard error, by the bootstrap over runs
    coverage: Array  # (3,) of the 95 % intervals, in the same runs
    width: Array  # (3,) their median
    smooth_coverage: Array  # (3,) of the intervals without surprises
    silent: Array  # (3,) share "not identified"
    headroom_coverage: float  # of what was said about the headroom
    headroom_smooth: float  # of its interval without surprises, in all runs
    headroom_answers: dict[Answer, float]


def families() -> Iterator[Family]:
    """Yield the two laws, and truths outside of them."""
    time = np.arange(POINTS, dtype=np.float64)
    part = time / PEAK
    bon = part * (2 - part)
    rise = np.minimum(part, 1)
    after = np.maximum(time - PEAK, 0)
    fixed = {
        "best-of-n law": bon,
        "rl law": part * (1 - np.log(np.maximum(part, 1e-300))),
        "flat": 0 * part,
        "linear rise": part,
        "saturating": 1 - np.exp(-4 * part),
        "plateau": np.minimum(2 * part, 1),
        "two-stage rise": np.minimum(time, 5) / 10 + np.clip(time - 11, 0, 5) / 10,
        "late rise": 1 / (1 + np.exp(-10 * (part - 0.6))),
        "kink": rise - 3 * after / PEAK,
        "cliff": rise - 0.75 * (after > 0),
        "slow drift": np.minimum(4 * part, 1) - 0.15 * np.maximum(part - 0.25, 0) / 0.75,
        "dip and recovery": bon - 0.4 * np.exp(-(((time - 10) / 2) ** 2)),
    }
    for name, truth in fixed.items():
        yield Family(name=name, truth=lambda _, __, truth=truth: truth)
    yield Family(name="jitter 1 SE", truth=lambda rng, se: bon + se * rng.standard_normal(POINTS))
    walk = np.sqrt(1 / PEAK)
    yield Family(name="random walk", truth=lambda rng, _: np.cumsum(walk * rng.standard_normal(POINTS)))


def measure(family: Family, se: float, share: float, runs: int, seed: tuple[int, ...], draws: int = 600) -> Cell:
    """Forecast `runs` runs of a family, seen up to `share` of d*, errors of standard deviation `se`."""
    last = round(share * PEAK)
    versions, d = np.arange(POINTS), STEP * np.arange(POINTS)
    scores, answers, held, smooth = np.full((runs, len(AHEAD), 5), np.nan), [], [], []
    for run in range(runs):
        rng = np.random.default_rng([SEED, *seed, run])
        truth = family.truth(rng, se)
        measured = truth + se * rng.standard_normal(POINTS)
        seen = slice(0, last + 1)
        series = Series(
            reward=from_means("reward", versions[seen].tolist(), d[seen].tolist(), None),
            kl=from_means("kl", versions[seen].tolist(), (d[seen] ** 2).tolist(), None),
            evaluations=(from_means("gold", versions[seen].tolist(), measured[seen].tolist(), [se] * (last + 1)),),
        )
        for place, one in enumerate(forecast(series, AHEAD, draws=draws)):
            scores[run, place] = _score(one, float(truth[one.version]))
        found = headroom_within(series, kl=float((BUDGET * PEAK * STEP) ** 2), draws=draws)
        gain = max(float(truth[last + 1 : round(BUDGET * PEAK) + 1].max() - truth[seen].max()), 0.0)
        answers.append(found.answer)
        if found.smooth_low is not None and found.smooth_high is not None:
            smooth.append(found.smooth_low - 1e-9 <= gain <= found.smooth_high + 1e-9)
        if found.answer != "not identified":
            held.append((found.low or 0.0) - 1e-9 <= gain <= (np.inf if found.high is None else found.high) + 1e-9)
    return _summary(scores, answers, held, smooth)


def _score(one: Forecast, truth: float) -> tuple[float, ...]:
    """Return (CRPS, that of persistence, covered, covered without surprises, width); NaN: not identified."""
    numbers = (one.low, one.high, one.smooth_low, one.smooth_high, one.persistence)
    low, high, smooth_low, smooth_high, persistence = numbers
    if low is None or high is None or smooth_low is None or smooth_high is None or persistence is None:
        return (np.nan,) * 5
    covered, smoothly = low <= truth <= high, smooth_low <= truth <= smooth_high
    return crps(one.draws, truth), crps_normal(*persistence, truth), covered, smoothly, high - low


def _summary(scores: Array, answers: list[Answer], held: list[bool], smooth: list[bool]) -> Cell:
    rng = np.random.default_rng(SEED)
    out: dict[str, list[float]] = {name: [] for name in ("ratio", "spread", "coverage", "smooth_coverage", "width")}
    for place in range(len(AHEAD)):
        said = scores[~np.isnan(scores[:, place, 0]), place]
        if not len(said):
            for numbers in out.values():
                numbers.append(np.nan)
            continue
        again = said[rng.integers(0, len(said), (500, len(said)))].mean(1)
        out["ratio"].append(float(said[:, 0].mean() / said[:, 1].mean()))
        out["spread"].append(float(np.std(again[:, 0] / again[:, 1])))
        out["coverage"].append(float(said[:, 2].mean()))
        out["smooth_coverage"].append(float(said[:, 3].mean()))
        out["width"].append(float(np.median(said[:, 4])))
    kinds: tuple[Answer, ...] = ("interval", "at least", "at most", "not identified")
    return Cell(
        **{name: np.array(numbers) for name, numbers in out.items()},
        silent=np.isnan(scores[:, :, 0]).mean(0),
        headroom_coverage=float(np.mean(held)) if held else np.nan,
        headroom_smooth=float(np.mean(smooth)) if smooth else np.nan,
        headroom_answers={kind: answers.count(kind) / len(answers) for kind in kinds},
    )


def main() -> None:
    """Print one line a cell; the three numbers of a column are 1, 3 and 5 evaluations ahead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--se", type=float, nargs="+", default=SES, help="standard errors, in units of the gain")
    parser.add_argument("--share", type=float, nargs="+", default=SHARES, help="shares of d* that are seen")
    parser.add_argument("--family", nargs="+", help="names of families; default: all")
    options = parser.parse_args()
    print(
        "| family | SE | d* seen | runs | CRPS / persistence | its SE | coverage | without surprises | width | silent",
        end="",
    )
    print(" | headroom: coverage | without surprises | interval, at least, at most, silent |\n" + "|---" * 13 + "|")
    for number, family in enumerate(families()):
        if options.family and family.name not in options.family:
            continue
        for se in options.se:
            for share in options.share:
                cell = measure(family, se, share, options.runs, (number, round(1000 * se), round(100 * share)))
                groups = (cell.ratio, cell.spread, cell.coverage, cell.smooth_coverage, cell.width, cell.silent)
                columns = " | ".join(" ".join(f"{one:.2f}" for one in group) for group in groups)
                kinds = " ".join(f"{one:.2f}" for one in cell.headroom_answers.values())
                first = f"| {family.name} | {se:g} | {share:g} | {options.runs}"
                print(
                    f"{first} | {columns} | {cell.headroom_coverage:.2f} | {cell.headroom_smooth:.2f} | {kinds} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
