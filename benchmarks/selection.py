"""Does selection keep the gain and tell its value: simulated runs whose truth is known, seeds fixed beforehand.

    python -m benchmarks.selection --runs 1000 --points 10 20 --se 0.05 0.1 0.2

Units: the gain of the best version over the base, so a share is a true value. One evaluation has standard error `se`;
the re-evaluation and the untouched sample have the same. Errors are independent and their size known, or those of 100
prompts whose scores correlate by 0.7 between versions, the covariance estimated from them. Bias and width are in
standard errors. The KL budget is half of what the run spends, declared without knowing the run.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import Curve, Series, choose, from_means, from_scores, report, rivals, shortlist
from trainers.mismatch.selection import Estimate

Array = NDArray[np.float64]
Sample = Callable[[np.random.Generator, Array, list[int], float], Curve]

SEED, PROMPTS, CORRELATION = 20_240_602, 100, 0.7
LISTED = 3
KEPT = (
    "selected",
    "smoothed, no re-evaluation",
    "3-point mean",
    "3-point mean, re-evaluated",
    "raw best",
    "last",
    "highest reward",
    "KL budget",
)
SAMPLES = ("untouched", "pooled", "curve")
Told = tuple[float, float, float]  # error, width, 1 if missed


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


ERRORS: dict[str, Sample] = {"independent": independent, "paired": paired}


def averaged(mean: Array) -> Array:
    """Mean over 3 points, over 2 at the ends."""
    ones = np.ones(3)
    return np.convolve(mean, ones, "same") / np.convolve(np.ones(len(mean)), ones, "same")


def measure(truth: Array, se: float, sample: Sample, runs: int, seed: list[int]) -> Measured:
    """Select `runs` times on one truth (K,)."""
    rng = np.random.default_rng(seed)
    every = [_one(rng, truth, se, sample) for _ in range(runs)]
    return Measured(
        kept={rule: np.array([kept[rule] for kept, _, _ in every]) for rule in KEPT},
        value={source: np.array([value[source] for _, value, _ in every]) for source in SAMPLES},
        gain={source: np.array([gain[source] for _, _, gain in every]) for source in SAMPLES},
    )


def _one(
    rng: np.random.Generator, truth: Array, se: float, sample: Sample
) -> tuple[dict[str, float], dict[str, Told], dict[str, Told]]:
    """Return the true value of what each rule chose, and what value and gain say from each sample."""
    versions = np.arange(len(truth))

    def evaluate(at: list[int]) -> Curve:
        return sample(rng, truth[at], at, se)

    curve = evaluate(versions.tolist())
    choice = choose(curve, evaluate(list(shortlist(curve, LISTED).versions)))
    early = choose(curve)
    found = {
        "untouched": report(choice, evaluate(sorted({choice.version or 0, 0}))),
        "pooled": report(choice),
        "curve": report(early),
    }
    kept = {"selected": truth[choice.version], "smoothed, no re-evaluation": truth[early.version]}
    smooth = averaged(curve.mean)
    listed = sorted({0, *(np.argsort(-smooth[1:])[:LISTED] + 1).tolist()})
    both = (curve.mean[listed] + evaluate(listed).mean) / 2
    kept |= {"3-point mean": truth[np.argmax(smooth)], "3-point mean, re-evaluated": truth[listed[np.argmax(both)]]}
    reward = from_means("reward", versions.tolist(), (versions + rng.standard_normal(len(truth))).tolist(), None)
    kl = from_means("kl", versions.tolist(), versions.tolist(), None)
    series = Series(reward=reward, evaluations=(curve,), kl=kl)
    kept |= {rival.rule: truth[rival.version or 0] for rival in rivals(series, kl_budget=len(truth) / 2)}
    value = {k: _told(one.value, truth[one.version or 0], se) for k, one in found.items()}
    gain = {k: _told(one.gain, truth[one.version or 0], se) for k, one in found.items()}
    return {rule: float(one) for rule, one in kept.items()}, value, gain


def _told(said: Estimate | None, true: float, se: float) -> Told:
    if said is None:
        raise ValueError("nothing was said: a simulated run is never too short")
    miss = not said.low - 1e-9 <= true <= said.high + 1e-9
    return (said.value - true) / se, (said.high - said.low) / se, float(miss)


def main() -> None:
    """Print one line a cell: shares of the gain, then bias ± its error, coverage and median width by sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20], help="evaluated versions of a run")
    parser.add_argument("--se", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="standard error over the gain")
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=list(ERRORS))
    options = parser.parse_args()
    told = [f"{what} {source}: bias, coverage, width" for what in ("value", "gain") for source in SAMPLES]
    print("| truth | errors | K | SE | runs |", " | ".join([*KEPT, *told]), "|")
    print("|---" * (5 + len(KEPT) + len(told)) + "|")
    for errors, points, se in itertools.product(options.errors, options.points, options.se):
        for number, (name, truth) in enumerate(truths(points).items()):
            seed = [SEED, list(ERRORS).index(errors), points, round(1000 * se), number]
            cell = measure(truth, se, ERRORS[errors], options.runs, seed)
            columns = [f"{cell.kept[rule].mean():.3f}" for rule in KEPT]
            for rows in (*cell.value.values(), *cell.gain.values()):
                off, widths, miss = rows.T
                spread = off.std() / np.sqrt(len(off))
                columns.append(
                    f"{off.mean():+.2f} ± {1.96 * spread:.2f}, {1 - miss.mean():.3f}, {np.median(widths):.2f}"
                )
            print(f"| {name} | {errors} | {points} | {se:g} | {options.runs} |", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main()
