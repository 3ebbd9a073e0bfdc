"""The studies of training on the demo's world: what is planned, what is kept of a run, and the pages."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import study_report
from benchmarks.demo_plan import SEEDS
from benchmarks.demo_queue import Results
from benchmarks.demo_record import difference
from benchmarks.studies import RATES, STALENESS, WEIGHTS, cells, ended, jobs, part_of, recipe_of, select, stale_name
from configs.algorithms import FACTS
from configs.errors import UserError
from configs.load import load
from trainers.mismatch import from_scores
from trainers.types import InfraError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def test_every_algorithm_and_every_bound_is_planned_on_its_seeds() -> None:
    planned = jobs(SEEDS)
    assert len(planned) == 3 * len(FACTS) + 5 * len(WEIGHTS) * (5 + 3)
    assert {seed for cell, seed in planned if cell.name == "algorithm-rloo"} == {*SEEDS[:3]}
    assert [seed for _, seed in planned] == sorted(seed for _, seed in planned)  # whole seeds first
    recipes = {cell.name: recipe_of(cell, SEEDS[0], Path("/world")) for cell in cells()}
    shipped = load(ROOT / "configs" / "quickstart.yaml")
    assert {recipes[f"algorithm-{name}"].algorithm.name for name in FACTS} == {*FACTS}
    assert recipes["algorithm-grpo"].algorithm == shipped.algorithm
    for rate, value in RATES.items():
        for S in STALENESS[rate]:
            naive, truncated = (recipes[stale_name(S, weights, rate)] for weights in WEIGHTS)
            assert (naive.loop.staleness, naive.learner.optimizer.learning_rate) == (S, value)
            assert naive.algorithm.off_policy.weight == "none" and truncated.algorithm == shipped.algorithm
    assert RATES["slow"] == shipped.learner.optimizer.learning_rate


def test_a_part_is_a_share_of_the_plan() -> None:
    assert part_of("2/3") == (2, 3)
    for wrong in ("3/2", "0/2", "1", "a/b"):
        with pytest.raises(UserError, match="--part"):
            part_of(wrong)


def test_runs_are_selected_by_cell_and_seed() -> None:
    found = select(jobs(SEEDS), ["algorithm-r", "algorithm-ppo"], [SEEDS[2]])
    assert [cell.name for cell, _ in found] == [
        f"algorithm-{name}" for name in FACTS if name[0] == "r" or name == "ppo"
    ]
    assert {seed for _, seed in found} == {SEEDS[2]}
    assert select(jobs(SEEDS), [""], None) == jobs(SEEDS)
    for prefixes, seed in ((["algorithm"], SEEDS[3]), (["algorithm-ppo", "algorithm-mine"], SEEDS[0])):
        with pytest.raises(UserError, match="nothing is planned there; the cells are stale-slow-0-naive, "):
            select(jobs(SEEDS), prefixes, [seed])


def test_a_rise_has_the_error_of_paired_prompts() -> None:
    scores = np.array([[0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 3.5], [2.0, 1.0, 2.0, 5.0]])
    curve = from_scores("gold", [0, 4, 8], scores)
    assert difference(curve, 0, 1) == pytest.approx({"value": 0.5, "se": 0.0}, abs=1e-9)  # every prompt rose alike
    # differences 2, 0, 0, 2: mean 1, standard deviation 1.1547, over 4 prompts
    assert difference(curve, 0, 2) == pytest.approx({"value": 1.0, "se": 1.1547 / 2}, abs=1e-4)


def test_a_run_that_its_own_numbers_end_has_a_line_and_a_dead_engine_ends_the_study() -> None:
    async def fails(error: Exception) -> Any:
        raise ExceptionGroup("loops", [ExceptionGroup("roll_out", [error])])

    row = asyncio.run(ended(fails(FloatingPointError("the gradient is not finite"))))
    assert (row["status"], row["error"]) == ("failed", "FloatingPointError: the gradient is not finite")
    with pytest.raises(ExceptionGroup):
        asyncio.run(ended(fails(InfraError("vLLM's engine process died"))))


def row(cell: str, seed: int, gold: tuple[float, float, float], **fields: Any) -> dict[str, Any]:
    """Return a line of a run with versions 0, 4 and 8, of which 4 was chosen."""
    steps = {"staleness": [0.0] * 4 + [2.0] * 4, "effective_share": [1.0] * 4 + [0.75] * 4, "kl": [0.0] * 7 + [0.3]}
    return {
        "job": f"{cell}/{seed}", "cell": cell, "seed": seed, "status": "done", "commit": "0123456789", "changed": False,
        "versions": [0, 4, 8], "chosen": 4, "rise": {"value": gold[1] - gold[0], "se": 0.05},
        "gold": {"mean": gold, "se": [0.02] * 3}, "reward": {"mean": [-1.0, 0.0, 1.0 + seed % 2], "se": [0.1] * 3},
        "steps": steps | {"truncated_share": [0.0] * 4 + [0.001] * 4},
    } | fields  # fmt: skip


def test_the_page_of_the_algorithms_by_hand() -> None:
    rows = [row("algorithm-rloo", 1001, (0.2, 0.4, 0.1)), row("algorithm-rloo", 1002, (0.2, 0.25, 0.0))]
    page = study_report.algorithms(rows)
    assert (
        "| `rloo` | 0.20 (0.20 to 0.20) | 0.33 (0.25 to 0.40) | 1 of 2 | 4, 4 | 0.05 (0.00 to 0.10) "
        "| 1.50 (1.00 to 2.00) | 0.300 (0.300 to 0.300) |"
    ) in page
    assert any(line.startswith("Not run, or not to the end: grpo: 0 of 3; ") for line in page)
    again = {**rows[1], "chosen": 8}
    failed = {key: rows[0][key] for key in ("cell", "commit", "changed")} | {"job": "algorithm-rloo/1003", "seed": 1003}
    page = study_report.algorithms([*rows, again, failed | {"status": "failed", "error": "ValueError: why"}])
    assert any("| 1 of 2 | 4, 8 |" in line for line in page)  # the last line of a run counts, once
    assert "Failed: algorithm-rloo/1003 (ValueError: why)." in page


def test_the_page_of_stale_rollouts_by_hand(tmp_path: Path) -> None:
    naive, truncated = (stale_name(4, weights, "slow") for weights in WEIGHTS)
    rows = [row(naive, seed, (0.2, 0.4, 0.0)) for seed in SEEDS[:3]]
    ends = zip(SEEDS[:3], (0.1, 0.2, 0.3), strict=True)
    rows += [row(truncated, seed, (0.2, 0.4, end)) for seed, end in ends]
    page = study_report.staleness(rows)
    assert (
        "| 4 | naive | 2.0 (2.0 to 2.0) | 0.40 (0.40 to 0.40) | 4, 4, 4 | 0.00 (0.00 to 0.00) | 1.67 (1.00 to 2.00) "
        "| - | - |"
    ) in page
    [line] = [line for line in page if line.startswith("| 4 | truncated |")]
    assert line.endswith("| 0.7500 (0.7500 to 0.7500) | 0.0010 (0.0010 to 0.0010) |")
    # 0.1, 0.2, 0.3: mean 0.2, 0.1 / √3 times t(0.975, 2) = 4.303
    assert (
        "| truncated less naive | S = 4 | +0.000 [+0.000, +0.000] | +0.200 [-0.048, +0.448] | +0.000 [+0.000, +0.000] |"
    ) in page
    assert "| S = 4 less S = 0 | naive | too few | too few | too few |" in page
    study_report.draw(tmp_path / "staleness.png", rows)
    assert (tmp_path / "staleness.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_pages_say_what_the_lines_say() -> None:
    rows = Results(RESULTS / "studies.jsonl").rows
    assert (RESULTS / "staleness.md").read_text().startswith("\n".join(study_report.staleness(rows)))
    page = (RESULTS / "algorithms.md").read_text().splitlines()
    table = [line for line in study_report.algorithms(rows) if line.startswith("| `")]
    assert table and set(table) <= set(page)
