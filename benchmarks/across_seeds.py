"""What several seeds of one recipe say together: paired changes of every evaluation since version 0.

    python -m benchmarks.across_seeds runs/a runs/b runs/c --length heldout/length \
        --figure docs/results/a.png
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import statsmodels.api as sm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from trainers.records import read_evaluations
from trainers.rundir import RunDir
from trainers.spool import read_metrics

Array = NDArray[np.float64]
Scores = dict[str, dict[int, dict[str, float]]]  # task/metric -> version -> prompt uid -> score


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A mean paired change with its 95 % interval over prompts; one prompt says nothing of their spread."""

    mean: float
    low: float | None  # None: no interval
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.3f} (no interval)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(before: Array, after: Array) -> Change:
    """Return the mean of after - before, both (N,), with Student's interval where there are two prompts or more."""
    difference = after - before
    mean, n = float(difference.mean()), len(difference)
    if n < 2:
        return Change(mean=mean, low=None, high=None, n=n)
    half = float(stats.t.ppf(0.975, n - 1)) * float(difference.std(ddof=1)) / math.sqrt(n)
    return Change(mean=mean, low=mean - half, high=mean + half, n=n)


def at_matched_length(change: Array, longer: Array) -> Change:
    """Return the change (N,) of a completion whose length did not change; `longer` (N,) is by how much it did.

    The intercept of an ordinary regression of one difference on the other, with the HC3 interval.
    """
    if np.ptp(longer) == 0:
        return paired(np.zeros(len(change)), change)
    fit = sm.OLS(change, sm.add_constant(longer)).fit(cov_type="HC3", use_t=True)
    low, high = fit.conf_int()[0]
    return Change(mean=float(fit.params[0]), low=float(low), high=float(high), n=len(change))


def load(run: Path) -> Scores:
    """Return all per-prompt scores of a run, undefined ones left out."""
    scores: Scores = {}
    for version, tasks in read_evaluations(RunDir(run).evaluations).items():
        for task in tasks:
            for metric, values in task.scores.items():
                by_prompt = {u: float(v) for u, v in zip(task.prompt_uids, values, strict=True) if math.isfinite(v)}
                scores.setdefault(f"{task.task}/{metric}", {})[version] = by_prompt
    return scores


def aligned(runs: Sequence[Scores], name: str, first: int, last: int) -> tuple[Array, Array]:
    """Return the scores (seeds, N) of two versions, on the prompts that have both in all runs."""
    tables = [(run[name][first], run[name][last]) for run in runs]
    prompts = sorted(set.intersection(*(set(table) for pair in tables for table in pair)))
    before, after = (np.array([[pair[i][p] for p in prompts] for pair in tables]) for i in (0, 1))
    return before, after


def changes(runs: Sequence[Scores], length: str) -> list[str]:
    """Return the rows of a Markdown table: per metric base, last, change per seed, and of the seeds' mean."""
    titles = ("evaluation", "prompts", "version 0", "last", "change per seed", "mean change, paired", "at equal length")
    rows = [_row(titles), _row(["---"] * len(titles))]
    for name in sorted(runs[0]):
        first, last = min(runs[0][name]), max(runs[0][name])
        before, after = aligned(runs, name, first, last)
        per_seed = ", ".join(f"{value:+.3f}" for value in (after - before).mean(1))
        matched = ""
        if name.split("/")[0] == length.split("/")[0] and name != length:
            short, long = aligned(runs, length, first, last)
            if short.shape == before.shape:
                matched = str(at_matched_length((after - before).mean(0), (long - short).mean(0)))
        change = paired(before.mean(0), after.mean(0))
        cells = (f"`{name}`", change.n, f"{before.mean():.3f}", f"{after.mean():.3f}", per_seed, change, matched)
        rows.append(_row(cells))
    return rows


def curves(runs: Sequence[Scores], names: Sequence[str]) -> list[str]:
    """Return a Markdown table of every metric's mean over prompts and seeds, by version."""
    versions = sorted(set.union(*(set(run[name]) for run in runs for name in names)))
    rows = [_row(["version", *(f"`{name}`" for name in names)]), _row(["---"] * (len(names) + 1))]
    for version in versions:
        cells = []
        for name in names:
            means = [np.mean(list(run[name][version].values())) for run in runs if version in run[name]]
            cells.append(" / ".join(f"{mean:.3f}" for mean in means))
        rows.append(_row([version, *cells]))
    return rows


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(path: Path, runs: Mapping[str, Scores], metrics: Mapping[str, Mapping[str, list[tuple[int, float]]]]) -> None:
    """Draw each run's training curves above its evaluations, one colour a run."""
    panels = ["reward/mean", "kl/reference", "policy/entropy", *sorted(next(iter(runs.values())))]
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for panel, ax in zip(panels, axes, strict=False):
        for name, run in runs.items():
            if panel in run:
                points = [(version, float(np.mean(list(scores.values())))) for version, scores in run[panel].items()]
                ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            elif panel in metrics[name]:
                ax.plot(*zip(*metrics[name][panel], strict=True), label=name)
        ax.set_title(panel, fontsize=9)
        ax.grid(alpha=0.25)
    for ax in list(figure.axes)[len(panels) :]:
        ax.set_visible(False)
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("policy version")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of one recipe, one per seed")
    parser.add_argument("--length", default="heldout/length", help="metric that `at equal length` holds fixed")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    runs = {path.name: load(path) for path in arguments.runs}
    every = list(runs.values())
    print("\n".join(changes(every, arguments.length)), end="\n\n")
    print("\n".join(curves(every, sorted(every[0]))))
    if arguments.figure:
        metrics = {path.name: read_metrics(RunDir(path).metrics) for path in arguments.runs}
        draw(arguments.figure, runs, metrics)


if __name__ == "__main__":
    main()
