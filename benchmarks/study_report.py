"""The pages of benchmarks.studies: every algorithm at equal samples, and stale rollouts.

python -m benchmarks.study_report algorithms docs/results/studies.jsonl
python -m benchmarks.study_report staleness docs/results/studies.jsonl --figure docs/results/staleness.png
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.demo_plan import SURE
from benchmarks.demo_queue import Results
from benchmarks.demo_report import paired, sources, table
from benchmarks.recipes import command
from benchmarks.studies import (
    ALGORITHM_SEEDS,
    ANSWERS,
    RATES,
    STALE_SEEDS,
    STALENESS,
    WEIGHTS,
    cells,
    stale_name,
)
from configs.algorithms import FACTS
from configs.errors import UserError
from trainers.world_build import HELDOUT

Row = Mapping[str, Any]
Measure = Callable[[Row], float]
LINES = "docs/results/studies.jsonl"
COLOURS = "viridis"
NAIVE, *_ = WEIGHTS
SHARES = ("effective_share", "truncated_share")  # without weights they say nothing
SAMPLES = (
    f"Gold and reward (the reward model's) are measured on {HELDOUT // 2} held-out prompts on which nothing was "
    f"chosen, {ANSWERS} answers to each; the version is chosen on {HELDOUT // 2} others, one answer to each. "
)


def at_chosen(row: Row) -> float:
    """Return gold of the chosen version."""
    return float(row["gold"]["mean"][row["versions"].index(row["chosen"])])


def gold_at_end(row: Row) -> float:
    """Return gold of the last version."""
    return float(row["gold"]["mean"][-1])


def reward_at_end(row: Row) -> float:
    """Return the reward of the last version."""
    return float(row["reward"]["mean"][-1])


MEASURES: Mapping[str, Measure] = {
    "gold of the chosen version": at_chosen,
    "gold at the end": gold_at_end,
    "reward at the end": reward_at_end,
}


def late(row: Row, name: str) -> float:
    """Return the mean of what steps say, over the second half of a run."""
    values = row["steps"][name]
    return float(np.mean(values[len(values) // 2 :]))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean over seeds and the range."""
    if not values:
        return "-"
    form = f".{digits}f"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def of(rows: Sequence[Row], cell: str) -> list[Row]:
    """Return the finished runs of a cell by seed; the last line of a run counts."""
    latest = {row["job"]: row for row in rows if row["cell"] == cell}
    return sorted((row for row in latest.values() if row["status"] == "done"), key=lambda row: row["seed"])


def of_algorithm(name: str, done: Sequence[Row]) -> list[object]:
    """Return a line of the table: gold of the base, of the chosen and of the last version, over the seeds."""
    sure = [row["rise"] is not None and row["rise"]["value"] > SURE * row["rise"]["se"] for row in done]
    return [
        f"`{name}`",
        spread([row["gold"]["mean"][0] for row in done]),
        spread([at_chosen(row) for row in done]),
        f"{sum(sure)} of {len(done)}",
        ", ".join(str(row["chosen"]) for row in done),
        spread([gold_at_end(row) for row in done]),
        spread([reward_at_end(row) for row in done]),
        spread([row["steps"]["kl"][-1] for row in done if "kl" in row["steps"]], 3),
    ]


def algorithms(rows: Sequence[Row]) -> list[str]:
    """Return the page of the algorithms."""
    titles = [
        "algorithm", "gold of the base", "gold of the chosen version", f"rise above {SURE:g} SE", "chosen versions",
        "gold at the end", "reward at the end", "KL at the end, nats/token",
    ]  # fmt: skip
    found = {name: of(rows, f"algorithm-{name}") for name in FACTS}
    return [
        "# Every algorithm on the demo's world",
        "",
        "    python -m benchmarks.studies runs/studies --cells algorithm",
        f"    python -m benchmarks.study_report algorithms {LINES}",
        "",
        "`configs/quickstart.yaml algorithm=NAME`, 48 steps of 64 rollouts each: equal samples, each algorithm with "
        "its own defaults and the recipe's learning rate, which was chosen for `grpo`; nothing was tuned for others. "
        f"{SAMPLES}KL is that of the last step's rollouts. Mean over seeds fixed beforehand (least to most), "
        f"{ALGORITHM_SEEDS} are planned. The lines of the runs: [studies.jsonl](studies.jsonl).",
        *unfinished(found, ALGORITHM_SEEDS, of_study(rows, "algorithm-")),
        "",
        f"Source: {sources([row for done in found.values() for row in done])}.",
        "",
        *table(titles, [of_algorithm(name, done) for name, done in found.items() if done]),
    ]


def staleness(rows: Sequence[Row]) -> list[str]:
    """Return the page of the stale rollouts."""
    found = {cell.name: of(rows, cell.name) for cell in cells() if cell.name.startswith("stale-")}
    lines = [
        "# Stale rollouts on the demo's world",
        "",
        "    python -m benchmarks.studies runs/studies --cells stale",
        f"    python -m benchmarks.study_report staleness {LINES} --figure docs/results/staleness.png",
        "",
        "`configs/quickstart.yaml` (`grpo`) with another `loop.staleness` S, 48 steps of 64 rollouts: equal samples. "
        "From step S + 1 on every rollout is S versions old, and none spans versions (`benchmarks/solo.py`): the most "
        "that the bound lets through. In a run of `headroom train` staleness is below it where generators are not "
        "ahead. *Naive*: no importance weights; *truncated*: π_prox/μ of each token, at most 2, the default. "
        f"{SAMPLES}Mean over {STALE_SEEDS} seeds fixed beforehand (least to most). Runs of a seed have their prompts "
        "in common, and with the same weights the seeds of their samples too: differences are paired by seed, and rows "
        "are not independent. At S = 0 the two arms are the same algorithm: their difference shows what chance does "
        "alone. One in twenty intervals misses zero by chance. The lines of the runs: [studies.jsonl](studies.jsonl).",
        *unfinished(found, STALE_SEEDS, of_study(rows, "stale-")),
        "",
        f"Source: {sources([row for done in found.values() for row in done])}.",
        "",
        "![Gold and reward by policy version](staleness.png)",
    ]
    made = {name: rate for name, rate in RATES.items() if any(found[cell] for cell in found if f"-{name}-" in cell)}
    for name, rate in made.items():
        lines += ["", f"## Learning rate {rate:g} ({name})", ""]
        lines += of_rate(found, name)
    return lines


def of_rate(found: Mapping[str, Sequence[Row]], rate: str) -> list[str]:
    """Return the tables of one learning rate: every cell, and the differences of a seed's arms."""
    titles = [
        "S", "weights", "staleness, second half", "gold of the chosen version", "chosen versions", "gold at the end",
        "reward at the end", "effective share of tokens, second half", "truncated share, second half",
    ]  # fmt: skip
    bounds = STALENESS[rate]
    each = {(S, weights): found[stale_name(S, weights, rate)] for S in bounds for weights in WEIGHTS}
    each_cell = [of_bound(S, weights, done) for (S, weights), done in each.items() if done]
    against = [
        [f"{weights} less {NAIVE}", f"S = {S}", *differences(each[S, weights], each[S, NAIVE])]
        for S in bounds
        for weights in WEIGHTS
        if weights != NAIVE
    ]
    against += [
        [f"S = {S} less S = {bounds[0]}", weights, *differences(each[S, weights], each[bounds[0], weights])]
        for weights in WEIGHTS
        for S in bounds[1:]
    ]
    return [
        *table(titles, each_cell),
        "",
        "Differences between arms of a seed, mean [95 % over seeds]:",
        "",
        *table(["difference", "of", *MEASURES], against),
    ]


def of_bound(bound: int, weights: str, done: Sequence[Row]) -> list[object]:
    """Return a line of the table of stale rollouts."""
    return [
        bound,
        weights,
        spread([late(row, "staleness") for row in done], 1),
        spread([at_chosen(row) for row in done]),
        ", ".join(str(row["chosen"]) for row in done),
        spread([gold_at_end(row) for row in done]),
        spread([reward_at_end(row) for row in done]),
        *(spread([late(row, name) for row in done if weights != NAIVE], 4) for name in SHARES),
    ]


def differences(arm: Sequence[Row], other: Sequence[Row]) -> list[str]:
    """Return each measure's difference over the seeds that both arms have."""
    pairs = [(one, two) for one in arm for two in other if one["seed"] == two["seed"]]
    return [paired([measure(one) - measure(two) for one, two in pairs]) for measure in MEASURES.values()]


def of_study(rows: Sequence[Row], prefix: str) -> list[Row]:
    """Return the lines of the cells whose names begin so."""
    return [row for row in rows if row["cell"].startswith(prefix)]


def unfinished(found: Mapping[str, Sequence[Row]], seeds: int, rows: Sequence[Row]) -> list[str]:
    """Return a paragraph that names what has fewer runs than planned, if anything has, and one on what failed."""
    left = [f"{cell}: {len(done)} of {seeds}" for cell, done in found.items() if len(done) < seeds]
    failed = [f"{row['job']} ({row['error']})" for row in rows if row["status"] == "failed"]
    return [
        *(["", f"Not run, or not to the end: {'; '.join(left)}."] if left else []),
        *(["", f"Failed: {'; '.join(failed)}."] if failed else []),
    ]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw gold and reward by version, mean over seeds: a colour for each bound, dashed without weights."""
    made = {rate: value for rate, value in RATES.items() if any(f"stale-{rate}-" in row["cell"] for row in rows)}
    figure = Figure(figsize=(9, 3.4 * len(made)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(made), 2, squeeze=False)
    for row, (rate, value) in zip(axes, made.items(), strict=True):
        for axis, metric in zip(row, ("gold", "reward"), strict=True):
            curves(axis, rows, rate, metric)
            axis.set(title=f"{metric}, learning rate {value:g}", xlabel="policy version", ylabel=f"held-out {metric}")
    axes[0][0].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def curves(axis: Axes, rows: Sequence[Row], rate: str, metric: str) -> None:
    """Draw the mean over seeds of every cell of a learning rate."""
    every = STALENESS["slow"]
    for bound in STALENESS[rate]:
        colour = colormaps[COLOURS](0.9 * every.index(bound) / (len(every) - 1))
        for number, weights in enumerate(WEIGHTS):
            done = of(rows, stale_name(bound, weights, rate))
            if done:
                mean = np.mean([row[metric]["mean"] for row in done], axis=0)
                style = ("--", "-")[number]
                axis.plot(done[0]["versions"], mean, style, color=colour, lw=1.3, label=f"S = {bound}, {weights}")


def main() -> None:
    """Print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("algorithms", "staleness"))
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path, help="of the page on staleness: where its picture goes")
    options = parser.parse_args()
    if missing := [str(path) for path in options.results if not path.exists()]:
        raise UserError(f"{missing[0]}: no such file; give the lines that benchmarks.studies has written")
    rows = [row for path in options.results for row in Results(path).rows]
    if options.figure is not None:
        draw(options.figure, rows)
    print("\n".join((algorithms if options.page == "algorithms" else staleness)(rows)).rstrip())


if __name__ == "__main__":
    command(main)
