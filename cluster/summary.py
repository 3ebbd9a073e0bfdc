"""What a run says when it ends: a table, a figure, samples, and where everything lies."""

from collections.abc import Mapping, Sequence

from cluster.launch import Finished
from configs.schema import Recipe
from trainers.records import read_evaluations
from trainers.types import Evaluation, Floats

SAMPLES = 3


def means(results: Sequence[Evaluation]) -> str:
    """List every metric of one version: mean ± standard error over the prompts."""
    return "\n".join(
        f"{key}  {scores.mean():+.4f} ± {scores.std(ddof=1) / len(scores) ** 0.5:.4f}  (n = {len(scores)})"
        for key, scores in per_prompt(results).items()
    )


def table(recipe: Recipe, finished: Finished) -> str:
    """Compare the first, the best and the last version on every evaluation; ± is the standard error of the change."""
    results = read_evaluations(finished.rundir.evaluations)
    if not results:
        return "no evaluations"
    first, last = min(results), max(results)
    best = finished.best[0] if finished.best else last
    rows = [("", f"version {first}", f"best: version {best}", f"last: version {last}", "change, first to last")]
    for key, before in per_prompt(results[first]).items():
        at_best, after = (per_prompt(results[version]).get(key) for version in (best, last))
        if after is None:
            continue
        change = after - before  # the same prompts: paired
        error = float(change.std(ddof=1) / len(change) ** 0.5)
        rows.append((
            key, f"{before.mean():+.3f}", "" if at_best is None else f"{at_best.mean():+.3f}", f"{after.mean():+.3f}",
            f"{change.mean():+.3f} ± {error:.3f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def per_prompt(results: Sequence[Evaluation]) -> Mapping[str, Floats]:
    """Return `task/metric` -> scores by prompt."""
    return {f"{result.task}/{metric}": scores for result in results for metric, scores in result.scores.items()}


def samples(recipe: Recipe, finished: Finished) -> str:
    """Show the same prompts' completions by the first and the last version."""
    results = read_evaluations(finished.rundir.evaluations)
    task = (recipe.evaluation.primary or "").partition("/")[0]
    lines = []
    before, after = (
        next((result.samples for result in results[version] if result.task == task), ())
        for version in (min(results), max(results))
    )
    # A run that was stopped may have evaluated this task at its first version only.
    for old, new in list(zip(before, after, strict=False))[:SAMPLES]:
        lines += [f"  prompt  {old['prompt']}", f"  before  {old['completion']}", f"  after   {new['completion']}", ""]
    return "\n".join(lines)


def report(recipe: Recipe, finished: Finished) -> str:
    """Return the closing page of a run."""
    lines = [f"{finished.version} versions in {finished.seconds:.0f} s", "", table(recipe, finished), ""]
    if finished.evaluations:
        lines += [samples(recipe, finished)]
    lines += finished.answers
    if finished.best:
        lines += [f"best checkpoint  {finished.best[1]}  (version {finished.best[0]} by {recipe.evaluation.primary})"]
    lines += [
        f"figure           {finished.figure}",
        f"run directory    {finished.rundir.path}",
        f"look at it       mlflow server --backend-store-uri {recipe.tracking.uri}",
    ]
    return "\n".join(lines)
