"""`headroom compare`: runs side by side, seeds of one recipe together, and what differs between the recipes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

import numpy as np
from scipy import stats

from cluster.report.figures import LOOKS, Picture, compared
from cluster.report.html import document, element, table, unbroken
from cluster.report.page import card, figures
from cluster.report.text import aligned
from cluster.report.view import ARROWS, UNKNOWN, View, coefficient, duration, estimand, estimate, headline, headroom
from configs.errors import UserError
from trainers.measured import MeasuredRun
from trainers.mismatch import Correlation, Curve, Estimate, between
from trainers.mismatch.correlation import FEWEST

# What differs between the seeds of one recipe, by the names of Headroom and of transformers' trainers.
NO_RECIPE = ("run.seed", "run.name", "run.dir", "seed", "data_seed", "run_name", "output_dir", "logging_dir")
NO_RECIPE_SECTIONS = ("tracking.", "ray.")
LABEL = 48  # characters of a recipe's label
LEVEL = 0.95
DIFFERENTLY = "EVALUATED DIFFERENTLY"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """Some runs, the recipe that each belongs to, and what sets the recipes apart."""

    views: tuple[View, ...]
    recipes: tuple[str, ...]  # label of each run's recipe
    differs: Mapping[str, tuple[str, ...]]  # key -> value in each run
    correlations: tuple[Correlation, ...]
    marks: tuple[str, ...]  # why the runs are not comparable in every way
    alike: bool  # evaluated alike, as far as that is known


def compare(views: Sequence[View], group: str | None = None, *, across_evaluations: bool = False) -> Compared:
    """Put runs side by side; those with equal parameters under `group` (None: all, but seeds and names) go together.

    Raises UserError as `check` does, or if no run has a parameter under `group`.
    """
    views = _named_apart(views)
    marks = [*check(views, across_evaluations=across_evaluations), *_reward_marks(views)]
    recipes = _recipes(views, group)
    order = sorted(range(len(views)), key=lambda place: recipes[place].partition(":")[0])
    views = [views[place] for place in order]
    return Compared(
        views=tuple(views),
        recipes=tuple(recipes[place] for place in order),
        differs=_differences(views),
        correlations=() if _rewards_differ(views) else _across(views),
        marks=tuple(marks),
        alike=not any(mark.startswith(DIFFERENTLY) for mark in marks),
    )


def _named_apart(views: Sequence[View]) -> list[View]:
    """Number runs that share a name, as seeds of one recipe do."""
    names = [view.name for view in views]
    return [
        replace(view, name=f"{view.name} #{names[: place + 1].count(view.name)}")
        if names.count(view.name) > 1
        else view
        for place, view in enumerate(views)
    ]


def check(runs: Sequence[View | MeasuredRun], *, across_evaluations: bool = False) -> list[str]:
    """Return what is to be said of the runs' evaluations before they are compared.

    Raises UserError for fewer than two runs, for runs that were evaluated differently unless `across_evaluations`, or
    whose primary evaluations differ in name.
    """
    if len(runs) < 2:
        raise UserError(f"compare needs two runs or more: there {'is 1' if runs else 'are none'}")
    primaries = {run.series.primary.name: run.name for run in reversed(runs)}
    if len(primaries) > 1:
        named = ", ".join(f"{run} has {name}" for name, run in primaries.items())
        raise UserError(f"the primary evaluations differ: {named}; name one that all have with --eval")
    return list(_evaluated_differently(runs, allowed=across_evaluations))


def _evaluated_differently(runs: Sequence[View | MeasuredRun], *, allowed: bool) -> Iterator[str]:
    by_hash: dict[str, list[str]] = {}
    for run in runs:
        by_hash.setdefault(run.evaluation_hash or "", []).append(run.name)
    known = {of: names for of, names in by_hash.items() if of}
    if len(known) > 1:
        said = "; ".join(f"{of} in {', '.join(names)}" for of, names in known.items())
        if not allowed:
            raise UserError(
                f"the runs were evaluated differently: hash {said}; --across-evaluations compares them anyway"
            )
        yield f"{DIFFERENTLY}, values of these runs do not compare: evaluation hash {said}"
    if "" in by_hash:
        yield f"no evaluation hash is known of {', '.join(by_hash[''])}: nothing shows that they were evaluated alike"


def _rewards_differ(views: Sequence[View]) -> bool:
    rewards = [{key: value for key, value in view.params.items() if key.startswith("reward.")} for view in views]
    return any(reward != rewards[0] for reward in rewards) or len({view.series.reward.name for view in views}) > 1


def _reward_marks(views: Sequence[View]) -> Iterator[str]:
    if _rewards_differ(views):
        yield "the runs were trained on different rewards, which have no common unit: no correlation across runs"


def _in_recipe(key: str) -> bool:
    return key not in NO_RECIPE and not key.startswith(NO_RECIPE_SECTIONS)


def _differences(views: Sequence[View]) -> dict[str, tuple[str, ...]]:
    keys = sorted({key for view in views for key in view.params if _in_recipe(key)})
    values = {key: tuple(view.params.get(key, "-") for view in views) for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _recipes(views: Sequence[View], group: str | None) -> tuple[str, ...]:
    """Label the recipe of each run: a letter, and what sets it apart. Without parameters each run is its own."""
    keys = {key for view in views for key in view.params if _in_recipe(key)}
    if group is not None:
        sections = sorted({key.partition(".")[0] for key in keys})
        keys = {key for key in keys if key == group or key.startswith(f"{group}.")}
        if not keys:
            raise UserError(f"--group {group}: no run has such parameters: there are {', '.join(sections) or 'none'}")
    differing = [key for key in sorted(keys) if len({view.params.get(key) for view in views}) > 1]
    letters: dict[object, str] = {}
    labels = []
    for place, view in enumerate(views):
        recipe = tuple(view.params.get(key, "-") for key in differing) if view.params else place
        letter = letters.setdefault(recipe, _letter(len(letters)))
        said = ", ".join(f"{key}={view.params.get(key, '-')}" for key in differing) if view.params else view.name
        labels.append(f"{letter}: {said}"[:LABEL] if said else letter)
    return tuple(labels)


def _letter(place: int) -> str:
    return (_letter(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _across(views: Sequence[View]) -> tuple[Correlation, ...]:
    """Correlate, one point a run, the reward and the primary evaluation at the last version that has both."""
    name = views[0].series.primary.name
    places = [(view, _last(view)) for view in views]
    kept = [(view, version) for view, version in places if version is not None]
    reward = _of_runs([view.series.reward.at(np.array([version])) for view, version in kept])
    evaluation = _of_runs([view.series.primary.at(np.array([version])) for view, version in kept])
    of = f"correlation of the true {reward.name} and {name} at the last version of each of these {len(kept)} runs"
    few = f"not enough: {len(kept)} runs have both, {FEWEST} are needed" if len(kept) < FEWEST else None
    return tuple(
        replace(one, estimand=f"{one.kind} {of}", not_enough=few or one.not_enough)
        for one in between(reward, evaluation)
    )


def _last(view: View) -> int | None:
    joint = np.intersect1d(view.series.reward.versions, view.series.primary.versions)
    return int(joint[-1]) if len(joint) else None


def _of_runs(points: Sequence[Curve]) -> Curve:
    """Return one point of each run as a curve over the runs; an error that is not known counts as none."""
    mean = np.array([point.mean[0] for point in points])
    known = all(point.covariance is not None for point in points)
    variance = [0.0 if point.covariance is None else float(point.covariance[0, 0]) for point in points]
    return Curve(
        name=points[0].name if points else "",
        versions=np.arange(len(points)),
        mean=mean,
        covariance=np.diag(variance) if known and points else None,
    )


def spread(values: Sequence[float]) -> Estimate | None:
    """Return the mean over seeds (S,) with Student's 95 % interval; None for fewer than two."""
    if len(values) < 2:
        return None
    array = np.asarray(values)
    half = float(stats.t.isf((1 - LEVEL) / 2, len(array) - 1)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    mean = float(array.mean())
    return Estimate(value=mean, low=mean - half, high=mean + half)


def _runs(of: Compared) -> tuple[Sequence[str], list[Sequence[str]]]:
    name = of.views[0].series.primary.name
    titles = (
        "run",
        "recipe",
        "state",
        "take version",
        f"{name} there",
        f"{name}, last",
        "headroom left",
        "evaluation",
        "time",
    )
    rows = [
        (
            view.name, recipe, f"{ARROWS[view.verdict.state]} {headline(view)}",
            "none" if view.chosen.version is None else str(view.chosen.version), estimate(view.chosen.value),
            estimate(_last_value(view)), headroom(view)[0], view.evaluation_hash or UNKNOWN, duration(view.seconds),
        )
        for view, recipe in zip(of.views, of.recipes, strict=True)
    ]  # fmt: skip
    return titles, rows


def _last_value(view: View) -> Estimate | None:
    return next((rival.value for rival in view.findings.rivals if rival.rule == "last"), None)


def _seeds(of: Compared) -> tuple[Sequence[str], list[Sequence[str]]]:
    name = of.views[0].series.primary.name
    titles = ("recipe", "runs", "states", "versions to take", f"{name} there", f"{name}, last", "time, each")
    rows = []
    for recipe in dict.fromkeys(of.recipes):
        views = [view for view, label in zip(of.views, of.recipes, strict=True) if label == recipe]
        states = [view.verdict.state or "not enough" for view in views]
        versions = sorted(view.chosen.version for view in views if view.chosen.version is not None)
        cells = []
        for values in ([view.chosen.value for view in views], [_last_value(view) for view in views]):
            found = [one.value for one in values if one is not None]
            mean = spread(found)
            cells.append("one run: no spread" if mean is None else f"{estimate(mean)}, SD {np.std(found, ddof=1):.2g}")
        seconds = [view.seconds for view in views if view.seconds is not None]
        counted = (f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        time = duration(float(np.mean(seconds)) if seconds else None)
        rows.append(
            (recipe, str(len(views)), ", ".join(counted), ", ".join(map(str, versions)) or "none", *cells, time)
        )
    return titles, rows


SEEDS = (
    "Recipes: mean over their runs (seeds) with Student's 95 % interval of that mean, and the runs' standard deviation."
)
DIFFERS = "What differs between the runs' parameters, seeds and names aside."
ACROSS = (
    "Across these runs, one point a run: reward and primary evaluation at the last version that has both. The "
    "intervals hold the measurement errors of these runs; they say nothing about other recipes."
)


def _coefficients(of: Compared) -> tuple[Sequence[str], list[Sequence[str]]]:
    said = [(f"{one.x} with {one.y}", one.kind, str(one.n), coefficient(one)) for one in of.correlations]
    alike = len({why for _, _, _, why in said}) == 1  # of all three the same reason
    rows = [(pair, "all", n, why) for pair, _, n, why in said[:1]] if alike else said
    return ("pair", "coefficient", "runs", "estimate, 95 % interval"), rows


def _settings(of: Compared) -> tuple[Sequence[str], list[Sequence[str]]]:
    return ("key", *(view.name for view in of.views)), [(key, *values) for key, values in of.differs.items()]


def text(of: Compared) -> str:
    """Return the comparison for a terminal."""
    lines = [f"WARNING: {mark}" for mark in of.marks]
    for caption, (titles, rows) in _tables(of):
        lines += ["", caption, *aligned([titles, *rows], left=3)]
    return "\n".join(lines).strip()


def _tables(of: Compared) -> Iterator[tuple[str, tuple[Sequence[str], list[Sequence[str]]]]]:
    yield "Intervals: 95 %, of the true mean at that version; see each run's report.", _runs(of)
    if len(set(of.recipes)) < len(of.views):
        yield SEEDS, _seeds(of)
    if of.differs:
        yield DIFFERS, _settings(of)
    if of.correlations:
        yield ACROSS, _coefficients(of)


def pictures(of: Compared) -> list[Picture]:
    """Draw reward and primary evaluation of all runs: those of one recipe look alike, unless there is but one."""
    recipes = len(set(of.recipes))
    by = "run" if recipes == 1 and len(of.views) <= len(LOOKS) else "recipe"
    groups = [view.name if by == "run" else recipe for view, recipe in zip(of.views, of.recipes, strict=True)]
    drawn = []
    for name, curves in (
        ("rewards", [view.series.reward for view in of.views]),
        ("evaluations", [view.series.primary for view in of.views]),
    ):
        names = [view.name for view in of.views]
        drawn.append(compared(list(zip(names, groups, curves, strict=True)), curves[0].name, name, by))
    return drawn


def page(of: Compared, drawn: Sequence[Picture]) -> str:
    """Return the comparison as one HTML file that asks for nothing outside itself."""
    recipes = len(set(of.recipes))
    first, *rest = (table(caption, titles, rows) for caption, (titles, rows) in _tables(of))
    return document(
        f"Comparison of {len(of.views)} runs",
        element("h1", f"Headroom: {len(of.views)} runs, {recipes} recipe{'s' if recipes > 1 else ''}"),
        [element("p", mark, class_="card parted mark") for mark in of.marks],
        _best(of),
        element("h2", "Runs"),
        first,
        element("h2", "Curves"),
        figures(drawn),
        element("h2", "Evidence"),
        rest,
    )


def _best(of: Compared) -> Element:
    """Build the cards seen first: where the primary evaluation is highest, and how many runs are in which state."""
    states = [view.verdict.state for view in of.views]
    counts = [
        element("div", f"{ARROWS[state]} {states.count(state)} {state or 'not enough'}", class_="value")
        for state in dict.fromkeys(states)
    ]
    return element("div", _highest(of), card("states", "States", *counts), class_="cards")


def _highest(of: Compared) -> Element:
    values = [(view.chosen.value.value, place) for place, view in enumerate(of.views) if view.chosen.value]
    if not of.alike or not values:
        why = "Evaluated differently: no run is best" if values else "No run has a chosen version"
        return card("best", "Highest", element("div", why, class_="big"))
    best = max(values)[1]
    view, name = of.views[best], of.views[best].series.primary.name
    seeds = [value for value, place in values if of.recipes[place] == of.recipes[best]]
    mean = spread(seeds)
    more = "" if mean is None else (
        f"Its recipe, mean over {len(seeds)} runs: {estimate(mean)}, Student's 95 % interval of that mean."
    )  # fmt: skip
    return card(
        "best", "Highest",
        element("div", f"{view.name}, version {view.chosen.version}", class_="big"),
        element("div", unbroken(f"{name} {estimate(view.chosen.value)}"), class_="value"),
        element("p", estimand(view.chosen), class_="soft"),
        element("p", f"It is the highest of {len(values)} runs, so its value is a little too good.", class_="soft"),
        *([element("p", unbroken(more))] if more else []),
    )  # fmt: skip
