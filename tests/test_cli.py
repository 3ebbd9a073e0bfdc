"""What a user meets: a mistake ends with exit code 2 and one useful line, before anything starts wherever possible."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from ray.cluster_utils import Cluster

from cluster.__main__ import main
from configs.load import load
from configs.validate import Command, validate
from tests.cli_run import Answer, failing_run
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "transformers", "mlflow", "datasets")  # vllm and deepspeed import torch
CHAT = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A mistake: what is typed and lying about, and what the answer must say."""

    argv: Sequence[str] = ("train", "recipe.yaml")
    overrides: Sequence[str] = ()
    files: Mapping[str, str | None] = field(default_factory=dict)  # None: deleted
    environment: Mapping[str, str] = field(default_factory=dict)
    missing_package: str | None = None
    by: str = "at_once"  # the fixture that asks for the answer: at_once, in_a_cluster or in_a_run
    says: Sequence[str]


def over(*overrides: str, says: Sequence[str], **more: Any) -> Case:
    return Case(overrides=overrides, says=says, **more)


MESSAGES = ("data.format=messages", "data.column=messages", "data.path=chat.jsonl")
TASK = """{name: held, data: {path: prompts.jsonl}, sampling: {n: 1, max_tokens: 8},
           scorers: [{name: gold, function: 'rules:brevity'}]}"""
PREPARE = "run.prepare=trainers.world_build:prepare"
CASES = {
    "no command": Case(argv=[], says=["COMMAND", "headroom --help"]),
    "unknown command": Case(argv=["trian"], says=["'trian'", "train", "--help"]),
    "unknown option": Case(argv=["train", "recipe.yaml", "--debgu"], says=["--debgu", "--debug"]),
    "no config": Case(argv=["train", "configs/smolm2_hh.yaml"], says=["no such config file"]),
    "not yaml": Case(files={"recipe.yaml": "run: {name: a\nx"}, says=["recipe.yaml:2", "not valid YAML"]),
    "a list": Case(files={"recipe.yaml": "- a"}, says=["recipe.yaml", "mapping of sections"]),
    "key given twice": Case(files={"recipe.yaml": "run: {name: a}\nrun: {name: b}"}, says=["recipe.yaml:2", "twice"]),
    "required key": Case(files={"recipe.yaml": "run: {name: a}\ndata: {path: d}"}, says=["model is required"]),
    "unknown key in file": Case(
        files={"recipe.yaml": "run:\n  name: a\n  stepps: 3"}, says=["recipe.yaml:3", "run.stepps", "run.steps?"]
    ),
    "unknown key": over("loop.stalness=1", says=["command line", "loop.stalness", "did you mean loop.staleness?"]),
    "key of another section": over("batch_prompts=1", says=["did you mean loop.batch_prompts?"]),
    "unknown key in a list": over("reward.components.0.wieght=1", says=["did you mean reward.components.0.weight?"]),
    "index beyond the list": over("reward.components.7.weight=1", says=["reward.components is a list of 1"]),
    "no equals sign": over("loop.staleness", says=["key=value"]),
    "wrong type": over("loop.staleness=many", says=["loop.staleness", "valid integer", "'many'"]),
    "wrong choice": over("algorithm.kl.where=los", says=["algorithm.kl.where", "'loss'", "'reward'", "'los'"]),
    "value for a section": over("loop=3", says=["loop", "section", "3"]),
    "unknown algorithm": over("algorithm.name=gpro", says=["algorithm.name", "'grpo'"]),
    "group of one": over("sampling.n=1", "algorithm.name=grpo", says=["sampling.n", "n = 1", ">= 2"]),
    "k1 in the loss": over("algorithm.kl.estimator=k1", says=["k1", "estimator=k2", "where=reward"]),
    "no KL to raise": over(
        "alarm.action=raise_kl", "algorithm.kl.where=none", says=["alarm.action", "where=none", "kl.where=loss"]
    ),
    "KL of coefficient 0 to raise": over(
        "alarm.action=raise_kl", "algorithm.kl.coefficient=0", says=["alarm.action", "coefficient=0", "above 0"]
    ),
    "batch does not divide": over(
        "loop.batch_prompts=5", "sampling.n=6", "algorithm.minibatches=4", says=["30", "4 x 1", "batch_prompts=4 or 6"]
    ),
    "batch and ranks": over("loop.batch_prompts=1", "sampling.n=2", "learner.ranks=3", says=["3", "batch_prompts=3"]),
    "top-p": over("sampling.top_p=0.9", says=["top_p=0.9", "allow_truncated_distribution=true"]),
    "top-k": over("sampling.top_k=50", says=["top_k=50", "allow_truncated_distribution=true"]),
    "min-p": over("sampling.extra={min_p: 0.1}", says=["extra.min_p", "allow_truncated_distribution=true"]),
    "greedy": over("sampling.temperature=0", says=["sampling.temperature", "above 0"]),
    "no room for a prompt": over("sampling.max_tokens=64", says=["sampling.max_tokens", "64", "model.max_length"]),
    "beyond the positions": over("model.max_length=4096", says=["model.max_length", "4096", "2048"]),
    "no model": over("model.path=models/none", says=["model.path", "models/none", "public id"]),
    "no model, known recipe": over("model.path=models/smollm2-135m", says=["model.path", "make smollm2"]),
    "not a model": over("model.path=.", says=["model.path", "config.json"]),
    "offline": over(
        "model.path=nobody/nothing", environment={"HF_HUB_OFFLINE": "1"}, says=["nobody/nothing", "HF_HUB_OFFLINE"]
    ),
    "reward model not trained": over(
        "reward.components=[{name: rm, model: runs/rm}]",
        "reward_models={rm: {output: runs/rm, data: {path: pairs.jsonl, format: pairs}}}",
        says=["reward.components.0.model", "runs/rm", "headroom reward recipe.yaml"],
    ),
    "no chat template": Case(files={"policy/tokenizer_config.json": "{}"}, says=["chat template", "data.render=text"]),
    "no chat template, messages": over(
        *MESSAGES,
        files={"policy/tokenizer_config.json": "{}", "chat.jsonl": json.dumps({"messages": CHAT})},
        says=["policy", "no chat template"],
    ),
    "no dataset": over("data.path=nowhere.jsonl", says=["data", "nowhere.jsonl", "no such"]),
    "unknown kind of file": over("data.path=./prompts.txt", says=["./prompts.txt", ".jsonl"]),
    "missing column": over("data.column=question", says=["prompts.jsonl:1", "'question'", "found prompt, answer"]),
    "missing columns of pairs": over("data.format=hh", says=["'chosen'", "found prompt, answer"]),
    "empty dataset": Case(files={"prompts.jsonl": "\n"}, says=["prompts.jsonl", "empty"]),
    "malformed row": Case(files={"prompts.jsonl": '{"prompt": "a"}\n{"prompt": '}, says=["prompts.jsonl:2", "malform"]),
    "row is no object": Case(files={"prompts.jsonl": '{"prompt": "a"}\n\n[1]'}, says=["prompts.jsonl:3", "malformed"]),
    "row of a wrong type": Case(files={"prompts.jsonl": '{"prompt": 3}'}, says=["prompts.jsonl:1", "text", "int 3"]),
    "malformed csv row": over(
        "data.path=p.csv", files={"p.csv": "id,prompt\n1,a\n2,b,c\n"}, says=["p.csv:3", "2 columns", "more"]
    ),
    "malformed turns": over(*MESSAGES, files={"chat.jsonl": '{"messages": [{"role": "user"}]}'}, says=["'content'"]),
    "broken gz": over("data.path=p.jsonl.gz", files={"p.jsonl.gz": "not gzip"}, says=["p.jsonl.gz", "fetch"]),
    "broken parquet": over("data.path=p.parquet", files={"p.parquet": "not parquet"}, says=["p.parquet", "read"]),
    "streaming without a limit": over("data.streaming=true", says=["data.limit", "streaming", "say how many"]),
    "columns not named": over("data.format=columns", says=["data.columns", "prompt: NAME"]),
    "columns of no use": over("data.columns={promt: text}", says=["data.columns.promt", "'prompt'"]),
    "unknown split": over("data.splits={rl: 0.5}", "data.split=rk", says=["data.split", "'rk'", "there are: rl"]),
    "splits beyond one": over("data.splits={a: 0.7, b: 0.7}", says=["data.splits", "1.4"]),
    "empty split": over("data.splits={a: 0.0, b: 1.0}", "data.split=a", says=["none of the 3 rows", "'a'"]),
    "no reward": over("reward.components=[]", says=["reward.components", "add"]),
    "model and function": over("reward.components.0.model=rm", says=["reward.components.0 (brevity)", "both"]),
    "neither model nor function": over("reward.components.0.function=null", says=["reward.components.0", "neither"]),
    "same name twice": over(
        "reward.components=[{name: a, function: 'rules:brevity'}, {name: a, function: 'rules:brevity'}]", says=["'a'"]
    ),
    "two outputs": over("reward.components=[{name: rm, model: policy}]", says=["2 outputs", "num_labels=1"]),
    "three labels": over(
        "reward.components=[{name: rm, model: rm}]",
        files={"rm/config.json": '{"id2label": {"0": "a", "1": "b", "2": "c"}}'},
        says=["reward.components.0.model", "3 outputs"],
    ),
    "no such module": over("reward.components.0.function=nowhere:f", says=["components.0.function", "nowhere"]),
    "no such function": over("reward.components.0.function=rules:brevty", says=["rules", "'brevty'", "'brevity'"]),
    "not module:function": over("reward.components.0.function=brevity", says=["module:function"]),
    "module does not parse": over(
        "reward.components.0.function=bad:f", files={"bad.py": "def f(:"}, says=["cannot import bad", "SyntaxError"]
    ),
    "unknown primary": over(
        f"evaluation.tasks=[{TASK}]",
        "evaluation.primary=held/golf",
        says=["evaluation.primary", "'held/golf'", "'held/gold'"],
    ),
    "nothing to evaluate": Case(argv=["eval", "recipe.yaml"], says=["evaluation.tasks"]),
    "no checkpoint": Case(argv=["eval", "recipe.yaml", "--checkpoint", "runs/none"], says=["--check", "runs/none"]),
    "no run to resume": Case(argv=["train", "recipe.yaml", "--resume", "runs/none"], says=["--resume", "runs/none"]),
    "no sft section": Case(argv=["sft", "recipe.yaml"], says=["sft"]),
    "sft on prompts": Case(
        argv=["sft", "recipe.yaml"],
        overrides=["sft={output: o, data: {path: prompts.jsonl}}"],
        says=["sft.data.format"],
    ),
    "no reward models": Case(argv=["reward", "recipe.yaml"], says=["reward_models"]),
    "unknown reward model": Case(
        argv=["reward", "recipe.yaml", "--only", "proxi"],
        overrides=["reward_models.proxy={output: o, data: {path: pairs.jsonl, format: pairs}}"],
        says=["--only", "'proxi'", "'proxy'"],
    ),
    "ranks of a supervised training": Case(
        argv=["sft", "recipe.yaml"],
        overrides=["sft={output: o, data: {path: pairs.jsonl, format: pairs}, engine: {ranks: 2}}"],
        says=["sft.engine.ranks", "2 ranks", "one process"],
    ),
    "pairs that run.prepare makes": Case(
        argv=["reward", "recipe.yaml"],
        overrides=["reward_models.rm={output: o, data: {path: none.jsonl, format: pairs}}", PREPARE],
        says=["reward_models.rm.data.path", "none.jsonl", "run.prepare", "headroom train recipe.yaml"],
    ),
    "start weights that run.prepare makes": Case(
        argv=["sft", "recipe.yaml"],
        overrides=["sft={output: o, base: ./start, data: {path: pairs.jsonl, format: pairs}}", PREPARE],
        says=["sft.base", "./start", "run.prepare", "headroom train recipe.yaml"],
    ),
    "vllm not installed": Case(missing_package="vllm", says=["vllm is not installed", 'pip install -e ".[cpu]"']),
    "deepspeed not installed": Case(missing_package="deepspeed", says=["deepspeed is not installed", "pip install"]),
    "no compiler": Case(environment={"PATH": ""}, says=["C++ compiler", "g++"]),
    "not enough CPUs": over("generator.resources.cpus=1000", says=["CPU", "generator-0 1000", str(os.cpu_count())]),
    "not enough GPUs": over(
        "learner.resources.gpus=64",
        environment={"CUDA_VISIBLE_DEVICES": "0"},
        says=["GPU", "64", "has 1", "ray.address"],
    ),
    # What it takes actors to find out: in a cluster without room for an engine, and in one whole run.
    "not enough CPUs in a cluster": over(
        "generator.resources.cpus=8",
        "ray.placement_s=1",
        by="in_a_cluster",
        says=["ask for 8.3 CPUs", "has 1 and 0", "add nodes"],
    ),
    "all prompts too long": over(
        "data.max_prompt_tokens=3",
        by="in_a_cluster",
        says=["all 3 prompts are longer than 3 tokens", "shortest", "raise"],
    ),
    "some prompts too long": over(by="in_a_run", says=["1 prompts are longer than 32 tokens and left out"]),
    "reward function raises": over(by="in_a_run", says=["'brevity', sample e0-p3-s", "rules:fails raised KeyError"]),
    "reward function times out": over(by="in_a_run", says=["'brevity', sample e0-p7-s", "fails took longer than 5 s"]),
    "reward function returns NaN": over(by="in_a_run", says=["'brevity', sample e0-p11-s", "rules:fails returned nan"]),
    "reward function fails for all": over(
        by="in_a_run", says=["headroom: error: ", "prompts were discarded", "loop.discard_budget=0.3", "the last: "]
    ),
    "MLflow server unreachable": over(
        by="in_a_run", says=["http://127.0.0.1:", "is not reachable; the run goes on", "takes records again"]
    ),
}


def make_world(root: Path) -> None:
    """Make `root` a directory where `headroom train recipe.yaml` has nothing to complain of."""
    small = {"resources": {"cpus": 0.1}}
    recipe = {
        "run": {"name": "case"},
        "model": {"path": "policy", "max_length": 64, "dtype": "float32"},
        "data": {"path": "prompts.jsonl", "max_prompt_tokens": 32},
        "sampling": {"max_tokens": 32},
        "reward": {"components": [{"name": "brevity", "function": "rules:brevity"}], **small},
        "learner": small,
        "generator": {"kv_cache_gb": 0.25, **small},
        "reference": small,
        "evaluation": {"kv_cache_gb": 0.25, **small},
    }
    files = {
        "recipe.yaml": yaml.safe_dump(recipe),
        "policy/config.json": json.dumps({"max_position_embeddings": 2048}),
        "policy/tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"}),
        "prompts.jsonl": "".join(json.dumps({"prompt": f"question {i}", "answer": "a"}) + "\n" for i in range(3)),
        "pairs.jsonl": json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "rules.py": "def brevity(prompt, completion, row):\n    return -len(completion)\n",
    }
    write(root, files)


def write(root: Path, files: Mapping[str, str | None]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content) if content is not None else path.unlink()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a directory made by `make_world`."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def at_once(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Case], Answer]:
    """Ask in this process, where nothing heavy can be imported."""

    def ask(case: Case) -> Answer:
        write(world, case.files)
        for name, value in case.environment.items():
            monkeypatch.setenv(name, value)
        # None is what Python itself takes for "not importable".
        for name in (*HEAVY, *([case.missing_package] if case.missing_package else [])):
            monkeypatch.setitem(sys.modules, name, None)
        code = main([*case.argv, *case.overrides])
        said = capsys.readouterr().err
        one_line(said, case.says)
        return Answer(code=code, said=said)

    return ask


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[str]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def in_a_cluster(world: Path, small_cluster: str) -> Callable[[Case], Answer]:
    """Ask a process that joins a Ray cluster of one CPU."""
    tiny_model(world / "policy", max_length=64)

    def ask(case: Case) -> Answer:
        done = command(world, *case.argv, f"ray.address={small_cluster}", *case.overrides, timeout_s=300)
        return Answer(code=done.returncode, said=done.stderr)

    return ask


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    world = tmp_path_factory.mktemp("run")
    make_world(world)
    tiny_model(world / "policy", max_length=64)
    return failing_run(world)


@pytest.fixture
def in_a_run(whole_run: Answer) -> Callable[[Case], Answer]:
    """Give the one answer of a run in which all this happened."""
    return lambda case: whole_run


def one_line(text: str, says: Sequence[str]) -> None:
    assert text.startswith("headroom: error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert [fragment for fragment in says if fragment not in text] == [], text


def test_without_a_mistake_there_is_no_error(world: Path) -> None:
    overrides = [f"evaluation.tasks=[{TASK}]", "evaluation.primary=held/gold"]
    for name in ("sft", "dpo", "reward_models.proxy"):
        overrides.append(f"{name}={{output: out-of-{name}, data: {{path: pairs.jsonl, format: pairs}}}}")
    recipe = load("recipe.yaml", overrides)
    for name in get_args(Command):
        warnings = validate(recipe, name)
        assert len(warnings) == (name in ("train", "demo"))  # the task reads the prompts that are trained on


def cases() -> list[Any]:
    slow = [pytest.mark.slow, pytest.mark.timeout(900)]
    return [pytest.param(case, id=name, marks=slow if case.by != "at_once" else []) for name, case in CASES.items()]


@pytest.mark.parametrize("case", cases())
def test_a_mistake_is_answered_in_one_line(case: Case, request: pytest.FixtureRequest) -> None:
    answer: Answer = request.getfixturevalue(case.by)(case)
    assert answer.code == 2, answer.said
    *before, last = answer.said.splitlines()
    assert last.startswith("headroom: error: ") and "Traceback" not in answer.said, answer.said
    assert not [line for line in before if line.startswith("headroom: error: ")]
    told = answer.said + answer.kept
    assert [fragment for fragment in case.says if fragment not in told] == [], told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_metrics_of_steps_without_a_server_arrive_later(whole_run: Answer) -> None:
    assert whole_run.before_server
    assert whole_run.before_server <= whole_run.arrived


@pytest.mark.parametrize("name", ["unknown key", "malformed row", "two outputs", "not enough CPUs"])
def test_the_real_command_answers_within_two_seconds(name: str, world: Path) -> None:
    case = CASES[name]
    write(world, case.files)
    began = time.monotonic()
    answer = command(world, *case.argv, *case.overrides)
    assert time.monotonic() - began < 2
    assert (answer.returncode, answer.stdout) == (2, "")
    one_line(answer.stderr, case.says)


def command(directory: Path, *argv: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = (sys.executable, "-m", "cluster", *argv)
    return subprocess.run(argv, cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout_s)


def test_debug_shows_the_traceback(world: Path) -> None:
    answer = command(world, "train", "recipe.yaml", "--debug", "loop.stalness=1")
    assert answer.returncode != 0 and "Traceback" in answer.stderr and "did you mean" in answer.stderr


@pytest.mark.parametrize("name", ["", "train", "demo", "sft", "reward", "dpo", "eval", "config"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"] if name else ["--help"])
    assert stopped.value.code == 0
    assert f"example: headroom {name}" in capsys.readouterr().out


def test_config_prints_values_with_their_origins(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "recipe.yaml", "--debug", "loop.staleness=0"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("#")[0].strip(): line.split("#")[1].strip() for line in out.splitlines() if "#" in line}
    assert lines["staleness: 0"] == "command line"
    assert lines["batch_prompts: 16"] == "default"
    written = Path("recipe.yaml").read_text().splitlines()
    assert lines["path: policy"] == f"recipe.yaml:{written.index('  path: policy') + 1}"


def test_config_prints_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert "sampling" in json.loads(capsys.readouterr().out)["properties"]
