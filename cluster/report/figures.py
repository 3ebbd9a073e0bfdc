"""The pictures of a report: colours of Okabe & Ito with a marker and a line style each, bands of 95 %."""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cluster.report.view import LEVEL_Z, View, band, coefficient, percent
from trainers.mismatch import Curve
from trainers.mismatch.series import Integers

About = Literal["curves", "correlations", "warnings"]
Look = tuple[str, str, str]  # colour, marker, line style

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
LOOKS: tuple[Look, ...] = (
    (VERMILLION, "o", "-"), (BLUE, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "-"),
    (SKY, "P", "--"),
)  # fmt: skip
INK, GREY = "#1b1f24", "#7a828c"  # in the dark the first one is turned over
WIDTH = 4.2  # inches: on a phone of 390 px a letter of 9 points stays readable
MOST = 4  # evaluations in one picture
CROWD = 25  # points; with more of them not each one has a marker
KNOT = 40  # points; a line through more of them, to and fro, hides what it joins
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "headroom", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "lines.linewidth": 1.5, "grid.color": GREY, "grid.alpha": 0.25,
    "axes.titlesize": 9, "axes.titlelocation": "left",
}  # fmt: skip
DARK = f"<style>:root{{--ink:{INK}}}@media(prefers-color-scheme:dark){{:root{{--ink:#e8eaed}}}}</style>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure in both forms, what it shows in words, and its caption."""

    name: str  # of the PNG, without its ending
    about: About  # where on the page it belongs
    svg: str
    png: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The figure as an address that holds it."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


def pictures(view: View) -> list[Picture]:
    """Draw what the run has: curves by version and by sqrt KL, Fig. 4's scatter, early warnings, moving windows."""
    with matplotlib.rc_context(STYLE):
        drawn = [_by_version(view), _by_distance(view), *(_scatter(view, one) for one in view.series.evaluations)]
        return [one for one in (*drawn, _windows(view), _warnings(view)) if one is not None]


def finished(figure: Figure, name: str, about: About, alt: str, caption: str) -> Picture:
    """Turn a figure into a Picture; the SVG's ink follows the reader's light or dark page."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).replace(
        INK, "var(--ink)"
    )
    head = text.index(">") + 1
    return Picture(
        name=name, about=about, svg=text[:head] + DARK + text[head:], png=png.getvalue(), alt=alt, caption=caption
    )


def canvas(rows: int, height: float, columns: int = 1, **shared: str | bool) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of `rows` x `columns` panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def draw(axes: Axes, curve: Curve, look: Look, label: str | None = None) -> None:
    """Draw a curve with its band over its versions."""
    colour, marker, line = look
    every = 1 if len(curve.versions) <= CROWD else len(curve.versions) // 8
    axes.plot(curve.versions, curve.mean, line, color=colour, marker=marker, markersize=4, markevery=every, label=label)
    if (edges := band(curve)) is not None:
        axes.fill_between(curve.versions, *edges, color=colour, alpha=0.2, linewidth=0)


def _draw_over(axes: Axes, x: np.ndarray, curve: Curve, look: Look) -> None:
    """Draw a curve (n,) over x (n,), which need not grow: bars, and points alone where a line would be a knot."""
    colour, marker, line = look
    many = len(x) > KNOT
    axes.plot(x, curve.mean, "" if many else line, color=colour, marker="." if many else marker or ".", markersize=4)
    if curve.se is not None:
        axes.errorbar(x, curve.mean, LEVEL_Z * curve.se, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)


def _panels(view: View) -> list[tuple[str, Curve, Look]]:
    named = [(curve.name, curve) for curve in view.series.evaluations[:MOST]]
    named[0] = (f"{named[0][0]} (primary evaluation)", named[0][1])
    looks = (LOOKS[0], *LOOKS[2:])
    shown = [(name, curve, looks[place % len(looks)]) for place, (name, curve) in enumerate(named)]
    reward = view.series.reward
    return [(f"{reward.name} (what the policy is trained on)", reward, (BLUE, "", "-")), *shown]


def _by_version(view: View) -> Picture:
    panels = _panels(view)
    figure, axes = canvas(len(panels), 0.6 + 1.45 * len(panels), sharex=True)
    for ax, (title, curve, look) in zip(axes, panels, strict=True):
        draw(ax, curve, look)
        ax.set_title(title)
    marks, fall = [], view.verdict.primary.fallen
    if view.chosen.version is not None:
        marks.append((view.chosen.version, "-", f"take version {view.chosen.version}"))
    if fall is not None:
        marks += [
            (fall.since, "--", f"last before the fall: {fall.since}"),
            (fall.raised, ":", f"alarm: {fall.raised}"),
        ]
    for version, line, label in marks:
        for ax in axes:
            ax.axvline(version, color=INK, linestyle=line, linewidth=1, label=label)
    if marks:
        handles = [handle for handle in axes[0].lines if not str(handle.get_label()).startswith("_")]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    axes[-1].set_xlabel("policy version")
    left_out = len(view.series.evaluations) - MOST
    more = f" {left_out} further evaluations are in the tables." if left_out > 0 else ""
    alt = "Reward and evaluations against the policy version. " + " ".join(_trend(curve) for _, curve, _ in panels)
    caption = "Against the policy version. Bands: 95 % interval of each mean, from its standard error." + more
    return finished(figure, "curves", "curves", alt + " " + "; ".join(label for _, _, label in marks), caption)


def _trend(curve: Curve) -> str:
    if not len(curve.versions):
        return f"{curve.name} was not measured."
    best = int(np.argmax(curve.mean))
    first, last = (f"{curve.mean[i]:.4g} at version {curve.versions[i]}" for i in (0, -1))
    return f"{curve.name}: {first}, highest {curve.mean[best]:.4g} at version {curve.versions[best]}, {last}."


def _joint(a: Curve, b: Curve) -> Integers:
    return np.intersect1d(a.versions, b.versions)


def _by_distance(view: View) -> Picture | None:
    kl = view.series.kl
    panels = [] if kl is None else [one for one in _panels(view) if len(_joint(kl, one[1]))]
    if kl is None or not panels:
        return None
    figure, axes = canvas(len(panels), 0.4 + 1.45 * len(panels), sharex=True)
    for ax, (title, curve, look) in zip(axes, panels, strict=True):
        joint = _joint(kl, curve)
        distance = np.sqrt(np.maximum(kl.at(joint).mean, 0))  # an unbiased estimate of a KL near 0 may be below it
        _draw_over(ax, distance, curve.at(joint), look)
        ax.set_title(title)
    axes[-1].set_xlabel(f"√{kl.name}")
    alt = f"The same curves against the square root of {kl.name}."
    caption = (
        f"Against the distance √{kl.name}, at versions that have both. Bars: 95 % interval of each mean; the error of "
        f"{kl.name} is not drawn."
    )
    return finished(figure, "distance", "curves", alt, caption)


def _scatter(view: View, evaluation: Curve) -> Picture | None:
    """Lambert & Calandra, Fig. 4: one point a version."""
    across = [
        curve for curve in (view.series.reward, view.series.kl) if curve is not None and len(_joint(curve, evaluation))
    ]
    if not across:
        return None
    figure, axes = canvas(1, 2.5, len(across), sharey=True)
    shown = None
    for ax, x in zip(axes, across, strict=True):
        joint = _joint(x, evaluation)
        a, b = x.at(joint), evaluation.at(joint)
        errors = [None if curve.se is None else LEVEL_Z * curve.se for curve in (b, a)]
        ax.errorbar(a.mean, b.mean, *errors, fmt="none", ecolor=GREY, elinewidth=0.7, alpha=0.7)
        ax.plot(a.mean, b.mean, color=GREY, linewidth=0.6)
        shown = ax.scatter(a.mean, b.mean, c=joint, cmap="cividis", s=22, edgecolors=INK, linewidths=0.5, zorder=3)
        for place, shape in ((0, "s"), (-1, "^")):  # the first and the last version, by shape too
            ax.scatter(a.mean[place], b.mean[place], c=[joint[place]], cmap="cividis", marker=shape, s=60,
                       vmin=joint[0], vmax=joint[-1], edgecolors=INK, zorder=4)  # fmt: skip
        ax.set_xlabel(x.name)
    axes[0].set_title(evaluation.name)
    figure.colorbar(shown, ax=axes, label="policy version", pad=0.02)
    said = [
        f"Spearman with {one.x}: {coefficient(one)}."
        for one in view.findings.correlations
        if one.y == evaluation.name and one.kind == "spearman"
    ]
    against = " and ".join(curve.name for curve in across)
    alt = f"{evaluation.name} against {against}, one point a version. {' '.join(said)}"
    caption = (
        f"{evaluation.name}: one point a version (square: first, triangle: last). Bars: 95 % interval of each mean."
    )
    place = [curve.name for curve in view.series.evaluations].index(evaluation.name)
    return finished(figure, f"scatter-{place}", "correlations", alt, caption)


def _windows(view: View) -> Picture | None:
    name = view.series.primary.name
    shown = [one for one in view.windows if one.kind == "spearman" and one.y == name and one.estimate is not None]
    if not shown:
        return None
    figure, (ax,) = canvas(1, 2.2)
    for place, x in enumerate(dict.fromkeys(one.x for one in shown)):
        part = [one for one in shown if one.x == x]
        colour, marker, line = LOOKS[place + 1]
        at = [one.last_version for one in part]
        ax.plot(at, [one.estimate for one in part], line, color=colour, marker=marker, markersize=4, label=x)
        ax.fill_between(at, [one.low for one in part], [one.high for one in part], color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_ylim(-1.05, 1.05)
    ax.set_xlabel("last policy version of the window")
    ax.set_title(f"Spearman correlation with {name}")
    ax.legend(frameon=False, fontsize=8)
    n = shown[0].n
    alt = f"Spearman correlation of reward and KL with {name} in a moving window of {n} versions."
    level = percent(shown[0].level)
    caption = f"In a moving window of {n} versions. Bands: {level} interval of the true values' correlation there."
    return finished(figure, "windows", "correlations", alt, caption)


def _warnings(view: View) -> Picture | None:
    drawn = [one.curve for one in view.warnings if len(one.curve.versions) > 1]
    if not drawn:
        return None
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure, axes = canvas(rows, 0.4 + 1.4 * rows, columns)
    for ax, curve in zip(axes, drawn, strict=False):
        draw(ax, curve, (BLUE, "", "-"))
        ax.set_title(curve.name, fontsize=8)
    for ax in axes[len(drawn) :]:
        ax.set_visible(False)
    figure.supxlabel("policy version", fontsize=9)
    alt = "What needs no evaluation, against the policy version. " + " ".join(map(_trend, drawn))
    return finished(figure, "early-warnings", "warnings", alt, "Early warnings against the policy version.")


def compared(series: Sequence[tuple[str, str, Curve]], title: str, name: str, by: str = "recipe") -> Picture:
    """Draw one quantity of several runs, (run, group, curve) each: a colour, marker and line style for each group.

    `by`: what a group is.
    """
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = canvas(1, 3.0)
        groups = list(dict.fromkeys(group for _, group, _ in series))
        named: set[str] = set()
        for _, group, curve in series:
            look = LOOKS[groups.index(group) % len(LOOKS)]
            draw(ax, curve, look, label=None if group in named else group)
            named.add(group)
        ax.set_title(title)
        ax.set_xlabel("policy version")
        figure.legend(loc="outside lower left", ncols=1, frameon=False, fontsize=8)
        alt = f"{title} of {len(series)} runs. " + " ".join(f"{run}: {_trend(curve)}" for run, _, curve in series)
        bands = f"Bands: 95 % interval of each mean within its run. Colour, marker and line style: the {by}."
        return finished(figure, name, "curves", alt, f"{title}. {bands}")
