"""`headroom budget`: what evaluations the next run needs to find a fall that matters, from a run that was measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.report.text import aligned
from cluster.report.view import duration, percent, size
from configs.errors import UserError
from trainers.measured import MeasuredRun
from trainers.mismatch import Budget, Option, Scatter, Settings, Wanted, evaluation_budget, scatter
from trainers.mismatch.budget import EVALUATIONS, HELD


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be found, and how often it happens."""

    drop: float  # of the primary evaluation, in its unit
    base_rate: float = 0.5  # share of runs that fall by so much
    within: float = 0.35  # share of the run that the evaluations after a fall may take
    prompts: int | None = None  # behind each mean of a table that has no scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The evaluations that a run as long as the measured one needs."""

    run: MeasuredRun
    wanted: Wanted
    scatter: Scatter
    budget: Budget
    length: int  # versions, first to last


def plan(run: MeasuredRun, asked: Asked, settings: Settings | None = None) -> Plan:
    """Ask what evaluations find the drop in a run as long as this one, whose scores scatter as this one's.

    `settings.planned`: that number of evaluations alone, else several and the run's own. Costs are seconds of the
    evaluator, or prompts where the run logged no times. Raises UserError for numbers outside their range, a run that is
    too short, and an evaluation whose scatter is not known.
    """
    settings = settings or Settings()
    found = scatter(run.series.primary, asked.prompts)
    wanted = Wanted(
        drop=asked.drop,
        score_sd=found.score_sd,
        correlation=found.correlation,
        base_rate=asked.base_rate,
        prompt_cost=run.prompt_seconds or 1.0,
        within=asked.within,
    )
    versions = run.series.primary.versions
    length = run.final_version or int(versions[-1] - versions[0])
    own = [run.planned or len(versions)]
    numbers = [settings.planned] if settings.planned else [*EVALUATIONS, *(n for n in own if n >= 2 * HELD)]
    fitting = [number for number in numbers if number - 1 <= length]
    if not fitting:
        raise UserError(f"{run.name} has {length + 1} versions: too few for {min(numbers)} evaluations")
    return Plan(
        run=run,
        wanted=wanted,
        scatter=found,
        budget=evaluation_budget(wanted, settings, fitting),
        length=length,
    )


def text(of: Plan) -> str:
    """Return the plan for a terminal."""
    name, budget, rate = of.run.series.primary.name, of.budget, of.wanted.base_rate
    lines = [
        f"{of.run.name}: to find a fall of {name} by {of.wanted.drop:g} with a probability of {percent(budget.power)}, "
        f"{HELD} evaluations after it",
        "",
        *aligned([_titles(of), *(_row(of, option) for option in budget.options)]),
        "",
        budget.not_enough or f"cheapest in time: {_said(budget.chosen)}",
        f"false alarms: in at most {percent(budget.false_alarm_rate)} of runs that do not fall; if {percent(rate)} of "
        f"runs fall so far, at least {percent(budget.alarm_is_real)} of alarms are real",
        *(f"note: {note}" for note in _notes(of)),
    ]
    return "\n".join(lines)


def _said(option: Option | None) -> str:
    return "none" if option is None else f"{option.evaluations} evaluations of {option.prompts} prompts"


def _titles(of: Plan) -> Sequence[str]:
    cost = "evaluator" if of.run.prompt_seconds else "cost"
    return "evaluations", "one in", "prompts each", "finds", "found after", cost


def _row(of: Plan, option: Option) -> Sequence[str]:
    return (
        str(option.evaluations),
        f"{of.length / (option.evaluations - 1):.3g} versions",
        str(option.prompts),
        size(option.detectable_drop),
        f"{percent(round(option.delay, 2))} of the run",
        duration(option.cost) if of.run.prompt_seconds else f"{option.cost:.0f} prompts",
    )


def _notes(of: Plan) -> Iterator[str]:
    found, name = of.scatter, of.run.series.primary.name
    yield (
        f"scores of single prompts have a standard deviation of {size(found.score_sd)}, at two versions a correlation "
        f"of {found.correlation:.2f}, as measured on {found.prompts} prompts at {found.versions} versions"
    )
    yield f"a run of {of.length} versions, as this one" + (
        f"; a prompt takes {of.run.prompt_seconds:.2g} s of the evaluator, as in this one; other tasks are not counted"
        if of.run.prompt_seconds
        else "; no times of evaluations are known, so costs are prompts"
    )
    if found.versions == 1:
        yield f"{name} was measured at one version: its correlation with another is not known and taken for 0"
