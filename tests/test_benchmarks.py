"""What the benchmarks measure with: CPU clock and pinning of a process tree, cuts, intervals, equal work."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import compare_trl, recipes
from benchmarks.measure import Trace, interleaved, interval, ratio, run_arm
from configs.errors import UserError
from configs.load import load

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# A child whose second thread waits until it is pinned, then burns a second of CPU time and notes its cores.
CHILD = """
import json, os, sys, threading, time
def burn():
    end = time.monotonic() + 30
    while len(os.sched_getaffinity(0)) > 1 and time.monotonic() < end: time.sleep(0.02)
    began = time.thread_time()
    while time.thread_time() < began + 1: pass
    open(sys.argv[1], 'w').write(json.dumps({'ends': [], 'cores': sorted(os.sched_getaffinity(0))}))
thread = threading.Thread(target=burn); thread.start(); thread.join()
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"


@pytest.mark.timeout(120)
def test_the_clock_counts_children_and_pinning_reaches_their_threads(tmp_path: Path) -> None:
    out, before = tmp_path / "arm.json", os.sched_getaffinity(0)
    core = max(before)
    burn = tmp_path / "burn.py"  # processes are told apart by the first two words of their command
    burn.write_text(CHILD)

    def place(_: psutil.Process, name: str) -> set[int] | None:
        return {core} if "burn" in name else None

    trace = run_arm([sys.executable, "-c", PARENT, str(burn), str(out)], out, samples=4, place=place)
    assert trace.details["cores"] == [core]
    assert trace.clock[-1][1] - trace.clock[0][1] > 0.4, "the child's second of CPU time is missing"
    assert os.sched_getaffinity(0) == before, "pinned more than the arm"


def test_a_failing_arm_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3; see .*arm\.log"):
        run_arm([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "arm.json", samples=1, place=None)


def test_steps_are_cut_at_their_ends_without_warm_up_and_tail() -> None:
    ends = (1.0, 9.0, 10.0, 12.0, 20.0)  # kept: 9, 10, 12
    trace = Trace(ends=ends, samples=4, clock=((0.0, 0.0), (10.0, 20.0), (20.0, 60.0)), details={})
    steps = trace.steady(warm_up=1, tail=1)
    assert steps.samples_per_s.tolist() == [4, 2]
    assert steps.cpu_s_per_sample.tolist() == [0.5, 2]
    with pytest.raises(ValueError, match="leave none"):
        trace.steady(warm_up=3, tail=1)


def test_steps_that_end_together_count_as_one() -> None:
    ends = (0.0, 10.0, 10.001, 20.0, 20.001, 30.0, 30.001)
    trace = Trace(ends=ends, samples=4, clock=((0.0, 0.0), (40.0, 40.0)), details={})
    assert max(trace.steady(0, 0).samples_per_s[3:]) > 1000, "what the median of single steps is made of"
    steps = trace.steady(0, 0, together=2)
    assert steps.samples_per_s == pytest.approx([0.8, 0.8, 0.8], rel=1e-3)
    assert steps.cpu_s_per_sample == pytest.approx([1.25, 1.25, 1.25], rel=1e-3)


def test_intervals_hold_the_median_and_arms_alternate() -> None:
    values = np.random.default_rng(0).normal(10, 1, 200)
    found = interval(values)
    assert found["low"] < found["median"] < found["high"] and found["high"] - found["low"] < 1
    twice = ratio(2 * values, values)
    assert twice["median"] == 2 and twice["low"] < 2 < twice["high"]
    assert interleaved(["a", "b"], 3) == ["a", "b", "b", "a", "a", "b"]


def benchmarked(tmp_path: Path, *words: str) -> Any:
    options = recipes.arguments("").parse_intermixed_args([str(QUICKSTART), *words])
    return load(options.config, recipes.overrides(options, tmp_path))


def test_too_few_steps_are_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = benchmarked(tmp_path, "--steps", "6", "loop.staleness=1")
    with pytest.raises(UserError, match="give --steps 7 or more"):
        recipes.check_steps(recipe, warm_up=3)
    recipes.check_steps(recipe, warm_up=2)


def test_what_trl_cannot_do_alike_is_refused(tmp_path: Path) -> None:
    compare_trl.check_comparable(benchmarked(tmp_path))
    for override, named in {
        "algorithm.minibatches=2": "algorithm.minibatches is 2",
        "algorithm.kl.coefficient=0": "coefficient above 0",
        "sampling.stop=[x]": "sampling.stop",
        "reward.components.0.weight=2": "reward.components",
    }.items():
        with pytest.raises(UserError, match=named):
            compare_trl.check_comparable(benchmarked(tmp_path, override))


def traces(**trl: Any) -> dict[str, list[Trace]]:
    """Two arms that did the same work of 2 steps, except for what `trl` says."""
    metrics = {"rollout/length_mean": [[1, 16], [2, 16]], "rollout/discarded": [[1, 0]], "kl/reference": [[1, 0]]}
    metrics["sync/logprob_gap"] = [[1, 2e-6], [2, 2e-6]]
    ours = {"metrics": metrics}
    theirs = {"lengths": [16, 16], "dtypes": ["torch.float32"], "num_tokens": 2 * 64 * 16 + 8 * 100, "reference": True}
    made = {"headroom": ours, "trl": theirs | trl}
    return {arm: [Trace(ends=(1, 2), samples=64, clock=(), details=details)] for arm, details in made.items()}


def test_unequal_work_is_not_compared(tmp_path: Path) -> None:
    recipe = benchmarked(tmp_path, "run.steps=2", "sampling.max_tokens=16")
    spec = {"kl": 0.02, "prompt_tokens": 100}
    compare_trl.check_equal(traces(), recipe, spec)
    for named, change in {
        "trl: dtypes": {"dtypes": ["torch.bfloat16"]},
        "trl: lengths": {"lengths": [16, 15.5]},
        "trl: prompt and completion tokens": {"num_tokens": 2849},
        "trl: has a reference": {"reference": False},
    }.items():
        with pytest.raises(RuntimeError, match=f"unequal work: {named}"):
            compare_trl.check_equal(traces(**change), recipe, spec)
    inexact = traces()
    inexact["headroom"][0].details["metrics"]["sync/logprob_gap"][1] = [2, 0.02]
    with pytest.raises(RuntimeError, match="unequal work: headroom: float32"):
        compare_trl.check_equal(inexact, recipe, spec)
