"""Headroom beside TRL's GRPOTrainer with HF generate: samples/s and CPU-seconds per sample.

python -m benchmarks.compare_trl CONFIG --trl-python PYTHON [key=value …]
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import recipes
from benchmarks.measure import Trace, environment, interleaved, interval, pool, ratio, report, run_arm
from configs.errors import UserError
from configs.load import load
from configs.schema import Recipe

FLOAT32_GAP = 1e-3  # nats between the log-probs of vLLM and of the learner; 2e-6 seen when both are float32
# What TRL is told, or does by itself, in one way only.
EQUAL = {
    "algorithm.name": "grpo",
    "algorithm.epochs": 1,
    "algorithm.minibatches": 1,
    "algorithm.normalise": "group",
    "algorithm.aggregate": "token",
    "algorithm.kl.target": None,
    "reference.path": None,
    "sampling.stop": [],
    "learner.ranks": 1,
    "learner.optimizer.schedule": "constant",
    "learner.optimizer.warmup_steps": 0,
    "data.render": "chat",
}


def main() -> None:
    """Run both arms in turn and report."""
    parser = recipes.arguments(main.__doc__ or "")
    parser.add_argument("--trl-python", default=sys.executable, help="the interpreter that has trl")
    parser.add_argument("--trl-accumulation", type=int, default=1, help="micro-batches of a TRL step")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of TRL: all the cores it is given")
    options = parser.parse_intermixed_args()  # overrides may follow options
    root = options.out.resolve() / time.strftime("trl-%Y%m%d-%H%M%S")
    chosen = recipes.overrides(options, root / "prompts")
    recipe = load(options.config, chosen)
    check_comparable(recipe)
    recipes.check_steps(recipe, options.warm_up)
    samples, tail = recipe.loop.batch_prompts * recipe.sampling.n, recipes.tail(recipe)
    root.mkdir(parents=True)
    specification = root / "trl.json"
    # In a process of its own: this one stays small and idle beside the arms.
    command = recipes.arm_command(sys.executable, "prompts", specification, options.config, chosen)
    subprocess.run(command, check=True)
    spec = trl_spec(recipe, root, options.trl_accumulation, options.threads) | json.loads(specification.read_text())
    specification.write_text(json.dumps(spec))
    result = {"environment": environment(), "options": {**vars(options), "out": str(options.out)}}
    traces: dict[str, list[Trace]] = {"headroom": [], "trl": []}
    for number, arm in enumerate(interleaved(["headroom", "trl"], options.rounds)):
        out = root / f"{number}-{arm}.json"
        if arm == "headroom":
            mine = recipes.overrides(options, root / f"{number}-run")
            command = recipes.arm_command(sys.executable, "train", out, options.config, mine)
        else:
            command = [options.trl_python, str(Path(__file__).with_name("trl_arm.py")), str(out), str(specification)]
        print(f"{number + 1}/{2 * options.rounds} {arm}", flush=True)
        traces[arm].append(run_arm(command, out, samples=samples, place=None))
    check_equal(traces, recipe, spec)
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
    """Return what the TRL arm must hold equal to the recipe, prompts aside."""
    kl, optimizer = recipe.algorithm.kl, recipe.learner.optimizer
    return {
        "model": recipe.model.path,
        "dtype": recipe.model.dtype,
        "dir": str(root / "trl"),
        "steps": recipe.run.steps,
        "samples": recipe.loop.batch_prompts * recipe.sampling.n,
        "n": recipe.sampling.n,
        "tokens": recipe.sampling.max_tokens,
        "kl": 0.0 if kl.where == "none" else kl.coefficient,
        "temperature": recipe.sampling.temperature,
        "top_p": recipe.sampling.top_p,
        "top_k": recipe.sampling.top_k,
        "clip": [recipe.algorithm.clip_low, recipe.algorithm.clip_high],
        "learning_rate": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "gradient_checkpointing": recipe.learner.gradient_checkpointing,
        "reward": recipe.reward.components[0].function,
        "accumulation": accumulation,
        "threads": threads,
    }


def check_comparable(recipe: Recipe) -> None:
    """Raise UserError if the recipe asks for what TRL's arm does not do."""
    for key, wanted in EQUAL.items():
        value: object = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if value != wanted:
            raise UserError(f"{key} is {value!r}: TRL's arm can only be held equal to {wanted!r}; override it")
    kl, components = recipe.algorithm.kl, recipe.reward.components
    if kl.where == "reward" or (kl.where == "loss" and kl.coefficient == 0):
        raise UserError("algorithm.kl: TRL's arm has a reference only in the loss and only with a coefficient above 0")
    if len(components) != 1 or components[0].function is None or components[0].weight != 1:
        raise UserError("reward.components: both arms take one Python function of weight 1")


def check_equal(traces: dict[str, list[Trace]], recipe: Recipe, spec: Mapping[str, Any]) -> None:
    """Raise RuntimeError unless both arms were seen to do the same work: dtype, steps, prompts, lengths, reference."""
    samples, dtype = recipe.loop.batch_prompts * recipe.sampling.n, recipe.model.dtype
    tokens = recipe.run.steps * samples * recipe.sampling.max_tokens + recipe.sampling.n * spec["prompt_tokens"]
    seen: list[tuple[str, object, object]] = []
    for run in traces["headroom"]:
        metrics = run.details["metrics"]
        lengths = {value for _, value in metrics["rollout/length_mean"]}
        seen += [
            ("headroom: lengths", lengths, {recipe.sampling.max_tokens}),
            ("headroom: steps", len(run.ends), recipe.run.steps),
            ("headroom: discarded prompts", sum(value for _, value in metrics["rollout/discarded"]), 0),
            ("headroom: has a reference", "kl/reference" in metrics, spec["kl"] > 0),
        ]
        if dtype == "float32":  # seen in what vLLM and the learner compute, not only asked for
            exact = max(gap for _, gap in metrics["sync/logprob_gap"]) < FLOAT32_GAP
            seen.append(("headroom: float32 log-probs of generator and learner agree", exact, True))
    for run in traces["trl"]:
        seen += [
            ("trl: lengths", set(run.details["lengths"]), {recipe.sampling.max_tokens}),
            ("trl: dtypes", set(run.details["dtypes"]), {f"torch.{dtype}"}),
            ("trl: steps", len(run.ends), recipe.run.steps),
            ("trl: prompt and completion tokens", run.details["num_tokens"], tokens),
            ("trl: has a reference", run.details["reference"], spec["kl"] > 0),
        ]
    if unequal := [f"{what}: {found} and not {wanted}" for what, found, wanted in seen if found != wanted]:
        raise RuntimeError("the arms did unequal work: " + "; ".join(unequal))


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
    recipes.command(main)
