"""The picture of a run: where the proxy reward and what it stands for part."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float, float]]  # policy version, mean, standard error
BLUE, REDS = "#2b6cb0", ("#c05621", "#2f855a", "#6b46c1", "#975a16", "#b83280")


def curves(
    path: Path,
    reward: Curve,
    evaluations: Mapping[str, Curve],
    kl: Sequence[tuple[int, float]],
    best: int | None = None,
) -> Path:
    """Draw proxy reward and evaluations over the policy version, and the KL below, as a PNG.

    Bands are one standard error; `best` marks the version that the primary evaluation chose.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    _draw(top, reward, BLUE, "proxy reward")
    top.set_ylabel("proxy reward", color=BLUE)
    handles = list(top.lines)
    if evaluations:
        right = top.twinx()
        for number, (name, curve) in enumerate(evaluations.items()):
            _draw(right, curve, REDS[number % len(REDS)], name, marker="o")
        right.set_ylabel("evaluation")
        handles += list(right.lines)
    bottom.plot([version for version, _ in kl], [value for _, value in kl], color="#4a5568")
    bottom.set_ylabel("KL to reference")
    bottom.set_xlabel("policy version")
    if best is not None:
        handles.append(top.axvline(best, color="black", linestyle=":", label=f"best: version {best}"))
        bottom.axvline(best, color="black", linestyle=":")
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    return path


def _draw(axes: Axes, curve: Curve, colour: str, label: str, marker: str | None = None) -> None:
    versions, means, errors = np.array(curve, np.float64).reshape(-1, 3).T
    axes.plot(versions, means, color=colour, label=label, marker=marker, markersize=4)
    axes.fill_between(versions, means - errors, means + errors, color=colour, alpha=0.18, linewidth=0)
