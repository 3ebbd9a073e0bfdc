"""From a run that was read to what its report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.report.view import Choice, Sample, View, Warned
from trainers.measured import EarlyWarning, MeasuredRun
from trainers.mismatch import Settings, correlate
from trainers.mismatch.correlation import WINDOW
from trainers.mismatch.findings import find

SHOWN_SAMPLES = 8


def build(run: MeasuredRun, settings: Settings | None = None) -> View:
    """Ask the instrument about a run, and gather what a report of it shows.

    The plan of the run's own recipe counts where `settings` has none. Raises UserError as the instrument does.
    """
    settings = settings or Settings()
    if settings.planned is None and run.planned is not None:
        settings = replace(settings, planned=max(run.planned, 3))
    found = find(run.series, settings, notes=run.notes)
    chosen = Choice(rule="chosen", version=None, value=None, note="not enough: no version is chosen")
    return View(
        name=run.name,
        series=run.series,
        verdict=found.verdict,
        correlations=found.correlations,
        chosen=chosen,
        windows=correlate(run.series, window=WINDOW, draws=200) if len(run.series.primary.versions) > WINDOW else (),
        warnings=tuple(map(_warned, run.early_warnings)),
        samples=_side_by_side(run.samples, chosen.version),
        params=run.params,
        evaluation_hash=run.evaluation_hash,
        seconds=run.seconds,
        notes=found.reasons,
    )


def _warned(early: EarlyWarning) -> Warned:
    curve = early.curve
    if not len(curve.versions):
        says = "not measured yet"
    else:
        first, last = (f"{curve.mean[place]:.4g} at version {curve.versions[place]}" for place in (0, -1))
        says = f"{early.kind}: {first}, {last}"
    return Warned(curve=curve, says=says, error_rate="not measured")


def _side_by_side(samples: Mapping[int, Sequence[Mapping[str, Any]]], chosen: int | None) -> tuple[Sample, ...]:
    """Put the completions of the same prompts by the first, the chosen and the last version beside each other."""
    if not samples:
        return ()
    versions = sorted({min(samples), max(samples), *({chosen} & samples.keys())})
    by_prompt: dict[str, dict[int, str]] = {}
    for version in versions:
        for sample in samples[version]:
            by_prompt.setdefault(str(sample.get("prompt")), {}).setdefault(version, str(sample.get("completion")))
    shared = [Sample(prompt=prompt, completions=found) for prompt, found in by_prompt.items() if len(found) == len(versions)]
    return tuple(shared[:SHOWN_SAMPLES])
