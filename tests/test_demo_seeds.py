"""The runs of the demo's world over seeds: what is planned, what is run when, and what is written of it."""

import json
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_plan
from benchmarks.demo_plan import (
    ARMS,
    BETAS,
    BIASES,
    SEEDS,
    TRIAL_SEEDS,
    Job,
    cells,
    jobs,
    leaves,
    placed,
    recipe_of,
)
from benchmarks.demo_queue import GUESS_S, Queue, Results, SkippedError, deadline, hold, select, work
from benchmarks.demo_seeds import Runner
from configs.errors import UserError
from configs.load import load
from trainers.world_build import world_hash

LOOKED_AT = {0, 101, 102, 103, 104}  # docs/world.md


def test_seeds_are_fixed_and_were_never_tried() -> None:
    assert SEEDS == tuple(range(1001, 1021))
    assert not {*SEEDS} & {*TRIAL_SEEDS, *LOOKED_AT}
    assert {job.seed for job in jobs()} == {*SEEDS} and {job.seed for job in jobs(TRIAL_SEEDS)} == {*TRIAL_SEEDS}


def test_every_cell_is_planned_on_its_seeds_once() -> None:
    planned = jobs()
    assert len({job.name for job in planned}) == len(planned) == 2 * 20 + 2 * 5 + 3 * 20 + 11 * 5
    assert [job.cell for job in planned[:40]] == ["demo"] * 20 + ["worlds"] * 20
    assert [job.cell for job in planned[50:73]] == [cell.name for cell in cells()[4:]] + [arm.name for arm in ARMS] * 4
    grid = {(cell.beta, cell.bias) for cell in cells()[4:]}
    assert grid | {demo_plan.DEMO} == {(beta, bias) for beta in BETAS for bias in BIASES}
    # The grid's middle is not run twice: `worlds` has its first seeds, with all that a cell of the grid has.
    assert demo_plan.DEMO not in grid and {job.seed for job in planned if job.cell == cells()[4].name} <= {*SEEDS[:5]}
    assert {(job.parent, job.cell) for job in planned if job.parent} == {
        (f"demo/{seed}", arm.name) for seed in SEEDS for arm in ARMS
    }


def changes(job: Job, out: Path) -> dict[str, Any]:
    """Return what a job's recipe has otherwise than the shipped one, but for places, checkpoints and tracking."""
    mine, shipped = (
        {".".join(map(str, key)): value for key, value in leaves(recipe.model_dump(mode="json"))}
        for recipe in (recipe_of(job, out, out / "run"), load(demo_plan.RECIPE))
    )
    moved = {override.partition("=")[0] for override in placed(out)}
    free = ("run.name", "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "tracking.")
    names = {name for name in mine.keys() | shipped.keys() if mine.get(name) != shipped.get(name)}
    return {name: mine.get(name) for name in names - moved if not name.startswith(free)}


def test_a_cell_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    first = {job.cell: job for job in reversed(jobs())}
    seeded = {"run.seed": 1001, "sft.seed": 1001, "reward_models.helpdesk.seed": 1001}
    assert changes(first["demo"], tmp_path) == {"run.seed": 1001}
    assert changes(first["action-raise-4"], tmp_path) == {"run.seed": 1001}
    assert changes(first["worlds"], tmp_path) == seeded
    assert changes(first["pairs-x10"], tmp_path) == seeded | {"run.prepare_options.pairs": 20_000}
    gold = {"name": "gold", "function": "trainers.gold:gold", "model": None}
    by_gold = {f"reward.components.0.{key}": value for key, value in gold.items() if key != "model"}
    assert changes(first["gold"], tmp_path) == seeded | by_gold
    assert recipe_of(first["gold"], tmp_path, tmp_path).reward.components[0].model is None
    assert changes(first["beta-0.3-bias-0.16"], tmp_path) == seeded | {
        "algorithm.kl.coefficient": 0.3,
        "run.prepare_options.length_bias": 0.16,
    }
    assert changes(first["beta-0.3-bias-0.08"], tmp_path) == seeded | {"algorithm.kl.coefficient": 0.3}


def test_worlds_that_differ_have_a_place_of_their_own_and_nothing_is_left_in_the_cache(tmp_path: Path) -> None:
    root = str(Path(load(demo_plan.RECIPE).model.path).parent)
    hashes: dict[str, set[str]] = {}
    for job in jobs(SEEDS[:2]):
        recipe = recipe_of(job, tmp_path, tmp_path / "run")
        assert not [value for _, value in leaves(recipe.model_dump()) if str(value).startswith(root)]
        assert Path(recipe.model.path).parent == tmp_path / "worlds" / job.world
        hashes.setdefault(job.world, set()).add(world_hash(recipe))
    assert all(len(of_world) == 1 for of_world in hashes.values())
    assert len(hashes) == 1 + 2 * 4  # shipped; for each seed its own, with ten times the pairs, with two other biases
    assert len(set.union(*hashes.values())) == len(hashes)


class Clock:
    """Time that passes when a job is run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, job: Job) -> dict[str, Any]:
        """Take 100 s."""
        self.ran.append(job.name)
        self.now += 100
        return {"truth": {"fell": True, "peak_version": 16}, "alarm": None, "findings": {"chosen_version": 16}}


def queue(path: Path, clock: Clock, which: list[Job], **fields: Any) -> Queue:
    settings: dict[str, Any] = {"deadline": float("inf"), "clock": clock, "kind": lambda job: "any"} | fields
    return Queue(jobs=which, results=Results(path), **settings)


def quiet(_: str) -> None:
    """Say nothing."""


def test_what_has_a_line_is_not_run_again_and_a_failure_only_when_asked(tmp_path: Path) -> None:
    path, clock, three = tmp_path / "results.jsonl", Clock(), list(jobs()[:3])

    def failing(job: Job) -> dict[str, Any]:
        if job is three[1] and clock.ran.count(job.name) == 0:
            clock.ran.append(job.name)
            raise RuntimeError("no memory | left")
        return clock.run(job)

    work(queue(path, clock, three), failing, quiet)
    assert [row["status"] for row in Results(path).rows] == ["done", "failed", "done"]
    assert Results(path).rows[1]["error"] == "RuntimeError: no memory | left"
    with path.open("ab") as file:
        file.write(b'{"job": "demo/1004", "status": "do')  # a kill
    with hold(path):
        work(queue(path, clock, three), failing, quiet)
        assert clock.ran == [job.name for job in three]
        work(queue(path, clock, three, retry=True), failing, quiet)
        work(queue(path, clock, three, retry=True), failing, quiet)
    assert clock.ran == [job.name for job in [*three, three[1]]]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["status"] for row in lines] == ["done", "failed", "done", "done"]
    assert (Results(path).of(three[1].name) or {})["status"] == "done"


def test_two_processes_do_not_add_to_the_same_results(tmp_path: Path) -> None:
    with hold(tmp_path / "results.jsonl"):
        with pytest.raises(UserError, match="another process is adding to it"):
            hold(tmp_path / "results.jsonl")


@pytest.mark.parametrize(("end", "count"), [(GUESS_S - 1, 0), (GUESS_S, 3), (399, 3), (400, 4)])
def test_no_run_is_begun_that_would_not_end_in_time(tmp_path: Path, end: float, count: int) -> None:
    clock = Clock()
    work(queue(tmp_path / "results.jsonl", clock, list(jobs()[:6]), deadline=end), clock.run, quiet)
    assert len(clock.ran) == count and clock.now <= end


def test_the_median_is_that_of_runs_alike(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    assert results.expected_s("arm") == GUESS_S
    for kind, seconds, status in (
        ("arm", 50, "done"),
        ("arm", 70, "done"),
        ("whole", 150, "done"),
        ("arm", 1, "failed"),
    ):
        results.append({"job": "a", "kind": kind, "total_s": seconds, "status": status})
    assert (results.expected_s("arm"), results.expected_s("whole"), results.expected_s("other")) == (60, 150, 70)


def test_an_arm_waits_for_its_parent_and_one_with_nothing_to_do_is_told(tmp_path: Path) -> None:
    path, clock = tmp_path / "results.jsonl", Clock()
    arm, parent = (next(job for job in jobs() if job.cell == cell) for cell in (ARMS[0].name, "demo"))
    assert arm.parent == parent.name
    work(queue(path, clock, [arm]), clock.run, quiet)
    assert not clock.ran and not Results(path).rows

    def run(job: Job) -> dict[str, Any]:
        if job is arm:
            raise SkippedError("its parent raised no alarm")
        return clock.run(job)

    work(queue(path, clock, [arm, parent]), run, quiet)
    assert [(row["job"], row["status"]) for row in Results(path).rows] == [(parent.name, "done"), (arm.name, "skipped")]
    work(queue(path, clock, [arm, parent], retry=True), run, quiet)
    assert len(Results(path).rows) == 2


def test_an_interrupted_run_leaves_no_line_and_no_other_is_begun(tmp_path: Path) -> None:
    path, clock = tmp_path / "results.jsonl", Clock()
    here = queue(path, clock, list(jobs()[:3]))

    def run(job: Job) -> dict[str, Any]:
        here.interrupted.set()
        raise RuntimeError("the run ended with 0")

    work(here, run, quiet)
    assert not Results(path).rows and here.next() is None


def test_two_workers_take_each_job_once(tmp_path: Path) -> None:
    path, clock, both = tmp_path / "results.jsonl", Clock(), threading.Barrier(2)
    here = queue(path, clock, list(jobs()[:4]))

    def run(job: Job) -> dict[str, Any]:
        both.wait(20)  # passes only if two are run at a time
        return clock.run(job)

    threads = [threading.Thread(target=work, args=(here, run, quiet)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(row["job"] for row in Results(path).rows) == sorted(job.name for job in jobs()[:4])


def test_the_end_is_the_next_such_time_of_day() -> None:
    now = datetime(2026, 11, 21, 22, 30)
    assert deadline("23:15", None, now) == datetime(2026, 11, 21, 23, 15).timestamp()
    assert deadline("06:30", None, now) == datetime(2026, 11, 22, 6, 30).timestamp()
    assert deadline(None, 90, now) == datetime(2026, 11, 22, 0, 0).timestamp()
    assert deadline(None, None, now) == float("inf")
    with pytest.raises(UserError, match="HH:MM"):
        deadline("half past six", None, now)


def test_cells_and_seeds_are_chosen_by_name() -> None:
    assert [job.name for job in select(jobs(), ["gold", "demo"], [1002])] == ["demo/1002", "gold/1002"]
    for cells_, seeds in ((["golden"], None), (None, [7])):
        with pytest.raises(UserError, match="not in the plan"):
            select(jobs(), cells_, seeds)


# Leaves what a run leaves that was asked to end in the middle.
ASKED = """
import json, pathlib, sys
[run] = [word.removeprefix("run.dir=") for word in sys.argv if word.startswith("run.dir=")]
pathlib.Path(run).mkdir(parents=True)
lines = ({"kind": "status", "value": value} for value in ("RUNNING", "KILLED"))
pathlib.Path(run, "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""
WAITS = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).touch(); signal.pause()"


def ran(out: Path, command: list[str], timeout_s: float = 60) -> tuple[Queue, Runner]:
    """Return what runs the first job by another command."""
    here = queue(out / "results.jsonl", Clock(), list(jobs()[:1]))
    return here, Runner(out, here.results, timeout_s, [sys.executable, "-c", *command])


@pytest.mark.parametrize(
    ("command", "timeout_s", "says"),
    [
        (["import sys; print('no memory'); sys.exit(3)"], 60, "the run ended with 3"),
        ([WAITS, "/dev/null"], 0.5, "the run was ended after 0 s"),
        (["pass"], 60, "metrics.jsonl"),
        ([ASKED], 60, "its last status is KILLED"),
    ],
)
def test_a_run_that_fails_or_hangs_or_does_not_get_there_is_a_line(
    tmp_path: Path, command: list[str], timeout_s: float, says: str
) -> None:
    here, runner = ran(tmp_path, command, timeout_s)
    work(here, runner.run, quiet)
    [row] = Results(tmp_path / "results.jsonl").rows
    assert row["status"] == "failed" and says in row["error"]
    log = (tmp_path / "logs" / "demo-1001.1.log").read_text()
    assert log == ("no memory\n" if "no memory" in command[0] else "")


def test_runs_that_take_differently_long_are_told_apart(tmp_path: Path) -> None:
    _, runner = ran(tmp_path, [])
    first = {job.cell: job for job in reversed(jobs())}
    kinds = {cell: runner.kind(first[cell]) for cell in ("demo", "worlds", "pairs-x10", "action-continue")}
    assert kinds == {
        "demo": "builds world",
        "worlds": "builds world",
        "pairs-x10": "builds world pairs-20000",
        "action-continue": "arm",
    }
    place = tmp_path / "worlds" / first["worlds"].world
    place.mkdir(parents=True)
    (place / "manifest.json").touch()
    assert runner.kind(first["worlds"]) == runner.kind(first["gold"]) == "world is there"


def test_an_interrupt_ends_the_run_that_there_is(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    here, runner = ran(tmp_path, [WAITS, str(begun)])
    thread = threading.Thread(target=work, args=(here, runner.run, quiet))
    thread.start()
    while not begun.exists():
        assert thread.is_alive()
        thread.join(0.05)
    here.interrupted.set()
    runner.stop()
    thread.join(60)
    assert not thread.is_alive() and not Results(tmp_path / "results.jsonl").rows
