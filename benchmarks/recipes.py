"""How a recipe is turned into a benchmark run: fixed lengths, a deterministic reward, nothing beside the loop."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.errors import UserError
from configs.schema import Recipe

REWARD = "actors.rules:distinct"


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="recipe, for example configs/smollm2_hh.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value …, for example data.path=hh.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where results and logs go")
    parser.add_argument("--steps", type=int, default=24, help="steps of one run, warm-up included")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm: A B, B A, …")
    parser.add_argument("--warm-up", type=int, default=3, help="first steps left out")
    parser.add_argument("--tokens", type=int, default=48, help="completion tokens, exactly")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser


def command(body: Callable[[], None]) -> None:
    """Run a benchmark; a user's mistake is one line and exit code 2."""
    try:
        body()
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        sys.exit(2)


def tail(recipe: Recipe) -> int:
    """Return how many last steps to leave out: nothing new is generated in them."""
    return recipe.loop.staleness + 1


def check_steps(recipe: Recipe, warm_up: int) -> None:
    """Raise UserError, before anything runs, if warm-up and tail leave no step to measure."""
    needed = warm_up + tail(recipe) + 2
    if recipe.run.steps < needed:
        raise UserError(
            f"--steps {recipe.run.steps}: {warm_up} steps of warm-up and {tail(recipe)} of tail leave none to measure; "
            f"give --steps {needed} or more, or a smaller --warm-up"
        )


def overrides(options: argparse.Namespace, directory: Path) -> list[str]:
    """Return the overrides of one run in `directory`; those of the command line come last."""
    return [
        f"run.dir={directory}",
        f"run.steps={options.steps}",
        f"run.checkpoint_every={options.steps}",
        "run.prepare=null",
        f"model.dtype={options.dtype}",
        f"sampling.max_tokens={options.tokens}",
        "sampling.extra={ignore_eos: true}",  # not min_tokens: the probe after each load asks for 8 tokens
        f"reward.components=[{{name: rule, function: '{REWARD}'}}]",
        "evaluation.tasks=[]",
        "evaluation.primary=null",
        f"tracking.uri=sqlite:///{directory}/mlflow.db",
        "tracking.system_metrics=false",
        "learner.optimizer.schedule=constant",
        "learner.optimizer.warmup_steps=0",
        *options.overrides,
    ]


def arm_command(python: str, mode: str, out: Path, config: str, chosen: Sequence[str]) -> list[str]:
    """Return the command line of one Headroom arm."""
    return [python, "-m", "benchmarks.arm", mode, str(out), config, *chosen]
