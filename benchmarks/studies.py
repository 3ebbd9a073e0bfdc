"""Studies of training itself on the demo's world, by `benchmarks.solo`: every algorithm, and stale rollouts.

    python -m benchmarks.studies runs/studies --part 1/2 &
    python -m benchmarks.studies runs/studies --part 2/2; wait
    cat runs/studies/part-*.jsonl > docs/results/studies.jsonl

Each run leaves a line. What has a line in any part is not run again, so the same command goes on where it ended; the
parts that run at one time must be given the same cells and seeds.
"""

import argparse
import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import LlamaForCausalLM

from benchmarks.demo_plan import RECIPE, SEEDS, SHIPPED, TRIAL_SEEDS, placed
from benchmarks.demo_queue import Results, hold
from benchmarks.demo_record import difference
from benchmarks.demo_seeds import commit
from benchmarks.recipes import command
from benchmarks.solo import Solo, play, stage
from cluster.launch import first_cause
from configs.algorithms import FACTS
from configs.errors import UserError
from configs.load import load
from configs.schema import Recipe
from trainers import gold, world, world_build
from trainers.batch import rollout_metrics
from trainers.data import load_tokenizer
from trainers.mismatch import choose, from_scores
from trainers.scoring import Judged, RewardModel
from trainers.types import Evaluation, Message, Weights

WEIGHTS = {  # what is done about rollouts being old -> overrides
    "naive": ("algorithm.off_policy.weight=none",),
    "truncated": ("algorithm.off_policy.weight=truncate",),
}
RATES = {"slow": 1.5e-4, "fast": 6e-4}  # learning rates: the recipe's own, at which a step moves little, and another
STALENESS = {"slow": (0, 1, 2, 4, 8), "fast": (0, 2, 8)}
EVERY = 6  # versions between evaluations
STALE_SEEDS, ALGORITHM_SEEDS = 5, 3  # the first of SEEDS
CHOOSE, MEASURE = "choose", "measure"
ANSWERS = 2  # to each prompt that gold is measured on
KEPT = {  # of every step -> the metric's name
    "reward": "reward/mean",
    "kl": "kl/reference",
    "staleness": "rollout/staleness_mean",
    "entropy": "policy/entropy",
    "clipped": "policy/clip_fraction",
    "grad_norm": "policy/grad_norm",
    "effective_share": "rollout/importance_effective_share",
    "truncated_share": "rollout/importance_truncated_share",
    "masked_share": "rollout/importance_masked_share",
}
DIGITS = 4
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting of the recipe, run on several seeds in the shipped world."""

    name: str
    seeds: int
    overrides: tuple[str, ...]


def cells() -> tuple[Cell, ...]:
    """Return all cells: fixed before any of SEEDS has run."""
    stale = [
        Cell(
            name=stale_name(bound, weights, rate),
            seeds=STALE_SEEDS,
            overrides=(f"loop.staleness={bound}", *overrides, f"learner.optimizer.learning_rate={value:g}"),
        )
        for rate, value in RATES.items()
        for bound in STALENESS[rate]
        for weights, overrides in WEIGHTS.items()
    ]
    algorithms = [
        Cell(name=f"algorithm-{name}", seeds=ALGORITHM_SEEDS, overrides=(f"algorithm={name}",)) for name in FACTS
    ]
    return (*stale, *algorithms)


def stale_name(bound: int, weights: str, rate: str) -> str:
    """Return the name of a cell of stale rollouts."""
    return f"stale-{rate}-{bound}-{weights}"


def jobs(seeds: Sequence[int]) -> list[tuple[Cell, int]]:
    """Return every cell on each of its seeds, seed by seed: what has run at any time is whole for its seeds."""
    return [(cell, seed) for number, seed in enumerate(seeds) for cell in cells() if number < cell.seeds]


def job_name(cell: Cell, seed: int) -> str:
    """Return the name of a run in its line."""
    return f"{cell.name}/{seed}"


def recipe_of(cell: Cell, seed: int, world: Path) -> Recipe:
    """Return the recipe of one run in the world that lies, or will be built, at `world`."""
    shipped = [f"sft.seed={SHIPPED}", f"reward_models.helpdesk.seed={SHIPPED}"]
    every = f"evaluation.every={EVERY}"
    return load(RECIPE, [*placed(world), *shipped, f"run.seed={seed}", every, *cell.overrides])


class Examiner:
    """Evaluates versions in this process, on held-out prompts: on the first half a version is chosen, on the other not.

    transformers' `generate` answers all prompts of a sample at once, in a fraction of an engine's time.
    """

    def __init__(self, recipe: Recipe) -> None:
        limits, [task] = recipe.reward, recipe.evaluation.tasks
        self._tokens = task.sampling.max_tokens
        self._tokenizer = load_tokenizer(recipe.model.path)
        self._policy = LlamaForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32).eval()
        [of] = recipe.reward.components
        assert of.model is not None
        self._reward = RewardModel(of.model, max_length=limits.max_length, token_budget=limits.token_budget)
        rows = world.prompts("heldout", world_build.HELDOUT, SHIPPED)
        half = len(rows) // 2
        self._samples = {CHOOSE: (rows[:half], 1), MEASURE: (rows[half:], ANSWERS)}

    async def __call__(self, weights: Weights, seed: int) -> Sequence[Evaluation]:
        """Return gold, reward and words of each prompt's answers (N,), mean over them, of both samples."""
        self._policy.load_state_dict(safetensors.torch.load(weights.handle.tobytes()))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return [self._evaluate(weights.version, name, *sample) for name, sample in self._samples.items()]

    def _evaluate(self, version: int, name: str, rows: Sequence[world.PromptRow], n: int) -> Evaluation:
        questions = [row["prompt"] for row in rows]
        answers = world_build.answers_of(self._policy, self._tokenizer, questions, n, len(rows), self._tokens)
        judged = [
            Judged(messages=(Message(role="user", content=question),), completion=text)
            for question, texts in zip(questions, answers, strict=True)
            for text in texts
        ]
        golds = [
            gold.gold(row["prompt"], text, row) for row, texts in zip(rows, answers, strict=True) for text in texts
        ]
        words = [len(one.completion.split()) for one in judged]
        scores = {"gold": golds, "reward": self._reward.score(judged), "length": words}
        return Evaluation(
            version=version,
            task=name,
            prompt_uids=tuple(questions),
            scores={metric: np.array(values, np.float32).reshape(-1, n).mean(1) for metric, values in scores.items()},
            samples=(),
        )


def line(solo: Solo) -> Row:
    """Return what is kept of a run."""
    found = {version: {of.task: of.scores for of in results} for version, results in sorted(solo.evaluations.items())}
    versions = list(found)
    curves = {
        (task, metric): from_scores(metric, versions, np.array([found[version][task][metric] for version in versions]))
        for task in (CHOOSE, MEASURE)
        for metric in ("gold", "reward", "length")
    }
    steps = [
        rollout_metrics(take.groups, number + solo.first) | dict(stats.metrics)
        for number, (take, stats) in enumerate(solo.recorded)
    ]
    chosen = choose(curves[CHOOSE, "gold"]).version
    assert chosen is not None, "errors are known, so there is a choice"
    return {
        "versions": versions,
        "chosen": chosen,
        "rise": {
            name: round(value, DIGITS)
            for name, value in difference(curves[MEASURE, "gold"], 0, versions.index(chosen)).items()
        },
        **{
            metric: {"mean": rounded(curve.mean), "se": rounded(curve.se)}
            for metric in ("gold", "reward", "length")
            for curve in [curves[MEASURE, metric]]
        },
        "steps": {
            name: rounded([step[metric] for step in steps])
            for name, metric in KEPT.items()
            if all(metric in step for step in steps)
        },
        "discarded": sum(len(take.discarded) for take, _ in solo.recorded),
    }


def rounded(values: Any) -> list[float]:
    """Return numbers as short as they need to be."""
    return [round(float(value), DIGITS) for value in values]


async def work(todo: Sequence[tuple[Cell, int]], world: Path, results: Results, source: Mapping[str, Any]) -> None:
    """Run what has no line yet, on one stage."""
    first = recipe_of(*todo[0], world)
    async with stage(first, str(results.path), Examiner(first)) as on:
        for cell, seed in todo:
            name = {"job": job_name(cell, seed), "cell": cell.name, "seed": seed, **source}
            results.append(name | await ended(play(recipe_of(cell, seed, world), on)))
            print(f"{time.strftime('%H:%M:%S')} {told(results.rows[-1])}", flush=True)


async def ended(playing: Awaitable[Solo]) -> Row:
    """Return the line of a run; one that its own numbers or budgets ended has one too, or only the good would be told.

    What is not the run's own trouble, a dead engine or a mistake of ours, is raised: the run is still to be made.
    """
    began = time.monotonic()
    try:
        found = {"status": "done", **line(await playing)}
    except ExceptionGroup as group:
        cause = first_cause(group)
        if not isinstance(cause, (FloatingPointError, UserError)):
            raise
        found = {"status": "failed", "error": f"{type(cause).__name__}: {cause}"}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def told(row: Row) -> str:
    """Return an ended run in a few words."""
    if row["status"] != "done":
        return f"{row['job']} failed: {row['error']}"
    gold, reward = row["gold"]["mean"], row["reward"]["mean"]
    best = gold[row["versions"].index(row["chosen"])]
    return (
        f"{row['job']}: gold {gold[0]:+.2f} -> {best:+.2f} at {row['chosen']} -> {gold[-1]:+.2f}; "
        f"reward {reward[0]:+.2f} -> {reward[-1]:+.2f}; {row['seconds']:.0f} s"
    )


def part_of(text: str) -> tuple[int, int]:
    """Parse K/N. Raises UserError unless 1 <= K <= N."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise UserError(f"--part {text}: give K/N, for example 1/2 for the first of two processes")
    return int(first), int(second)


def select(
    every: Sequence[tuple[Cell, int]], prefixes: Sequence[str], seeds: Sequence[int] | None
) -> list[tuple[Cell, int]]:
    """Return the runs of cells whose names begin so, on these seeds or all. Raises UserError if there is none."""
    chosen = [
        (cell, seed) for cell, seed in every if cell.name.startswith(tuple(prefixes)) and seed in (seeds or [seed])
    ]
    cells_of = [cell.name for cell, _ in chosen]
    if not chosen or not all(any(name.startswith(prefix) for name in cells_of) for prefix in prefixes):
        names, planned = dict.fromkeys(cell.name for cell, _ in every), dict.fromkeys(seed for _, seed in every)
        raise UserError(
            f"--cells {' '.join(prefixes)} --seeds {' '.join(map(str, seeds or planned))}: nothing is planned there; "
            f"the cells are {', '.join(names)}, the seeds {', '.join(map(str, planned))}, fewer for the algorithms"
        )
    return chosen


def main() -> None:
    """Run what is open of one part of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the world and of the lines, part-K.jsonl")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every N-th run, from the K-th: a process each")
    parser.add_argument("--trial", action="store_true", help=f"seeds {TRIAL_SEEDS}, not {SEEDS[0]} and so on")
    parser.add_argument("--cells", nargs="+", metavar="PREFIX", default=[""], help="only those whose names begin so")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="only these")
    options = parser.parse_args()
    part, parts = part_of(options.part)
    chosen = select(jobs(TRIAL_SEEDS if options.trial else SEEDS), options.cells, options.seeds)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"part-{part}.jsonl"
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("trainers").setLevel(logging.INFO)
    torch.set_num_threads(1)
    with hold(path):
        results = Results(path)
        world_build.prepare(recipe_of(*chosen[0], out / "world"))  # the other processes wait
        made = {row["job"] for other in out.glob("part-*.jsonl") for row in Results(other).rows}
        todo = [job for job in chosen[part - 1 :: parts] if job_name(*job) not in made]
        if todo:
            asyncio.run(work(todo, out / "world", results, commit()))
        print(f"part {options.part}: all has a line", flush=True)


if __name__ == "__main__":
    command(main)
