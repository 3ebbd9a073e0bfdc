"""The report for a terminal."""

from collections.abc import Sequence

import numpy as np

from cluster.report.view import (
    ARROWS,
    UNKNOWN,
    View,
    alarm_says,
    beside,
    choices,
    coefficient,
    estimand,
    estimate,
    explanation,
    headline,
    headroom,
    measured,
    notes,
    ratios,
    size,
    take,
)
from trainers.mismatch import Curve

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # points of a line


def head(view: View) -> list[str]:
    """Return what to know first: state, checkpoint to take, headroom."""
    chosen, (room, of_room, why) = view.chosen, headroom(view)
    lines = [f"{ARROWS[view.verdict.state]}  {headline(view)}", f"    {explanation(view)}"]
    value = f": {view.series.primary.name} {estimate(chosen.value)}" if chosen.value else ""
    lines.append(f"    {take(chosen)}{value}")
    lines += [f"      {said}" for said in (estimand(chosen), beside(chosen)) if said]
    return [*lines, f"    Headroom left: {room}", *(f"      {said}" for said in (of_room, why) if said)]


def text(view: View) -> str:
    """Return the report: what to know first, then the evidence."""
    lines = [view.name, "", *head(view), ""]
    curves = [view.series.reward, *view.series.evaluations, *([view.series.kl] if view.series.kl else [])]
    lines += aligned([(curve.name, sparkline(curve)) for curve in curves if len(curve.versions)], left=2)
    alarms = [view.verdict.primary, *view.verdict.others]
    lines += ["", *aligned([
        ("evaluation", "margin", "detectable drop", "alarm"),
        *((a.evaluation, size(a.margin), size(a.minimum_detectable_drop), alarm_says(a)) for a in alarms),
    ])]  # fmt: skip
    rows = [(rule, at, why if value == UNKNOWN and why else value) for rule, at, value, _, why in choices(view)]
    lines += ["", *aligned([("rule", "version", view.series.primary.name), *rows])]
    pairs = [(f"{one.x} with {one.y}", one.kind, str(one.n), coefficient(one)) for one in view.findings.correlations]
    lines += ["", *aligned([("correlation", "", "versions", "of the true values, 95 % interval"), *pairs])]
    rows = [(name, versions, value) for name, versions, value, _ in ratios(view)]
    lines += ["", *aligned([("gap and length", "versions", "of the true values, 95 % interval"), *rows])]
    if view.warnings:
        rows = [(one.curve.name, one.says, one.error_rate) for one in view.warnings]
        lines += ["", *aligned([("early warning", "says", "how often it is wrong"), *rows], left=3)]
    titles = ("measured", "versions", "points", "prompts", "standard error, median")
    lines += ["", *aligned([titles, *measured(view)])]
    lines += ["", *(f"note: {note}" for note in notes(view))]
    return "\n".join(lines).rstrip()


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows as lines of equally wide columns, the first `left` and the last flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < left or place == len(row) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return out


def sparkline(curve: Curve) -> str:
    """Return a curve as a row of bars from its lowest to its highest value, with its ends in numbers."""
    blocks = np.array_split(curve.mean, min(WIDTH, len(curve.mean)))
    means = np.array([block.mean() for block in blocks])
    span = float(np.ptp(means)) or 1.0
    bars = "".join(BARS[int((mean - means.min()) / span * (len(BARS) - 1) + 0.5)] for mean in means)
    return f"{bars}  {curve.mean[0]:.4g} at version {curve.versions[0]}, {curve.mean[-1]:.4g} at {curve.versions[-1]}"
