"""The page and the figure of benchmarks.demo_seeds: every run is in them, failed ones and cells without a fall too.

python -m benchmarks.demo_report runs/demo-seeds/results.jsonl --output docs/results/demo_seeds.md
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from benchmarks.demo_plan import (
    ANSWERS,
    ARMS,
    BETAS,
    BIASES,
    CONTROL_SEEDS,
    DEMO,
    SEEDS,
    SURE,
    TRIAL_SEEDS,
    Cell,
    cells,
)
from benchmarks.demo_queue import Results

Row = Mapping[str, Any]
NAMED = ("demo", "worlds", "gold", "pairs-x10")  # the rest are the grid
RULES = ("chosen", "raw best", "highest reward", "last")
COLOURS = "cividis"  # light and dark tell it too


def line(parts: Iterable[object]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(map(str, parts)) + " |"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table."""
    return [line(titles), line(["---"] * len(titles)), *map(line, rows)]


def share(count: int, total: int) -> str:
    """Return `count of total [Wilson's 95 % interval]`."""
    if not total:
        return "none"
    low, high = proportion_confint(count, total, method="wilson")
    return f"{count} of {total} [{low:.2f}, {high:.2f}]"


def median(values: Sequence[float]) -> str:
    """Return the median with its 95 % interval from the order statistics (Conover 1999, section 3.2)."""
    if not len(values):
        return "none"
    found = f"{np.median(values):.2f}"
    if len(values) < 6:  # no pair of order statistics covers 95 %
        return f"{found} ({min(values):.2f} to {max(values):.2f})"
    interval = stats.quantile_test(values, q=np.median(values), p=0.5).confidence_interval(0.95)
    return f"{found} [{interval.low:.2f}, {interval.high:.2f}]"


def told_whole(row: Row) -> bool:
    """Whether gold rose and then fell, and the alarm came after its peak: issue 3, acceptance 1."""
    truth, alarm = row["truth"], row["alarm"]
    return bool(truth["rose"] and truth["fell"] and alarm and alarm["version"] > truth["peak_version"])


def parted(row: Row) -> bool:
    """Whether the run ever said `parted`."""
    return any(said["state"] == "parted" for said in row["told"])


def by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the runs by cell; the middle of the grid is the first runs of `worlds`, which are the same runs."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cell"], []).append(row)
    first = (*SEEDS[:CONTROL_SEEDS], *TRIAL_SEEDS[:CONTROL_SEEDS])
    found[middle()] = [row for row in found.get("worlds", []) if row["seed"] in first]
    return found


def middle() -> str:
    """Return the name of the grid's cell with the recipe's own values."""
    return f"beta-{DEMO[0]:g}-bias-{DEMO[1]:g}"


def done(rows: Iterable[Row]) -> list[Row]:
    """Return the runs that were made and recorded."""
    return [row for row in rows if row["status"] == "done"]


def acceptance(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return the table of issue 3, acceptance 1; a run that failed counts as one that did not do it."""
    rows = []
    for cell in cells()[:2]:
        runs = found.get(cell.name, [])
        good = done(runs)
        kept = [row["truth"]["kept"]["chosen"] for row in good if "chosen" in (row["truth"]["kept"] or {})]
        late = [
            (row["alarm"]["version"] - row["truth"]["peak_version"]) for row in good if row["alarm"] and told_whole(row)
        ]
        rows.append((
            cell.name, f"{len(runs)} of {cell.seeds}", len(runs) - len(good),
            share(sum(row["truth"]["rose"] and row["truth"]["fell"] for row in good), len(runs)),
            share(sum(map(told_whole, good)), len(runs)), median(late), median(kept),
        ))  # fmt: skip
    titles = (
        *("cell", "runs", "failed", "gold rose, then fell", "and the alarm came after the peak"),
        *("versions from peak to alarm, median", "share of the gain kept, median"),
    )
    return table(titles, rows)


def each_seed(rows: Sequence[Row]) -> list[str]:
    """Return one line a run: what gold and reward did, what the run said, what it chose."""
    lines = []
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["status"] != "done":
            lines.append((row["seed"], *["-"] * 8, why(row).replace("|", "/")))
            continue
        truth, alarm, findings = row["truth"], row["alarm"], row["findings"]
        top = truth["versions"].index(truth["peak_version"])
        reward = row["evaluations"]["helpdesk/reward"]["mean"]
        gold = " → ".join(f"{truth['mean'][place]:.2f}" for place in (0, top, -1))
        kept = (truth["kept"] or {}).get("chosen")
        ranks = row["reward_model"]
        lines.append((
            row["seed"], f"{gold} ± {max(truth['se']):.2f}", truth["peak_version"],
            f"{reward[0]:.2f} → {reward[-1]:.2f}", f"{row['kl']['mean'][-1]:.2f}",
            f"{alarm['state']} at {alarm['version']}, since {alarm['since']}" if alarm else "none",
            findings["chosen_version"], "-" if kept is None else f"{kept:.2f}",
            " → ".join("-" if one["with_gold"] is None else f"{one['with_gold']:.2f}" for one in ranks.values()),
            f"{row['total_s']:.0f}",
        ))  # fmt: skip
    titles = (
        *("seed", "gold: start → peak → end", "peak", "reward model's score", "KL at the end", "alarm", "chosen"),
        *("kept", "reward model agrees with gold: start → end", "seconds"),
    )
    return table(titles, lines)


def phases(found: Mapping[str, Sequence[Row]], planned: Sequence[Cell]) -> list[str]:
    """Return one line a cell: what share parted, what share of gold truly fell, and the alarms that were wrong."""
    rows = []
    for cell in planned:
        runs = found.get(cell.name, [])
        good = done(runs)
        alarms, falls = [row["alarm"] is not None for row in good], [row["truth"]["fell"] for row in good]
        means = [np.mean([row["truth"]["mean"][place] for row in good]) if good else np.nan for place in (0, -1)]
        top = np.mean([max(row["truth"]["smoothed"]) for row in good]) if good else np.nan
        kept = [row["truth"]["kept"]["chosen"] for row in good if "chosen" in (row["truth"]["kept"] or {})]
        rows.append((
            f"{cell.name}: {cell.about}", f"{len(good)} of {cell.seeds}", len(runs) - len(good),
            share(sum(map(parted, good)), len(good)), share(sum(falls), len(good)), sum(alarms),
            sum(row["alarm"] is not None and row["truth"]["at_alarm"]["value"] >= 0 for row in good),
            sum(fell and not raised for raised, fell in zip(alarms, falls, strict=True)),
            " → ".join(f"{value:.2f}" for value in (means[0], top, means[1])) if good else "-", median(kept),
            f"{np.mean([row['world']['reward_accuracy'] for row in good]):.2f}" if good else "-",
        ))  # fmt: skip
    titles = (
        *(
            "cell",
            "runs",
            "failed",
            "said parted",
            "gold fell",
            "alarms",
            "alarm, gold not lower then",
            "fall, no alarm",
        ),
        *("gold: start → best → end", "gain kept", "reward model's accuracy"),
    )
    return table(titles, rows)


def rules(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return what share of the gain each rule's version keeps, median over the runs in which gold rose.

    And how far what the run said of its version's value is from what it truly was, mean over the runs.
    """
    rows = []
    for cell in NAMED:
        good = done(found.get(cell, []))
        kept = [row["truth"]["kept"] for row in good if row["truth"]["kept"]]
        shares = [median([one[rule] for one in kept if rule in one]) for rule in RULES]
        off = [
            row["findings"]["chosen_value"]["value"] - _at(row, row["findings"]["chosen_version"])
            for row in good
            if row["findings"]["chosen_value"]
        ]
        rows.append((cell, len(kept), *shares, paired(off)))
    return table(("cell", "runs", *RULES, "value said less true value"), rows)


def actions(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return what stopping and a raised KL did to gold at the end, beside the paired continuation, with t intervals.

    Stopping leaves the policy of the checkpoint at which the others go on.
    """
    demo = {row["seed"]: row for row in done(found.get("demo", []))}
    continued = {row["seed"]: row for row in done(found.get(ARMS[0].name, []))}
    changes: dict[str, dict[int, float]] = {"stop": {}, "the run itself, not branched": {}}
    for seed, row in continued.items():
        changes["stop"][seed] = _at(row, row["branch_version"]) - _at(row, -1)
        if seed in demo:
            changes["the run itself, not branched"][seed] = _at(demo[seed], -1) - _at(row, -1)
    for arm in ARMS[1:]:
        runs = {row["seed"]: row for row in done(found.get(arm.name, []))}
        changes[f"{arm.name}: {arm.about}"] = {
            seed: _at(row, -1) - _at(continued[seed], -1) for seed, row in runs.items() if seed in continued
        }
    rows = [(what, len(values), paired(list(values.values()))) for what, values in changes.items()]
    skipped = Counter(why(row) for arm in ARMS for row in found.get(arm.name, []) if row["status"] != "done")
    told = [f"* {why}: {count}" for why, count in skipped.items()]
    return [*table(("instead of going on", "seeds", "gold at the end, change [95 %]"), rows), "", *told]


def _at(row: Row, version: int) -> float:
    truth = row["truth"]
    return float(truth["mean"][-1 if version == -1 else truth["versions"].index(version)])


def paired(values: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95 % interval by Student's t."""
    if len(values) < 2:
        return "too few"
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def failures(rows: Sequence[Row]) -> list[str]:
    """Return every run that failed or was made more than once."""
    found = [f"* {row['job']} {why(row)}" for row in rows if row["status"] == "failed"]
    again = [f"* {row['job']}: attempt {row['attempt']}" for row in done(rows) if row["attempt"] > 1]
    return found + again or ["None."]


def why(row: Row) -> str:
    """Return why there is no run, without the place of a log on the machine that made it."""
    return f"{row['status']}: {row['error'].partition('; see ')[0]}"


def draw(path: Path, found: Mapping[str, Sequence[Row]]) -> None:
    """Draw the phase diagram: shares that parted and that truly fell, over the grid and in the cells beside it."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for ax, title, has in ((left, "said parted", parted), (centre, "gold truly fell", fell)):
        counts = [[_count(found.get(f"beta-{b:g}-bias-{bias:g}", []), has) for bias in BIASES] for b in BETAS]
        _heat(ax, title, counts)
    for offset, marker, label, has in ((-0.15, "o", "said parted", parted), (0.15, "s", "gold truly fell", fell)):
        colour = "black" if marker == "o" else "0.55"
        right.plot([], [], marker, color=colour, label=label)
        for place, cell in enumerate(NAMED):
            count, total = _count(found.get(cell, []), has)
            if not total:
                continue
            low, high = proportion_confint(count, total, method="wilson")
            right.plot([low, high], [place + offset] * 2, color=colour, linewidth=1)
            right.plot(count / total, place + offset, marker, color=colour)
    labels = [f"{cell} (n = {len(done(found.get(cell, [])))})" for cell in NAMED]
    right.set(yticks=range(len(NAMED)), yticklabels=labels, xlim=(-0.03, 1.03), xlabel="share of runs, 95 % interval")
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.25)
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def fell(row: Row) -> bool:
    """Whether gold fell from its peak to the end of the run."""
    return bool(row["truth"]["fell"])


def _count(rows: Sequence[Row], has: Any) -> tuple[int, int]:
    good = done(rows)
    return sum(map(has, good)), len(good)


def _heat(ax: Axes, title: str, counts: Sequence[Sequence[tuple[int, int]]]) -> None:
    shares = np.array([[count / total if total else np.nan for count, total in row] for row in counts])
    ax.imshow(np.ma.masked_invalid(shares), cmap=COLOURS, norm=Normalize(0, 1), aspect="auto", origin="lower")
    for i, row in enumerate(counts):
        for j, (count, total) in enumerate(row):
            text = f"{count} of {total}" if total else "not run"
            ax.text(j, i, text, ha="center", va="center", color="black" if shares[i, j] > 0.5 or not total else "white")
    ax.set(xticks=range(len(BIASES)), xticklabels=[f"{bias:g}" for bias in BIASES], xlabel="length bias", title=title)
    ax.set(yticks=range(len(BETAS)), yticklabels=[f"{beta:g}" for beta in BETAS], ylabel="KL coefficient")


def sources(rows: Sequence[Row]) -> str:
    """Return of which commits the finished runs are."""
    found = Counter(f"{row['commit'][:7]}{', changed' if row['changed'] else ''}" for row in done(rows))
    return ", ".join(f"{name} ({count} runs)" for name, count in found.items()) or "none"


def page(rows: Sequence[Row], attempts: int, figure: str) -> str:
    """Return the whole page; `attempts` counts the lines behind `rows`, which are the last of each job."""
    found = by_cell(rows)
    centre = Cell(name=middle(), seeds=CONTROL_SEEDS, about=f"KL coefficient {DEMO[0]:g}, length bias {DEMO[1]:g}")
    planned = sorted((*cells()[4:], centre), key=lambda cell: [float(x) for x in cell.name.split("-")[1::2]])
    seconds = [row["total_s"] for row in done(rows)]
    parts = [
        "# The demo's world over seeds",
        f"{'Trial seeds: not a result. ' if any(row['seed'] in TRIAL_SEEDS for row in rows) else ''}"
        f"{len(rows)} jobs, {len(done(rows))} runs recorded, {attempts} lines. Seeds {SEEDS[0]} to {SEEDS[-1]} were "
        "written into `benchmarks/demo_plan.py` before any of them had run. Source: "
        f"{sources(rows)}. "
        f"Median {np.median(seconds) if seconds else float('nan'):.0f} s a run.",
        f"*Gold* below is not the run's own evaluation: every evaluated version was sampled again from its checkpoint, "
        f"{ANSWERS} answers to the held-out prompts on which nothing was chosen, and the peak is that of the smoothed "
        f"curve. Gold *rose* or *fell* if the difference to the peak is above {SURE:g} standard errors. The gain is "
        "measured at the largest smoothed value, which chance biases upward, so that shares of it are biased "
        "downward. Intervals: 95 %; of shares Wilson's, of medians from order statistics, below six runs the range.",
        f"![Share of runs that parted and in which gold fell]({figure})",
        "## The story on fresh seeds",
        *_block(acceptance(found)),
        "`demo`: one world, as shipped, other run seeds. `worlds`: policy, pairs and reward model anew for each seed.",
        *(part for cell in ("demo", "worlds") for part in (f"### {cell}", *_block(each_seed(found.get(cell, []))))),
        "## Controls",
        f"`{middle()}`, the grid's middle, holds the same runs as the first seeds of `worlds`.",
        *_block(phases(found, (*cells()[:4], *planned))),
        "## What each rule keeps of the gain",
        *_block(rules(found)),
        "## After the alarm",
        "From the first checkpoint after the alarm was told, each arm goes on to the recipe's last version. Changes "
        "are against that checkpoint continued unchanged on the same seed; *stop* keeps its policy.",
        *_block(actions(found)),
        "## Failed or repeated",
        *_block(failures(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _block(lines: Sequence[str]) -> list[str]:
    return ["\n".join(lines).rstrip()]


def main() -> None:
    """Write the page and the figure beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of benchmarks.demo_seeds")
    parser.add_argument("--output", type=Path, required=True, help="the page; the figure is beside it, as .png")
    options = parser.parse_args()
    results = Results(options.results)
    rows = [row for job in dict.fromkeys(row["job"] for row in results.rows) if (row := results.of(job))]
    figure = options.output.with_suffix(".png")
    draw(figure, by_cell(rows))
    options.output.write_text(page(rows, len(results.rows), figure.name), encoding="utf-8")
    print(f"{options.output} and {figure}")


if __name__ == "__main__":
    main()
