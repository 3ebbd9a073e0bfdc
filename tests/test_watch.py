"""`headroom watch`: any trainer's run in, state and numbers out; a mistake is one line and exit code 2."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.__main__ import main
from cluster.watch import Watch, follow
from trainers.measured import Columns
from trainers.mismatch import Settings, from_scores, judge
from trainers.mismatch.headroom import headroom_within
from trainers.sources import read

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "mlflow", "pandas")
GOLD = (0.0, 0.4, 0.7, 0.9, 1.0, 1.0, 0.8, 0.5, 0.1, -0.4)  # at versions 0, 10, …: its peak is at 50


def csv(rows: int = 10, header: str = "version,reward,kl,gold,gold_se") -> str:
    lines = [f"{10 * i},{i / 10},{i / 50},{GOLD[i]},0.05" for i in range(rows)]
    return "\n".join([header, *lines, ""])


def jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def scores() -> np.ndarray:
    """Per-prompt scores (10 versions, 200 prompts): easy and hard prompts stay what they are."""
    rng = np.random.default_rng(0)
    return np.array(GOLD)[:, None] + rng.normal(0, 1, 200) + rng.normal(0, 0.3, (10, 200))


def answers(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["watch", *argv, "--once", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    found: dict[str, Any] = json.loads(captured.out)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A mistake: what lies about and what is typed, and what the answer must say."""

    files: Mapping[str, str] = field(default_factory=dict)
    argv: Sequence[str] = ("run.csv",)
    says: Sequence[str]


def of_csv(text: str, *says: str, argv: Sequence[str] = ()) -> Case:
    return Case(files={"run.csv": text}, argv=["run.csv", *argv], says=says)


def of_jsonl(text: str, *says: str) -> Case:
    return Case(files={"run.jsonl": text}, argv=["run.jsonl"], says=says)


ROW = {"version": 0, "reward": 0.1, "gold": [0.1, 0.2]}
CASES = {
    "no source": Case(argv=["nowhere.csv"], says=["nowhere.csv", "no such file or run directory", "mlflow:RUN"]),
    "unknown kind of file": Case(files={"run.txt": "a"}, argv=["run.txt"], says=["run.txt", ".csv", ".jsonl"]),
    "empty file": of_csv("", "run.csv", "empty"),
    "only a header": of_csv("version,reward,gold\n", "empty"),
    "semicolons": of_csv(csv().replace(",", ";"), "run.csv: one column, 'version;reward;kl;gold;gold_se'", "commas"),
    "a column twice": of_csv(csv(header="version,reward,kl,gold,gold"), "run.csv:1", "column gold twice"),
    "too large to compute with": of_csv(csv(1) + "1,0.3,0.1,1e300,0.1\n", "gold is 1e+300 at version 1", "unit"),
    "too large an error": of_csv(csv(1) + "1,0.3,0.1,1,1e300\n", "error of gold is 1e+300 at version 1", "unit"),
    "too small to compute with": of_csv(
        "version,reward,gold,gold_se\n0,1,0,1e-300\n1,1,0.5,1e-300\n", "error of gold is 1e-300 at version 0", "unit"
    ),
    "too large a score": of_jsonl(
        '{"version": 0, "reward": 1, "gold": [1, 1e200]}\n', "score of gold is 1e+200", "unit"
    ),
    "a number of 400 digits": of_jsonl(
        f'{{"version": 0, "reward": 1, "gold": [1, 1{"0" * 399}]}}\n', "score 2 of gold"
    ),
    "a version of 30 digits": of_csv(csv(1) + f"1{'0' * 29},0.3,0.1,1,0.1\n", "row 2", "whole number", "2^53"),
    "too many versions": of_csv(
        "version,reward,gold,gold_se\n" + "".join(f"{i},1,1,1\n" for i in range(5001)), "gold", "5001", "one row in 2"
    ),
    "too many evaluations": of_csv(
        "version,reward,gold,gold_se\n" + "".join(f"{i},1,1,1\n" for i in range(1001)), "gold", "1001", "1000 at most"
    ),
    "a name for no terminal": of_jsonl(jsonl({**ROW, "eval/\x1b[31mred": 1}), "'eval/\\x1b[31mred'", "rename"),
    "nested too deep": of_jsonl("[" * 100_000 + "\n", "run.jsonl:1", "malformed"),
    "no name of a file": Case(argv=["x" * 5000], says=["no such file or run directory"]),
    "short row": of_csv("version,reward,gold\n0,1\n", "run.csv:2", "3 columns", "fewer"),
    "broken JSON": of_jsonl(jsonl(ROW) + '{"version": 1, "rew', "run.jsonl:2", "malformed"),
    "no object": of_jsonl(jsonl(ROW) + "[1]\n", "run.jsonl:2", "malformed", "object"),
    "no evaluations": of_csv("version,reward\n0,1\n", "no evaluations", "version, reward"),
    "evaluations never measured": of_csv("version,reward,gold,gold_se\n0,1,,\n", "no evaluations", "gold"),
    "which evaluation": of_csv("version,reward,gold,length\n0,1,2,3\n", "--eval", "gold, length"),
    "which reward": of_csv("version,score,gold\n0,1,2\n", "--reward", "version, score, gold"),
    "which version": of_csv("iteration,reward,gold\n0,1,2\n", "--version", "iteration, reward, gold"),
    "unknown evaluation": of_csv(
        csv(), "--eval", "golb", "version, reward, kl, gold, gold_se", argv=["--eval", "golb"]
    ),
    "unknown reward": of_csv(csv(), "--reward", "rewart", "version, reward, kl, gold", argv=["--reward", "rewart"]),
    "unknown KL": of_csv(csv(), "--kl", "KL", "version, reward, kl, gold", argv=["--kl", "KL"]),
    "unknown version": of_csv(csv(), "--version", "steps", "version, reward", argv=["--version", "steps"]),
    "NaN": of_csv(csv(3) + "30,0.3,0.1,nan,0.05\n", "run.csv: gold is nan at version 30"),
    "NaN reward": of_csv(csv(3) + "30,nan,0.1,1,0.05\n", "reward is nan at version 30"),
    "NaN among scores": of_jsonl('{"version": 0, "reward": 1, "gold": [1, NaN]}\n', "score 2 of gold is nan", "0"),
    "no number": of_csv(csv(3) + "30,0.3,0.1,high,0.05\n", "gold is 'high' at version 30"),
    "version twice": of_csv(csv(3) + "20,0.3,0.1,1,0.05\n", "version 20 twice", "one row a version"),
    "unordered versions": of_csv(csv(3) + "15,0.3,0.1,1,0.05\n", "version 15 after version 20", "in order"),
    "half a version": of_csv(csv(1) + "0.5,0.3,0.1,1,0.05\n", "row 2", "whole number"),
    "no standard error": of_csv(csv(3) + "30,0.3,0.1,1,\n", "version 30", "gold_se"),
    "other prompts": of_jsonl(
        jsonl(ROW, {"version": 1, "reward": 0.2, "gold": [0.3]}), "2 scores at version 0", "1 at version 1", "same"
    ),
    "scores and numbers": of_jsonl(
        jsonl(ROW, {"version": 1, "reward": 0.2, "gold": 0.3}), "gold is 0.3 at version 1", "list"
    ),
    "no run directory": Case(files={"runs/a/notes.txt": ""}, argv=["runs/a"], says=["runs/a", "no run directory"]),
    "metrics of another program": Case(
        files={"runs/a/metrics.jsonl": jsonl({"loss": 0.5})},
        argv=["runs/a"],
        says=["runs/a/metrics.jsonl:1", "damaged"],
    ),
    "broken metrics": Case(
        files={"runs/a/metrics.jsonl": jsonl({"kind": "tag", "key": "a", "value": "b"}) + '{"kind": "met\n'},
        argv=["runs/a"],
        says=["runs/a/metrics.jsonl:2", "damaged"],
    ),
    "broken record": Case(
        files={
            "runs/a/metrics.jsonl": jsonl({"kind": "tag", "key": "a", "value": "b"}),
            "runs/a/evaluations/version-000010/task.json": "{}",
            "runs/a/evaluations/version-000010/task.samples.jsonl": "",
        },
        argv=["runs/a"],
        says=["runs/a: evaluations/version-000010/task.json", "damaged record"],
    ),
    "run without evaluations": Case(
        files={"runs/a/metrics.jsonl": jsonl({"kind": "tag", "key": "a", "value": "b"})},
        argv=["runs/a"],
        says=["runs/a", "no evaluations so far", "evaluation.tasks"],
    ),
    "more than was planned": of_csv(csv(), "10 evaluated versions", "4 were planned", argv=["--planned", "4"]),
    "two budgets": of_csv(csv(), "one budget", argv=["--kl-budget", "1", "--version-budget", "200"]),
    "KL budget without KL": of_csv(
        csv(header="version,reward,x,gold,gold_se"), "KL budget", "give it", argv=["--kl-budget", "1"]
    ),
    "no KL budget": of_csv(csv(), "KL budget of nan", "above 0", argv=["--kl-budget", "nan"]),
    "margin": of_csv(csv(), "margin -1", argv=["--margin", "-1"]),
    "no number of seconds": of_csv(csv(), "--every", "often", argv=["--every", "often"]),
    "no time between looks": of_csv(csv(), "--every 0", "above 0", argv=["--every", "0"]),
    "unknown option": of_csv(csv(), "--evel", "--eval", argv=["--evel", "gold"]),
    "two sources": of_csv(csv(), "unexpected 'other.csv'", argv=["other.csv"]),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_a_mistake_is_answered_in_one_line(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in case.files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(content)
    refused(["watch", *case.argv, "--once", "--json"], case.says, capsys)


def refused(argv: Sequence[str], says: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("headroom: error: ") and captured.err.count("\n") == 1, captured.err
    assert [part for part in says if part not in captured.err] == [], captured.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("name", ["run.csv", "runs/a/metrics.jsonl"])
def test_what_may_not_be_read_is_one_line(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    (here / name).write_text(csv())
    (here / name).chmod(0)
    source = name if name.endswith(".csv") else "runs/a"
    refused(["watch", source, "--once"], [name, "Permission denied"], capsys)


def test_nothing_heavy_is_imported(here: Path) -> None:
    (here / "run.csv").write_text(csv(4))
    code = f"""
import sys
from cluster.__main__ import main
assert main(["watch", "run.csv", "--once"]) == 0
assert [name for name in {HEAVY} if name in sys.modules] == []
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_csv_is_judged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.csv").write_text(csv())
    found = answers(["run.csv"], capsys)
    verdict = judge(read("run.csv").series)
    assert (found["state"], found["since_version"]) == ("parted", verdict.since_version)
    assert found["evaluation"] == "gold" and found["evaluated_versions"] == list(range(0, 100, 10))
    assert found["minimum_detectable_drop"] == verdict.primary.minimum_detectable_drop
    pairs = {(one["x"], one["y"]) for one in found["correlations"]}
    assert pairs == {("reward", "gold"), ("kl", "gold")} and len(found["correlations"]) == 6
    assert found["reasons"][0] == "reward has no standard error: its own second differences stand in for it"
    value, gain = found["chosen_value"], found["chosen_gain"]
    assert found["chosen_version"] in (40, 50) and value["low"] < 1 < value["high"] and value["sample"] == "curve"
    assert gain["low"] < 1 < gain["high"]
    assert {one["rule"]: one["version"] for one in found["rivals"]}["last"] == 90
    assert "up to version 135" in found["headroom"]["estimand"]


def test_the_headroom_is_within_the_budget_that_is_declared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.csv").write_text(csv())
    series = read("run.csv").series
    for option, budget, oracle in (
        ("--kl-budget", "0.5", headroom_within(series, kl=0.5)),
        ("--version-budget", "100", headroom_within(series, version=100)),
    ):
        found = answers(["run.csv", option, budget], capsys)["headroom"]
        assert (found["answer"], found["low"], found["high"]) == (oracle.answer, oracle.low, oracle.high)
        assert found["estimand"] == oracle.estimand


def test_each_field_is_documented(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.csv").write_text(csv())
    found = answers(["run.csv"], capsys)
    rows = re.findall(r"^\| `([a-z_.]+)` \|", (ROOT / "docs" / "watch.md").read_text(), re.M)
    fields = [*found, *(f"alarms.{key}" for key in found["alarms"][0])]
    fields += [f"alarms.falls.{key}" for key in found["alarms"][0]["falls"][0]]
    fields += [f"correlations.{key}" for key in found["correlations"][0]]
    fields += [f"{part}.{key}" for part in ("chosen_value", "headroom", "proxy_gold_gap") for key in found[part]]
    fields += [f"rivals.{key}" for key in found["rivals"][0]]
    fields += [f"early_warnings.{key}" for key in found["early_warnings"][0]]
    assert sorted(rows) == sorted(fields)


def test_columns_can_be_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.csv").write_text(csv(header="iteration,score,divergence,truth,truth_se"))
    named = ["--version", "iteration", "--reward", "score", "--kl", "divergence", "--eval", "truth", "--margin", "9"]
    found = answers(["run.csv", *named], capsys)
    assert (found["reward"], found["evaluation"], found["state"]) == ("score", "truth", "flattening")
    assert found["alarms"][0]["margin"] == 9


def test_per_prompt_scores_are_paired(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_prompts = scores()
    rows = [{"version": 10 * i, "reward": i / 10, "gold": row.tolist()} for i, row in enumerate(of_prompts)]
    (here / "paired.jsonl").write_text(jsonl(*rows))
    errors = of_prompts.std(1, ddof=1) / np.sqrt(200)
    for row, mean, error in zip(rows, of_prompts.mean(1), errors, strict=True):
        row |= {"gold": mean, "gold_se": error}
    (here / "means.jsonl").write_text(jsonl(*rows))
    paired, unpaired = (answers([f"{name}.jsonl"], capsys) for name in ("paired", "means"))
    assert paired["minimum_detectable_drop"] < 0.6 * unpaired["minimum_detectable_drop"]
    curve = read("paired.jsonl").series.primary
    oracle = from_scores("gold", curve.versions.tolist(), of_prompts)
    assert curve.covariance is not None and oracle.covariance is not None and curve.prompts == 200
    np.testing.assert_allclose(curve.covariance, oracle.covariance, rtol=1e-12)
    assert curve.se is not None
    np.testing.assert_allclose(curve.se, errors, rtol=1e-12)


def test_what_is_undefined_or_was_not_measured_stays_out(here: Path) -> None:
    rows = [{"version": i, "reward": i, "gold": [1.0, i, None, 0.5 * i]} for i in range(3)] + [
        {"version": 3, "reward": 3}
    ]
    (here / "run.jsonl").write_text(jsonl(*rows))
    run = read("run.jsonl")
    assert run.series.primary.versions.tolist() == [0, 1, 2] and run.series.primary.prompts == 3
    assert run.series.reward.versions.tolist() == [0, 1, 2, 3]


DEGENERATE = {
    "one version": [{"version": 0, "reward": 0.1, "gold": [0.1, 0.4]}],
    "two versions": [{"version": i, "reward": 0.1 * i, "gold": [0.1, 0.4 + i]} for i in range(2)],
    "all prompts alike": [{"version": i, "reward": 0.1 * i, "gold": [1.0 * i, 1.0 * i]} for i in range(8)],
    "no standard error": [{"version": i, "reward": 0.1 * i, "eval/gold": 0.5 + i} for i in range(8)],
    "no reward measured": [{"version": i, "reward": None, "gold": row.tolist()} for i, row in enumerate(scores())],
    "reward and evaluation never together": [
        {"version": i, "gold": row.tolist()} if i % 2 else {"version": i, "reward": 0.1 * i}
        for i, row in enumerate(scores())
    ],
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_what_cannot_be_known_is_null_and_has_a_reason(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run.jsonl").write_text(jsonl(*DEGENERATE[name]))
    found = answers(["run.jsonl"], capsys)
    assert any("not enough" in reason for reason in found["reasons"]), found["reasons"]
    assert all((one["estimate"] is None) == (one["not_enough"] is not None) for one in found["correlations"])
    if len(found["evaluated_versions"]) < 3 or name == "no standard error":
        assert (found["state"], found["chosen_version"], found["chosen_value"]) == (None, None, None)
        assert found["headroom"]["answer"] == "not identified" and found["minimum_detectable_drop"] is None
    assert main(["watch", "run.jsonl", "--once"]) == 0
    assert f"{len(found['evaluated_versions'])} evaluations by" in capsys.readouterr().out


def test_several_evaluations_without_a_primary_one_are_noted(here: Path) -> None:
    (here / "run.csv").write_text("step,reward,eval/a,eval/a_se,eval/b,entropy\n0,1,2,.1,3,.5\n1,1,2,.1,3,\n")
    run = read("run.csv")
    assert [curve.name for curve in run.series.evaluations] == ["eval/a", "eval/b"]
    assert run.notes == ("eval/a is taken for the primary evaluation, the first of 2: choose with --eval",)
    assert [(early.kind, early.curve.versions.tolist()) for early in run.early_warnings] == [("entropy", [0])]
    assert read("run.csv", Columns(evaluations=("eval/b",))).notes == ()


def test_a_run_is_shown_again_when_it_has_new_points(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "run.csv"
    path.write_text(csv(4))
    said: list[tuple[str, str]] = []
    changes = [csv(4), csv(4) + "40,0.4", csv(4) + "40,0.4", csv(4) + "40,0.4", csv(5), csv(10)]

    def wait(seconds: float) -> None:
        assert seconds == 10
        said.append(capsys.readouterr())
        if not changes:
            raise KeyboardInterrupt
        path.write_text(changes.pop(0))

    with pytest.raises(KeyboardInterrupt):
        follow(Watch(source=str(path), columns=Columns(), settings=Settings(runs=2000)), wait)
    shown = [re.findall(r"(\d+) evaluations by gold", out) for out, _ in said]
    assert shown == [["4"], [], [], [], [], ["5"], ["10"]]
    assert "parted since version" in said[-1][0] and "aligned" in said[0][0]
    warned = [err for _, err in said if err]
    assert len(warned) == 1 and warned[0].startswith("headroom: warning: ") and "run.csv:6" in warned[0]


@pytest.mark.slow
def test_control_c_ends_it_cleanly(here: Path) -> None:
    (here / "run.csv").write_text(csv(4))
    code = """
import signal, sys
from cluster.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may have it ignored
sys.exit(main(["watch", "run.csv", "--json", "--every", "0.05"]))
"""
    argv = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        argv, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        assert len(json.loads(running.stdout.readline())["evaluated_versions"]) == 4
        (here / "run.csv").write_text(csv(5))
        assert len(json.loads(running.stdout.readline())["evaluated_versions"]) == 5
        running.send_signal(signal.SIGINT)
        assert running.stdout.read() == "" and running.stderr.read() == ""
    assert running.returncode == 130
