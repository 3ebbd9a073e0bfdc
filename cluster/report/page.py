"""The report as one HTML file: what to know first, then the evidence."""

from collections.abc import Iterable, Iterator, Sequence
from xml.etree.ElementTree import Element

from cluster.report.figures import Picture
from cluster.report.html import document, element, table, unbroken
from cluster.report.view import (
    ARROWS,
    Choice,
    View,
    alarm_says,
    coefficient,
    explanation,
    headline,
    interval,
    measured,
    number,
    percent,
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
    chosen, name = view.chosen, view.series.primary.name
    take = "No version is chosen" if chosen.version is None else f"Take version {chosen.version}"
    said = [] if chosen.value is None else [
        element("div", f"{name} {unbroken(interval(chosen.value))}", class_="value"),
        element("p", f"95 % interval of the {chosen.value.of}", class_="soft"),
    ]  # fmt: skip
    note = [element("p", chosen.note, class_="soft")] if chosen.note else []
    cards.append(card("checkpoint", "Checkpoint", element("div", take, class_="big"), *said, *note))
    room = view.headroom
    left = unbroken(interval(room)).capitalize() if room else "Not identified"
    why = [element("p", view.no_headroom, class_="soft")] if view.no_headroom else []
    of = [element("p", room.of, class_="soft")] if room else []
    cards.append(card("headroom", "Headroom left", element("div", left, class_="big"), *of, *why))
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
    alarms = [view.verdict.primary, *view.verdict.others]
    rows = []
    for alarm in alarms:
        drop = alarm.minimum_detectable_drop
        rows.append((
            alarm.evaluation, alarm_says(alarm), number(alarm.margin, alarm.margin, sign=False),
            "not known" if drop is None else number(drop, drop, sign=False), f"{alarm.alpha:.3g}",
        ))  # fmt: skip
    caption = (
        f"A sequential scan. The first row is the primary evaluation: false alarms in at most "
        f"{percent(view.verdict.false_alarm_rate)} of runs; the others share the same rate by Holm. Drops are in the "
        "evaluation's unit; a drop is detectable when the scan finds it with 80 % power, held for 3 points."
    )
    return table(caption, ("evaluation", "alarm", "margin", "minimum detectable drop", "level per run"), rows)


def _choices(view: View) -> Element:
    titles = ("rule", "version", view.series.primary.name, "gain over the first version", "interval of")
    caption = "The chosen version, then what simpler rules would have taken. Intervals: 95 %."
    return table(caption, titles, map(_choice, [view.chosen, *view.rivals]), chosen=0)


def _choice(choice: Choice) -> Sequence[str]:
    of = [choice.value.of] if choice.value else []
    return (
        choice.rule,
        "none" if choice.version is None else str(choice.version),
        interval(choice.value) if choice.value else "not known",
        interval(choice.gain) if choice.gain else "not known",
        "; ".join([*of, *([choice.note] if choice.note else [])]),
    )


def _correlations(view: View) -> Element:
    pairs = dict.fromkeys((one.x, one.y, one.n) for one in view.correlations)
    rows = []
    for x, y, n in pairs:
        by_kind = {one.kind: one for one in view.correlations if (one.x, one.y) == (x, y)}
        rows.append(
            (f"{x} with {y}", str(n), *(coefficient(by_kind[kind]) for kind in ("pearson", "spearman", "kendall")))
        )
    level = percent(view.correlations[0].level) if view.correlations else "95 %"
    caption = (
        f"Of the true values at this run's versions, corrected for measurement error, with {level} intervals. They say "
        "nothing about other runs."
    )
    return table(caption, ("pair", "versions", "Pearson", "Spearman", "Kendall"), rows)


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
    if notes := list(dict.fromkeys([*view.verdict.reasons, *view.notes])):
        yield element("ul", (element("li", note) for note in notes))
    yield element("p", f"Evaluation hash: {view.evaluation_hash or 'not known'}", class_="soft")


def _params(view: View) -> Iterator[Element]:
    if view.params:
        rows = sorted(view.params.items())
        whole = table("Parameters as the run logged them.", ("key", "value"), rows)
        yield element("details", element("summary", f"{len(rows)} parameters"), whole)
