"""The report as one HTML file: what to know first, then the evidence."""

from collections.abc import Iterable, Iterator, Sequence
from xml.etree.ElementTree import Element

from cluster.report.figures import Picture
from cluster.report.html import document, element, table, unbroken
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
    percent,
    ratios,
    size,
    take,
)

SAMPLES = 4
LONGEST = 1_500  # characters of a sample


def page(view: View, pictures: Sequence[Picture]) -> str:
    """Return the whole page."""
    return document(
        f"{headline(view)}: {view.name}",
        element("h1", f"Headroom report: {view.name}"),
        summary(view),
        element("h2", "Reward and evaluations"),
        figures(one for one in pictures if one.about == "curves"),
        element("h2", "The alarm"),
        _alarms(view),
        element("h2", "Which checkpoint"),
        _choices(view),
        element("h2", "Correlations"),
        figures(one for one in pictures if one.about == "correlations"),
        _correlations(view),
        element("h2", "Gap and length"),
        _ratios(view),
        *_warnings(view, [one for one in pictures if one.about == "warnings"]),
        *_samples(view),
        element("h2", "What was measured"),
        *_measured(view),
        *_params(view),
    )


def summary(view: View) -> Element:
    """Build the cards that are seen first: state, checkpoint to take, headroom."""
    state = view.verdict.state
    cards = [
        element(
            "section",
            element("div", "State", class_="label"),
            element("div", element("span", ARROWS[state], aria_hidden="true"), " ", headline(view), class_="big"),
            element("p", explanation(view)),
            class_=f"card {state or 'unknown'}",
            id="state",
        )
    ]
    chosen = view.chosen
    said = [] if chosen.value is None else [
        element("div", f"{view.series.primary.name} {unbroken(estimate(chosen.value))}", class_="value"),
        element("p", estimand(chosen), class_="soft"),
    ]  # fmt: skip
    note = [element("p", one, class_="soft") for one in (beside(chosen),) if one]
    cards.append(card("checkpoint", "Checkpoint", element("div", take(chosen), class_="big"), *said, *note))
    left, *more = headroom(view)
    why = [element("p", one, class_="soft") for one in more if one]
    cards.append(card("headroom", "Headroom left", element("div", unbroken(left).capitalize(), class_="big"), *why))
    return element("div", cards, class_="cards")


def card(name: str, label: str, *body: Element) -> Element:
    """Build one card of the summary."""
    return element("section", element("div", label, class_="label"), *body, class_="card", id=name)


def figures(pictures: Iterable[Picture]) -> Element:
    """Build the figures, each with its words for who cannot see it."""
    shown = (
        element("figure", element("img", src=one.source, alt=one.alt), element("figcaption", one.caption))
        for one in pictures
    )
    return element("div", shown, class_="figures")


def _alarms(view: View) -> Element:
    rows = [
        (
            alarm.evaluation,
            alarm_says(alarm),
            size(alarm.margin),
            size(alarm.minimum_detectable_drop),
            f"{alarm.alpha:.3g}",
        )
        for alarm in (view.verdict.primary, *view.verdict.others)
    ]
    caption = (
        f"A sequential scan. The first row is the primary evaluation: false alarms in at most "
        f"{percent(view.verdict.false_alarm_rate)} of runs; the others share the same rate by Holm. Drops are in the "
        "evaluation's unit; a drop is detectable when the scan finds it with 80 % power, held for 3 points."
    )
    return table(caption, ("evaluation", "alarm", "margin", "minimum detectable drop", "level per run"), rows)


def _choices(view: View) -> Element:
    titles = ("rule", "version", view.series.primary.name, "gain over the first version", "interval of")
    caption = "The chosen version, then what simpler rules would have taken. Intervals: 95 %."
    return table(caption, titles, choices(view), chosen=0)


def _correlations(view: View) -> Element:
    correlations = view.findings.correlations
    pairs = dict.fromkeys((one.x, one.y, one.n) for one in correlations)
    rows = []
    for x, y, n in pairs:
        by_kind = {one.kind: one for one in correlations if (one.x, one.y) == (x, y)}
        rows.append(
            (f"{x} with {y}", str(n), *(coefficient(by_kind[kind]) for kind in ("pearson", "spearman", "kendall")))
        )
    level = percent(correlations[0].level) if correlations else "95 %"
    caption = (
        f"Of the true values at this run's versions, corrected for measurement error, with {level} intervals. They say "
        "nothing about other runs."
    )
    return table(caption, ("pair", "versions", "Pearson", "Spearman", "Kendall"), rows)


def _ratios(view: View) -> Element:
    caption = (
        "The gap: how much of the evaluation was gained with the reward. 1: the two gained in step; 0: what the "
        "reward gained brought nothing; below 0: it cost. Length: the part of the reward's rise that goes with longer "
        f"answers. {percent(view.findings.gap.level)} intervals."
    )
    return table(caption, ("what", "versions", "value", "which is"), ratios(view))


def _warnings(view: View, pictures: Sequence[Picture]) -> Iterator[Element]:
    if not view.warnings:
        return
    yield element("h2", "Early warnings")
    yield figures(pictures)
    rows = [(one.curve.name, one.says, one.error_rate) for one in view.warnings]
    caption = (
        "They need no evaluation and are no alarm: a warning says that a quantity left the way it went, not that "
        "anything was lost. Wrong: a warning of a quantity that goes on as before."
    )
    yield table(caption, ("quantity", "says", "how often it is wrong"), rows)


def _samples(view: View) -> Iterator[Element]:
    if not view.samples:
        return
    yield element("h2", "Samples")
    for sample in view.samples[:SAMPLES]:
        yield element("h3", "Prompt")
        yield element("div", _cut(sample.prompt), class_="text")
        parts = (
            element("div", element("h3", f"Version {version}"), element("div", _cut(text), class_="text"))
            for version, text in sample.completions.items()
        )
        yield element("div", parts, class_="cards samples")
    yield element("p", f"{min(SAMPLES, len(view.samples))} of {len(view.samples)} kept, in their order.", class_="soft")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […{len(text) - LONGEST} more characters]"


def _measured(view: View) -> Iterator[Element]:
    titles = ("quantity", "versions", "points", "prompts", "standard error, median")
    yield table("What the numbers above come from.", titles, measured(view))
    if said := notes(view):
        yield element("ul", (element("li", note) for note in said))
    yield element("p", f"Evaluation hash: {view.evaluation_hash or UNKNOWN}", class_="soft")


def _params(view: View) -> Iterator[Element]:
    if view.params:
        rows = sorted(view.params.items())
        whole = table("Parameters as the run logged them.", ("key", "value"), rows)
        yield element("details", element("summary", f"{len(rows)} parameters"), whole)
