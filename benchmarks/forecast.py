"""Do headroom and forecasts tell the truth: coverage and CRPS on simulated runs inside and outside the laws.

    python -m benchmarks.forecast --runs 1000 --out /tmp/forecast

Units: the gain from the base to evaluation 20, where the laws and the falls have their peak. A run is seen up to a
share of that; then the true values 1, 3 and 5 evaluations later are forecast, and the headroom within half as many
evaluations again. Shapes are drawn anew for every run. CRPS stands against three kinds of persistence, see
`persistence`. Seeds are fixed.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.mismatch import crps, crps_normal, paths
from trainers.mismatch.headroom import ANSWERS, answers, gains, onward, outlook

Array = NDArray[np.float64]
Truth = Callable[[np.random.Generator, int], Array]
Errors = Callable[[np.random.Generator, tuple[int, int]], Array]

SEED = 20_240_603
PEAK, POINTS, STEP = 20, 39, 0.2  # evaluation of the peak, evaluations in all, sqrt(KL) an evaluation
AHEAD = (1, 3, 5)
SES = (0.05, 0.1, 0.2)
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25)
BUDGET = 1.5  # of what is seen: the default of `headroom watch`
LEVEL, DRAWS, CHUNK = 0.95, 400, 250
BASELINES = ("latest", "smoothed", "error only")
WALKS = np.concatenate([[0.0], np.geomspace(0.01, 10, 31)])  # of a local level, standard errors an evaluation
HORIZON = ("crps", "crps, surprises", *BASELINES, "covered", "width", "smooth covered", "smooth width")
ROOM = ("headroom covered", "headroom width", "headroom smooth covered", "headroom smooth width")


def families() -> dict[str, Truth]:
    """Return what draws truths (R, POINTS): the two laws, and shapes outside of them."""
    time = np.arange(POINTS, dtype=np.float64)
    part = time / PEAK
    rise, after = np.minimum(part, 1), np.maximum(part - 1, 0)
    best_of_n = part * (2 - part)

    def between(rng: np.random.Generator, runs: int, low: float, high: float) -> Array:
        return rng.uniform(low, high, (runs, 1))

    def two_stages(rng: np.random.Generator, runs: int) -> Array:
        first, pause, middle = (between(rng, runs, *at) for at in ((0.2, 0.4), (0.55, 0.8), (0.3, 0.7)))
        return np.asarray(
            middle * np.minimum(part / first, 1) + (1 - middle) * np.clip((part - pause) / (1 - pause), 0, 1)
        )

    def drifts(rng: np.random.Generator, runs: int) -> Array:
        top = between(rng, runs, 0.25, 0.5)
        return np.asarray(np.minimum(part / top, 1) - between(rng, runs, 0.1, 0.4) * np.maximum(part - top, 0))

    def saturating(rng: np.random.Generator, runs: int) -> Array:
        rate = between(rng, runs, 2, 6)
        return np.asarray(np.expm1(-rate * part) / np.expm1(-rate))

    def quadratic(rng: np.random.Generator, runs: int) -> Array:
        return np.asarray(1 - (1 - rise) ** between(rng, runs, 1.5, 3) - between(rng, runs, 4, 16) * after**2)

    def dips(rng: np.random.Generator, runs: int) -> Array:
        width, centre, depth = (between(rng, runs, *at) for at in ((1.5, 3), (8, 16), (0.2, 0.5)))
        return np.asarray(best_of_n - depth * np.exp(-(((time - centre) / width) ** 2)))

    return {
        "best-of-n law": lambda rng, runs: np.tile(best_of_n, (runs, 1)),
        "rl law": lambda rng, runs: np.tile(part * (1 - np.log(np.maximum(part, 1e-300))), (runs, 1)),
        "saturating": saturating,
        "plateau": lambda rng, runs: np.minimum(part / between(rng, runs, 0.2, 0.8), 1),
        "slow drift": drifts,
        "two-stage rise": two_stages,
        "kink": lambda rng, runs: rise - between(rng, runs, 1, 4) * after,
        "quadratic": quadratic,
        "cliff": lambda rng, runs: rise - between(rng, runs, 0.3, 0.9) * (after > 0),
        "dip and recovery": dips,
        "random walk": lambda rng, runs: np.cumsum(rng.standard_normal((runs, POINTS)) / np.sqrt(PEAK), 1),
        "linear rise": lambda rng, runs: np.tile(part, (runs, 1)),
        "flat": lambda rng, runs: np.zeros((runs, POINTS)),
    }


def autoregressive(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Errors of standard deviation 1 whose neighbours correlate by 0.6."""
    errors = rng.standard_normal(shape)
    for point in range(1, shape[1]):
        errors[:, point] = 0.6 * errors[:, point - 1] + 0.8 * errors[:, point]
    return errors


ERRORS: dict[str, Errors] = {
    "right": lambda rng, shape: rng.standard_normal(shape),
    "understated 1.25": lambda rng, shape: 1.25 * rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(4, shape) / np.sqrt(2),
    "AR(1) 0.6": autoregressive,
}
JITTER = "jitter 1 SE"  # of the truth itself
OTHERS, OTHER_SE, OTHER_SHARES = (*list(ERRORS)[1:], JITTER), 0.1, (0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What R runs gave, in units of the gain."""

    horizons: dict[str, Array]  # by name of HORIZON (R, 3): 1, 3 and 5 evaluations ahead
    identified: NDArray[np.bool_]  # (R, 3)
    headroom: dict[str, Array]  # by name of ROOM (R,)
    answers: list[str]  # (R,)


def measure(truth: Truth, se: float, share: float, runs: int, seed: list[int], noise: str = "right") -> Cell:
    """Forecast `runs` runs of a family, seen up to `share` of d*, with errors stated to have deviation `se`."""
    parts = []
    for first in range(0, runs, CHUNK):
        rng = np.random.default_rng([SEED, *seed, first])
        true = truth(rng, min(CHUNK, runs - first))
        if noise == JITTER:
            true = true + se * rng.standard_normal(true.shape)
        errors = ERRORS["right" if noise == JITTER else noise](rng, true.shape)
        parts.append(_forecast(true, true + se * errors, se, round(share * PEAK)))
    return Cell(
        horizons={name: np.concatenate([one.horizons[name] for one in parts]) for name in HORIZON},
        identified=np.concatenate([one.identified for one in parts]),
        headroom={name: np.concatenate([one.headroom[name] for one in parts]) for name in ROOM},
        answers=[answer for one in parts for answer in one.answers],
    )


def _forecast(true: Array, measured: Array, se: float, last: int) -> Cell:
    n = last + 1
    time = np.arange(n)
    covariance = se**2 * np.eye(n)
    seen = paths.standardise(measured[:, :n], covariance, time, STEP * time)
    steps = np.arange(1.0, max(AHEAD) + 1)
    found = outlook(seen, onward(seen, steps), steps, level=LEVEL, draws=DRAWS, seed=0)
    at = np.array(AHEAD) - 1
    aim = true[:, last + np.array(AHEAD)]
    horizons = {"crps": crps(found.draws[:, at], aim), "crps, surprises": crps(found.surprised[:, at], aim)}
    for name, (mean, sd) in persistence(measured[:, :n], se, np.array(AHEAD)).items():
        horizons[name] = crps_normal(mean, sd, aim)
    for name, (low, high) in {"": (found.low, found.high), "smooth ": found.smooth}.items():
        horizons[f"{name}covered"] = (low[:, at] <= aim) & (aim <= high[:, at])
        horizons[f"{name}width"] = (high - low)[:, at]
    end = int(np.ceil(BUDGET * last))
    steps = np.arange(1.0, end - last + 1)
    room = gains(seen, onward(seen, steps), steps, level=LEVEL, draws=DRAWS, seed=0)
    gain = np.maximum(true[:, n : end + 1].max(1) - true[:, :n].max(1), 0)
    said = answers(room.low, room.high, room.moved)
    headroom = {}
    for name, (low, high) in {"": (room.low, room.high), "smooth ": room.smooth}.items():
        headroom[f"headroom {name}covered"] = (low - 1e-9 <= gain) & (gain <= high + 1e-9)
        headroom[f"headroom {name}width"] = high - low
    return Cell(horizons=horizons, identified=found.identified[:, at], headroom=headroom, answers=said)


def persistence(measured: Array, se: float, ahead: Array) -> dict[str, tuple[Array, Array]]:
    """Return mean and standard deviation (R, h) of what "it stays as it is" forecasts from R curves (R, n).

    `latest`: the last value, with its error and the spread of the increments so far (their mean square less what the
    errors add, per evaluation). `smoothed`: the level of a random walk in noise, its step by maximum likelihood (Harvey
    1989, section 2.3.6). `error only`: the last value and its error, as if the truth stood still.
    """
    runs, n = measured.shape
    ones = np.ones(len(ahead))
    moves = np.maximum(np.mean(np.diff(measured, axis=1) ** 2, 1) - 2 * se**2, 0)
    mean, sd = local_level(measured / se)
    last = measured[:, -1:] * ones
    return {
        "latest": (last, np.sqrt(se**2 + moves[:, None] * ahead)),
        "smoothed": (se * mean[:, None] * ones, se * np.sqrt(sd[:, :1] ** 2 + sd[:, 1:] ** 2 * ahead)),
        "error only": (last, se * np.ones((runs, len(ahead)))),
    }


def local_level(values: Array) -> tuple[Array, Array]:
    """Fit a random walk in noise of deviation 1 to R curves (R, n): level (R,); its error and its step's (R, 2)."""
    runs, n = values.shape
    time, best = np.arange(n), np.full(runs, -np.inf)
    level, spread = np.empty(runs), np.empty((runs, 2))
    for walk in WALKS:
        covariance = walk**2 * np.minimum(time[:, None], time) + np.eye(n)
        inverse = np.linalg.inv(covariance)
        across = inverse.sum(1)
        left = inverse - np.outer(across, across) / across.sum()  # the base is free
        fit = -(np.einsum("ri,ij,rj->r", values, left, values) + np.linalg.slogdet(covariance)[1]) / 2
        fit -= np.log(across.sum()) / 2
        to_last = walk**2 * time
        weights = left @ to_last + across / across.sum()
        rest = 1 - across @ to_last
        variance = walk**2 * (n - 1) - to_last @ inverse @ to_last + rest**2 / across.sum()
        better = fit > best
        best[better], level[better] = fit[better], values[better] @ weights
        spread[better] = np.sqrt(max(variance, 0.0)), walk
    return level, spread


def horizon_rows(family: str, se: float, share: float, noise: str, cell: Cell) -> list[dict[str, object]]:
    """Return one row a horizon. Means are over the runs in which something was said; a row that says nothing is NaN."""
    out = []
    runs = len(cell.answers)
    for place, ahead in enumerate(AHEAD):
        said = cell.identified[:, place]
        values = {name: cell.horizons[name][said, place].astype(np.float64) for name in HORIZON}
        means = {name: float(one.mean()) if len(one) else np.nan for name, one in values.items()}
        row: dict[str, object] = {
            "family": family,
            "errors": noise,
            "se": se,
            "seen": share,
            "ahead": ahead,
            "runs": runs,
        }
        row |= {"silent": float(1 - said.mean())} | {name: means[name] for name in HORIZON[:5]}
        for name in BASELINES:
            row |= dict(zip((f"/ {name}", f"/ {name} SE"), ratio(values["crps"], values[name]), strict=True))
        for name in ("", "smooth "):
            width = values[f"{name}width"]
            row |= {
                f"{name}coverage": means[f"{name}covered"],
                f"{name}width": np.median(width) if len(width) else np.nan,
            }
        out.append(row)
    return out


def room_row(family: str, se: float, share: float, noise: str, cell: Cell) -> dict[str, object]:
    """Return the headroom's row: coverage and median width of the interval, and how often what was said."""
    row: dict[str, object] = {"family": family, "errors": noise, "se": se, "seen": share, "runs": len(cell.answers)}
    for name in ("", "smooth "):
        row[f"{name}coverage"] = float(cell.headroom[f"headroom {name}covered"].mean())
        row[f"{name}width"] = float(np.median(cell.headroom[f"headroom {name}width"]))
    said = np.array([one != "not identified" for one in cell.answers])
    row["said coverage"] = float(cell.headroom["headroom covered"][said].mean()) if said.any() else np.nan
    row["said width"] = float(np.median(cell.headroom["headroom width"][said])) if said.any() else np.nan
    return row | {kind: cell.answers.count(kind) / len(cell.answers) for kind in ANSWERS.values()}


def ratio(score: Array, against: Array) -> tuple[float, float]:
    """Return the ratio of two mean scores (R,) and its standard error, by the delta method over runs."""
    if len(score) < 2:
        return np.nan, np.nan
    share = float(score.mean() / against.mean())
    return share, float(np.std(score - share * against, ddof=1) / against.mean() / np.sqrt(len(score)))


def cells(runs: int, only: list[str] | None = None) -> Iterator[tuple[str, float, float, str, Cell]]:
    """Yield every family at every error and share seen; other kinds of errors at one size, half way and at the peak."""
    for number, (family, truth) in enumerate(families().items()):
        if only and family not in only:
            continue
        plans = [*((se, share, "right") for se in SES for share in SHARES)]
        plans += [(OTHER_SE, share, noise) for noise in OTHERS for share in OTHER_SHARES]
        for se, share, noise in plans:
            seed = [number, round(1000 * se), round(100 * share), ("right", *OTHERS).index(noise)]
            yield family, se, share, noise, measure(truth, se, share, runs, seed, noise)


def by_family(horizons: list[dict[str, Any]], rooms: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Sum up the cells of each family with right errors: scores by the mean over cells, coverage by mean and least.

    Three numbers are 1, 3 and 5 evaluations ahead; `behind` counts cells whose ratio to the better one of latest and
    smoothed is above 1 by more than two of its standard errors.
    """
    out = []
    for family in dict.fromkeys(row["family"] for row in horizons):
        row: dict[str, object] = {"family": family}
        parts = [
            [one for one in horizons if (one["family"], one["errors"], one["ahead"]) == (family, "right", ahead)]
            for ahead in AHEAD
        ]
        for name in BASELINES:
            row[f"CRPS / {name}"] = _three(
                np.nansum([one["crps"] for one in part]) / np.nansum([one[name] for one in part]) for part in parts
            )
        row["with surprises / smoothed"] = _three(
            np.nansum([one["crps, surprises"] for one in part]) / np.nansum([one["smoothed"] for one in part])
            for part in parts
        )
        row["behind"] = (
            " ".join(
                str(sum(any(one[f"/ {k}"] - 2 * one[f"/ {k} SE"] > 1 for k in BASELINES[:2]) for one in part))
                for part in parts
            )
            + f" of {len(parts[0])}"
        )
        for name in ("coverage", "smooth coverage"):
            row[name] = _three(np.nanmean([one[name] for one in part]) for part in parts)
            row[f"least {name}"] = _three(np.nanmin([one[name] for one in part]) for part in parts)
        for name in ("width", "smooth width"):
            row[name] = _three(np.nanmedian([one[name] for one in part]) for part in parts)
        mine = [one for one in rooms if (one["family"], one["errors"]) == (family, "right")]
        row["headroom coverage"] = f"{np.mean([one['coverage'] for one in mine]):.2f}"
        row["its least"] = f"{np.min([one['coverage'] for one in mine]):.2f}"
        row["said"] = f"{1 - np.mean([one['not identified'] for one in mine]):.2f}"
        row["width where said"] = f"{np.nanmedian([one['said width'] for one in mine]):.2f}"
        out.append(row)
    return out


def by_cell(horizons: list[dict[str, Any]], rooms: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Put the horizons of a cell and its headroom on one row; three numbers are 1, 3 and 5 evaluations ahead."""
    out = []
    for place, room in enumerate(rooms):
        three = horizons[len(AHEAD) * place : len(AHEAD) * (place + 1)]
        row: dict[str, object] = {name: room[name] for name in ("family", "errors", "se", "seen")}
        for name in ("/ latest", "/ smoothed", "coverage", "width", "smooth coverage", "smooth width", "silent"):
            row[name] = _three(one[name] for one in three)
        row["headroom coverage"], row["width "] = f"{room['coverage']:.3f}", f"{room['width']:.2f}"
        row["smooth coverage "], row["smooth width "] = f"{room['smooth coverage']:.3f}", f"{room['smooth width']:.2f}"
        out.append(row | {"not identified": f"{room['not identified']:.2f}"})
    return out


def _three(values: Iterable[float]) -> str:
    return " ".join(f"{one:.2f}" for one in values)


def written(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Write rows as CSV and as a table in markdown."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".md").write_text("\n".join([*header(rows[0]), *map(line, rows)]) + "\n")


def header(row: Mapping[str, object]) -> tuple[str, str]:
    return f"| {' | '.join(row)} |", "|---" * len(row) + "|"


def line(row: Mapping[str, object]) -> str:
    return f"| {' | '.join(f'{one:.3g}' if isinstance(one, float) else str(one) for one in row.values())} |"


def main() -> None:
    """Print a line a cell and horizon; write forecasts and headroom as CSV and markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="simulated runs a cell")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--family", nargs="+", choices=list(families()), help="default: all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    forecasts: list[dict[str, Any]] = []
    rooms: list[dict[str, Any]] = []
    for *cell, found in cells(options.runs, options.family):
        forecasts += horizon_rows(*cell, found)
        rooms.append(room_row(*cell, found))
        print("\n".join(map(line, forecasts[-len(AHEAD) :])), flush=True)
        written(forecasts, options.out / "forecasts")
        written(rooms, options.out / "headroom")
    written(by_cell(forecasts, rooms), options.out / "cells")
    written(by_family(forecasts, rooms), options.out / "families")


if __name__ == "__main__":
    main()
