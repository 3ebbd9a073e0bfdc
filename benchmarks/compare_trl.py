"""Headroom beside TRL's GRPOTrainer with HF generate: samples/s and CPU-seconds per sample.

python -m benchmarks.compare_trl CONFIG --trl-python PYTHON [key=value …]
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import recipes
from benchmarks.arm import prompts_of
from benchmarks.measure import Trace, environment, interleaved, interval, pool, ratio, report, run_arm
from configs.load import load
from configs.schema import Recipe


def main() -> None:
    """Run both arms in turn and report."""
    parser = recipes.arguments(main.__doc__ or "")
    parser.add_argument("--trl-python", default=sys.executable, help="the interpreter that has trl")
    parser.add_argument("--trl-accumulation", type=int, default=1, help="micro-batches of a TRL step")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of TRL: all the cores it is given")
    options = parser.parse_args()
    root = options.out.resolve() / time.strftime("trl-%Y%m%d-%H%M%S")
    root.mkdir(parents=True)
    recipe = load(options.config, recipes.overrides(options, root / "prompts"))
    samples, tail = recipe.loop.batch_prompts * recipe.sampling.n, recipe.loop.staleness + 1
    specification = root / "trl.json"
    specification.write_text(json.dumps(trl_spec(recipe, root, options.trl_accumulation, options.threads)))
    result = {"environment": environment(), "options": {**vars(options), "out": str(options.out)}}
    traces: dict[str, list[Trace]] = {"headroom": [], "trl": []}
    for number, arm in enumerate(interleaved(["headroom", "trl"], options.rounds)):
        out = root / f"{number}-{arm}.json"
        if arm == "headroom":
            chosen = recipes.overrides(options, root / f"{number}-run")
            command = recipes.arm_command(sys.executable, "train", out, options.config, chosen)
        else:
            command = [options.trl_python, str(Path(__file__).with_name("trl_arm.py")), str(out), str(specification)]
        print(f"{number + 1}/{2 * options.rounds} {arm}", flush=True)
        traces[arm].append(run_arm(command, out, samples=samples, place=None))
    check_lengths(traces, options.tokens)
    ours, theirs = (pool([t.steady(options.warm_up, tail) for t in traces[arm]]) for arm in ("headroom", "trl"))
    result["results"] = {
        "headroom samples/s": interval(ours.samples_per_s),
        "trl samples/s": interval(theirs.samples_per_s),
        "samples/s, headroom over trl": ratio(ours.samples_per_s, theirs.samples_per_s),
        "headroom CPU-s per sample": interval(ours.cpu_s_per_sample),
        "trl CPU-s per sample": interval(theirs.cpu_s_per_sample),
        "CPU-s per sample, headroom over trl": ratio(ours.cpu_s_per_sample, theirs.cpu_s_per_sample),
    } | sync_results(traces["headroom"], options.warm_up)
    result["traces"] = {arm: [dict(t.details) | {"ends": t.ends} for t in found] for arm, found in traces.items()}
    report(root / "result.json", result)


def trl_spec(recipe: Recipe, root: Path, accumulation: int, threads: int) -> dict[str, object]:
    """Return what the TRL arm must hold equal to the recipe, prompts included."""
    kl = recipe.algorithm.kl
    return {
        "model": recipe.model.path,
        "dtype": recipe.model.dtype,
        "dir": str(root / "trl"),
        "steps": recipe.run.steps,
        "samples": recipe.loop.batch_prompts * recipe.sampling.n,
        "n": recipe.sampling.n,
        "tokens": recipe.sampling.max_tokens,
        "kl": 0.0 if kl.where == "none" else kl.coefficient,
        "learning_rate": recipe.learner.optimizer.learning_rate,
        "reward": recipe.reward.components[0].function,
        "accumulation": accumulation,
        "threads": threads,
        "prompts": [list(prompt.messages) for prompt in prompts_of(recipe)],
    }


def check_lengths(traces: dict[str, list[Trace]], tokens: int) -> None:
    """Raise RuntimeError unless both trained on completions of `tokens` tokens: else nothing is comparable."""
    ours = [value for t in traces["headroom"] for _, value in t.details["metrics"]["rollout/length_mean"]]
    theirs = [value for t in traces["trl"] for value in t.details["lengths"]]
    if not all(length == tokens for length in [*ours, *theirs]):
        raise RuntimeError(f"mean lengths differ from {tokens}: headroom {set(ours)}, trl {set(theirs)}")


def sync_results(runs: list[Trace], warm_up: int) -> dict[str, object]:
    """Return seconds and share of weight sync, and the tokens computed again, over the runs."""
    seconds, shares = [], []
    for run in runs:
        steps = dict(run.details["metrics"]["time/step"])
        for version, spent in run.details["metrics"]["sync/seconds"]:
            if version > warm_up and version in steps:
                seconds.append(spent)
                shares.append(spent / steps[version])
    counts = [engine for run in runs for engine in run.details["engines"]]
    return {
        "weight sync s": interval(np.array(seconds)),
        "weight sync, share of the step": interval(np.array(shares)),
        "tokens computed again after preemption": sum(engine["recomputed_tokens"] for engine in counts),
        "engine paused s, all loads": sum(engine["paused_s"] for engine in counts),
    }


if __name__ == "__main__":
    main()
