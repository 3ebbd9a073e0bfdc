"""Which version is best, settled when training ends: those that may be it are evaluated again, on other prompts.

aside = reserve(recipe)                                       # at the start: prompts that no evaluation will use
found = await settle(rundir, aside, primary, kept, evaluate)  # at the end; shortlist, choose, value
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema import EvalTask, Recipe
from trainers.data import load_tokenizer
from trainers.evaluations import due_versions, unused
from trainers.measured import primary_curve
from trainers.mismatch import Curve, Selected, choose, report, shortlist
from trainers.mismatch.selection import FEWEST
from trainers.records import read_evaluations, write_evaluations
from trainers.rundir import RunDir, sync_directory
from trainers.types import Evaluation, Prompt
from trainers.watcher import UNJUDGED

log = logging.getLogger("headroom")
PARTS = {"again": "evaluated again", "untouched": "untouched sample"}  # folder -> in words
Evaluate = Callable[[int, Sequence[Prompt]], Awaitable[Evaluation]]  # version, prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Prompts of the primary evaluation's task that it does not use; no text stands in two of the samples."""

    task: EvalTask
    again: tuple[Prompt, ...]  # to choose on
    untouched: tuple[Prompt, ...]  # to value the choice by


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The best version, how good it is, and where the scores lie that say so."""

    version: int
    selected: Selected  # its source is the untouched sample
    folder: Path

    @property
    def tags(self) -> dict[str, str]:
        """The same for MLflow: version, value and its 95 % interval."""
        value = self.selected.value
        ends = {} if value is None else {"value": value.value, "low": value.low, "high": value.high}
        return {"chosen.version": str(self.version), **{f"chosen.{end}": f"{of:.6g}" for end, of in ends.items()}}


def reserve(recipe: Recipe) -> Reserve | None:
    """Set prompts aside for the end of the run; None if the recipe wants none or, told in a line, there are too few.

    Raises UserError for data that cannot be used.
    """
    config, primary = recipe.evaluation, recipe.evaluation.primary
    tasks = [task for task in config.tasks if primary in [f"{task.name}/{scorer.name}" for scorer in task.scorers]]
    due = due_versions(recipe.run.steps, config.every)
    if not tasks or config.final.prompts == 0 or len(due) < FEWEST:
        return None
    task, sizes = tasks[0], (config.final.prompts, config.final.untouched)
    again, untouched = (task.prompts if size is None else size for size in sizes)
    tokenizer = load_tokenizer(recipe.model.path)
    prompts = unused(task, tokenizer, recipe.model.max_length, most=again + untouched)
    if len(prompts) < again + untouched:
        log.warning(
            "evaluation.final: task %s has %d prompts besides the %d that it evaluates, and %d + %d are wanted: the "
            "best version will not be evaluated again",
            *(task.name, len(prompts), task.prompts, again, untouched),
        )
        return None
    return Reserve(task=task, again=prompts[:again], untouched=prompts[again:])


async def settle(
    rundir: RunDir, aside: Reserve, primary: str, kept: Collection[int], evaluate: Evaluate
) -> Settled | None:
    """Evaluate the curve's shortlist again, choose on pooled data, and value the choice on the untouched prompts.

    `kept` are the versions whose weights are there. Each evaluation is on disk before the next one begins: where this
    was interrupted, another call goes on; where it was finished, another call evaluates nothing. None, told in a line,
    where nothing can be chosen: no end of a run hangs on it. Raises InfraError as `evaluate` does.
    """
    try:
        curve = primary_curve(read_evaluations(rundir.evaluations), primary)
        done = rundir.final / f"version-{curve.versions[-1]:06d}"
        if not done.exists():
            partial = rundir.final / f"partial-{curve.versions[-1]:06d}"
            await _evaluate(partial, aside, curve, kept, evaluate)
            partial.rename(done)
            sync_directory(rundir.final)
        again, untouched = (primary_curve(read_evaluations(done / part), primary) for part in PARTS)
        selected = report(choose(curve, again), untouched)
    except UNJUDGED as error:
        log.warning("the best version is not evaluated again: %s", error)
        return None
    return None if selected.version is None else Settled(version=selected.version, selected=selected, folder=done)


async def _evaluate(folder: Path, aside: Reserve, curve: Curve, kept: Collection[int], evaluate: Evaluate) -> None:
    """Fill both samples below `folder`. Raises UserError, with the reason, where no version can be chosen or valued."""
    listed = shortlist(curve, among=kept)
    if listed.not_enough or listed.base not in kept:
        raise UserError(listed.not_enough or f"the weights of version {listed.base} are gone")
    again = await _sample(folder / "again", curve.name, listed.versions, aside.again, evaluate)
    choice = choose(curve, again)
    if choice.version is None or choice.base is None:
        raise UserError(choice.not_enough or "")
    versions = sorted({choice.version, choice.base})
    untouched = await _sample(folder / "untouched", curve.name, versions, aside.untouched, evaluate)
    if why := report(choice, untouched).not_enough:
        raise UserError(why)


async def _sample(
    folder: Path, name: str, versions: Sequence[int], prompts: Sequence[Prompt], evaluate: Evaluate
) -> Curve:
    """Evaluate the versions that `folder` has not on these prompts yet, and return all of them."""
    uids = tuple(prompt.uid for prompt in prompts)
    for place, version in enumerate(versions, 1):
        known = read_evaluations(folder).get(version, [])
        if [one.prompt_uids for one in known] != [uids]:
            count = f"{place} of {len(versions)}"
            log.info("%s: version %d on %d prompts (%s)", PARTS[folder.name], version, len(uids), count)
            write_evaluations(folder, [await evaluate(version, prompts)])
    found = read_evaluations(folder)
    return primary_curve({version: found[version] for version in versions}, name)
