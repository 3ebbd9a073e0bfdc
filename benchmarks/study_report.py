"""The pages of the studies of benchmarks.demo_seeds: every algorithm at equal samples, and stale rollouts.

python -m benchmarks.study_report algorithms runs/demo-seeds/results.jsonl > docs/results/algorithms.md
python -m benchmarks.study_report staleness runs/demo-seeds/results.jsonl > docs/results/staleness.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo_plan import ANSWERS, CONTROL_SEEDS, STALENESS, SURE, WEIGHTS, Cell, studies
from benchmarks.demo_queue import Results
from benchmarks.demo_report import failures, sources, table

Row = Mapping[str, Any]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean over seeds and the range."""
    if not values:
        return "-"
    form = f".{digits}f"
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def gold_at(row: Row, version: int | None) -> tuple[float, float]:
    """Return gold's mean and standard error at an evaluated version, on prompts on which nothing was chosen."""
    truth = row["truth"]
    place = truth["versions"].index(version)
    return truth["mean"][place], truth["se"][place]


def of_algorithm(cell: Cell, rows: Sequence[Row]) -> list[object]:
    """Return a line of the table: gold of the base, of the chosen and of the last version, over the seeds."""
    done = [row for row in rows if row["status"] == "done"]
    base, best, last, gains = [], [], [], []
    for row in done:
        (start, start_se), (chosen, chosen_se) = gold_at(row, 0), gold_at(row, row["findings"]["chosen_version"])
        base.append(start)
        best.append(chosen)
        last.append(row["truth"]["mean"][-1])
        gains.append((chosen - start) > SURE * float(np.hypot(start_se, chosen_se)))
    return [
        f"`{cell.name.partition('-')[2]}`",
        f"{len(done)} of {cell.seeds}",
        spread(base),
        spread(best),
        f"{sum(gains)} of {len(done)}",
        ", ".join(str(row["findings"]["chosen_version"]) for row in done),
        spread(last),
        spread([row["reward"]["mean"][-1] for row in done]),
        spread([row["kl"]["mean"][-1] for row in done if row["kl"]["mean"]], 3),
    ]


def algorithms(rows: Sequence[Row]) -> list[str]:
    """Return the page of the algorithms."""
    titles = [
        "algorithm", "seeds run of those planned", "gold of the base", "gold of the chosen version",
        f"rise above {SURE:g} SE", "chosen versions", "gold at the end", "reward at the end",
        "KL at the end, nats/token",
    ]  # fmt: skip
    planned = [cell for cell in studies() if cell.name.startswith("algorithm-")]
    of_cell = {cell.name: [row for row in rows if row["cell"] == cell.name] for cell in planned}
    lines = [of_algorithm(cell, of_cell[cell.name]) for cell in planned if of_cell[cell.name]]
    return [
        "# Every algorithm on the demo's world",
        "",
        "    python -m benchmarks.demo_seeds runs/demo-seeds --cells algorithm-NAME …",
        "    python -m benchmarks.study_report algorithms runs/demo-seeds/results.jsonl",
        "",
        "`configs/quickstart.yaml algorithm=NAME`, 48 steps of 64 rollouts each: equal samples, each algorithm "
        "with its own defaults and the recipe's learning rate, which was chosen for `grpo`; nothing was tuned for the "
        f"others. Gold is measured after the run on prompts on which nothing was chosen, {ANSWERS} answers of each "
        "version. Mean over seeds (least to most). The reward is the reward model's. Source: "
        f"{sources(of_study(rows, 'algorithm-'))}.",
        "",
        *table(titles, lines),
        "",
        *ended(rows, "algorithm-"),
    ]


def staleness(rows: Sequence[Row]) -> list[str]:
    """Return the page of the stale rollouts."""
    titles = [
        "bound", "weights", "seeds run of those planned", "staleness reached", "reward at step 24", "reward at the end",
        "gold, highest", "at version", "gold at the end", "effective share of tokens",
    ]  # fmt: skip
    lines = []
    for bound in STALENESS:
        for weight in WEIGHTS:
            done = [row for row in rows if row["cell"] == f"stale-{bound}-{weight}" and row["status"] == "done"]
            if done:
                lines.append(of_bound(bound, weight, done))
    return [
        "# Stale rollouts on the demo's world",
        "",
        "    python -m benchmarks.demo_seeds runs/demo-seeds --cells stale-0-none stale-0-truncate …",
        "    python -m benchmarks.study_report staleness runs/demo-seeds/results.jsonl",
        "",
        "`configs/quickstart.yaml` with another `loop.staleness`, 48 steps of 64 rollouts: equal samples. Weights "
        "`none`: the naive gradient; `truncate`: proximal / behaviour of each token, at most 2. Gold after the run "
        f"on prompts on which nothing was chosen, {ANSWERS} answers of each version, its highest smoothed value. "
        f"Mean over seeds (least to most). Source: {sources(of_study(rows, 'stale-'))}.",
        "",
        *table(titles, lines),
        "",
        *ended(rows, "stale-"),
    ]


def of_bound(bound: int, weight: str, done: Sequence[Row]) -> list[object]:
    """Return a line of the table of stale rollouts."""
    return [
        bound,
        weight,
        f"{len(done)} of {CONTROL_SEEDS}",
        spread([float(np.mean(row["staleness"]["mean"][12:])) for row in done], 1),
        spread([row["reward"]["mean"][23] for row in done]),
        spread([row["reward"]["mean"][-1] for row in done]),
        spread([max(row["truth"]["smoothed"]) for row in done]),
        ", ".join(str(row["truth"]["peak_version"]) for row in done),
        spread([row["truth"]["mean"][-1] for row in done]),
        spread([float(np.mean(row["effective_share"]["mean"])) for row in done], 3),
    ]


def ended(rows: Sequence[Row], prefix: str) -> list[str]:
    """Return every run of a study that failed or was made more than once."""
    return ["## Failed or repeated", "", *failures(of_study(rows, prefix))]


def of_study(rows: Sequence[Row], prefix: str) -> list[Row]:
    """Return the rows of the cells whose names begin so."""
    return [row for row in rows if row["cell"].startswith(prefix)]


def main() -> None:
    """Print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("algorithms", "staleness"))
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    rows = Results(options.results).rows
    latest = list({row["job"]: row for row in rows}.values())
    print("\n".join((algorithms if options.page == "algorithms" else staleness)(latest)).rstrip())


if __name__ == "__main__":
    main()
