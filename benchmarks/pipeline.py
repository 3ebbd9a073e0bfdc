"""Pipeline efficiency: the run's samples/s over the slower of its two stages alone, on the same cores.

python -m benchmarks.pipeline CONFIG [--shared] [key=value …]
"""

import sys
import time

import psutil

from benchmarks import recipes
from benchmarks.compare_trl import sync_results
from benchmarks.measure import Trace, environment, interleaved, interval, pool, ratio, report, run_arm
from configs.load import load


def main() -> None:
    """Run pipeline, generator alone and learner alone in turn and report."""
    parser = recipes.arguments(main.__doc__ or "")
    parser.add_argument("--generator-core", type=int, default=0)
    parser.add_argument("--other-core", type=int, default=1, help="learner, reference, scorers, driver and Ray")
    parser.add_argument("--shared", action="store_true", help="pin nothing; reported without a goal")
    options = parser.parse_intermixed_args()  # overrides may follow options
    root = options.out.resolve() / time.strftime("pipeline-%Y%m%d-%H%M%S")
    chosen = [*recipes.overrides(options, root / "unused"), "learner.threads=1"]
    recipe = load(options.config, chosen)
    recipes.check_steps(recipe, options.warm_up)
    samples, tail = recipe.loop.batch_prompts * recipe.sampling.n, recipes.tail(recipe)

    def place(_: psutil.Process, name: str) -> set[int]:
        """Put the generator's actor and all below it on its core, everything else on the other."""
        return {options.generator_core if "ray::Generator" in name else options.other_core}

    result = {"environment": environment(), "options": {**vars(options), "out": str(options.out)}}
    arms = ["train", "generator", "learner"]
    traces: dict[str, list[Trace]] = {arm: [] for arm in arms}
    for number, arm in enumerate(interleaved(arms, options.rounds)):
        out = root / f"{number}-{arm}.json"
        mine = [*recipes.overrides(options, root / f"{number}-run"), "learner.threads=1"]
        command = recipes.arm_command(sys.executable, arm, out, options.config, mine)
        print(f"{number + 1}/{len(arms) * options.rounds} {arm}", flush=True)
        traces[arm].append(run_arm(command, out, samples=samples, place=None if options.shared else place))
    # Completions of one length, as many in flight as there are slots: all batches of a round end together.
    together = {"generator": recipe.loop.staleness + 1}
    run, generator, learner = (
        pool([trace.steady(options.warm_up, tail, together.get(arm, 1)) for trace in traces[arm]]) for arm in arms
    )
    rates = {arm: interval(steps.samples_per_s) for arm, steps in zip(arms, (run, generator, learner), strict=True)}
    slower, faster = sorted((generator, learner), key=lambda steps: interval(steps.samples_per_s)["median"])
    result["results"] = {
        "pipeline samples/s": rates["train"],
        "generator alone samples/s": rates["generator"],
        "learner alone samples/s": rates["learner"],
        "pipeline efficiency": ratio(run.samples_per_s, slower.samples_per_s),
        "split balance, slower over faster": ratio(slower.samples_per_s, faster.samples_per_s),
    } | sync_results(traces["train"], options.warm_up)
    result["traces"] = {arm: [dict(t.details) | {"ends": t.ends} for t in found] for arm, found in traces.items()}
    report(root / "result.json", result)


if __name__ == "__main__":
    recipes.command(main)
