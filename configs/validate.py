"""What can be known to be wrong before anything starts: one function, one line for each mistake."""

import ast
import importlib
import importlib.util
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from configs.algorithms import FACTS, check, check_action
from configs.checks import (
    check_data,
    check_loss,
    check_options,
    check_outputs,
    check_sampled_distribution,
    check_source,
    check_unique,
)
from configs.errors import UserError
from configs.formats import parse_rows, refusal
from configs.machine import check_machine
from configs.rows import is_file, prompt_text, read_rows, split_of
from configs.schema import Data, EvalScorer, Offline, Recipe, RewardComponent, SamplingParams

Command = Literal["demo", "train", "sft", "reward", "dpo", "eval"]
ROWS_CHECKED = 5000  # of each file; the rest is checked by the same code when it is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Makers:
    """Where a model or file that is missing comes from."""

    outputs: Mapping[str, str]  # path -> the command that makes it
    later: bool  # run.prepare makes what is missing before anything is read
    hint: str  # for what no command is known to make; empty: none


def validate(recipe: Recipe, command: Command, config: str = "CONFIG") -> list[str]:
    """Return warnings about a recipe that is about to be run by `command`; `config` is its file, for hints.

    Raises UserError for the first mistake found. Runs no user code, but modules whose source hides the function.
    """
    online = command in ("train", "demo")
    if online:
        _check_method(recipe)
        _check_rewards(recipe)
    if online or command == "eval":
        _check_evaluation(recipe, command)
    offline = _offline(recipe, command)
    consumers = dict(_data(recipe, command, offline))
    for key, data in consumers.items():
        _check_split(key, data)
    for key, name in _functions(recipe, command):
        _check_function(key, name)
    if command != "demo":  # which makes its own models and data
        makers = _makers(recipe, online, config)
        _check_models(recipe, command, offline, makers)
        for key, data in consumers.items():
            _check_rows(key, data, makers)
    check_machine(
        recipe,
        vllm=online or command == "eval",
        deepspeed=command != "eval",
        actors=online,
    )
    return list(_warnings(recipe)) if online else []


def _check_method(recipe: Recipe) -> None:
    algorithm, sampling, loop = recipe.algorithm, recipe.sampling, recipe.loop
    kl = algorithm.kl
    refusal = check(
        algorithm.name,
        kl.where,
        kl.estimator,
        sampling.n,
        kl_coefficient=kl.coefficient,
        normalise=algorithm.normalise,
        entropy_bonus=algorithm.entropy_bonus,
    )
    if refusal := refusal or check_action(recipe.alarm.action, kl.where, kl.coefficient):
        raise UserError(refusal)
    check_options(algorithm)
    if algorithm.name == "rft" and algorithm.best >= sampling.n:
        raise UserError(f"algorithm.best: {algorithm.best} of {sampling.n} completions would all be imitated; lower it")
    if recipe.reference.refresh_every is not None and kl.where == "none":
        raise UserError("reference.refresh_every: algorithm.kl.where=none has no reference; leave it out")
    ranks = math.lcm(recipe.learner.ranks, recipe.critic.ranks if FACTS[algorithm.name].needs_critic else 1)
    rollouts, parts = loop.batch_prompts * sampling.n, algorithm.minibatches * ranks
    if rollouts % parts:
        step = parts // math.gcd(parts, sampling.n)
        below = loop.batch_prompts // step * step
        raise UserError(
            f"loop.batch_prompts: {loop.batch_prompts} prompts x {sampling.n} completions = {rollouts} rollouts do not "
            f"divide by algorithm.minibatches x ranks = {algorithm.minibatches} x {ranks}; the nearest that do: "
            f"loop.batch_prompts={f'{below} or {below + step}' if below else step}"
        )
    check_sampled_distribution(sampling)
    _check_room(recipe, "sampling", sampling)


def _check_room(recipe: Recipe, key: str, sampling: SamplingParams) -> None:
    if sampling.max_tokens >= recipe.model.max_length:
        raise UserError(
            f"{key}.max_tokens: {sampling.max_tokens} leave no room for a prompt in model.max_length "
            f"{recipe.model.max_length}; lower it or raise model.max_length"
        )


def _check_rewards(recipe: Recipe) -> None:
    if not recipe.reward.components:
        raise UserError("reward.components: there is no reward to train on; add a component with a model or a function")
    check_unique("reward.components", [component.name for component in recipe.reward.components])
    for i, component in enumerate(recipe.reward.components):
        check_source(f"reward.components.{i}", component)


def _check_evaluation(recipe: Recipe, command: Command) -> None:
    tasks = recipe.evaluation.tasks
    if command == "eval" and not tasks:
        raise UserError("evaluation.tasks: there is nothing to evaluate; add a task with data and scorers")
    check_unique("evaluation.tasks", [task.name for task in tasks])
    for i, task in enumerate(tasks):
        key = f"evaluation.tasks.{i}"
        check_unique(f"{key}.scorers", [scorer.name for scorer in task.scorers])
        for j, scorer in enumerate(task.scorers):
            check_source(f"{key}.scorers.{j}", scorer)
        _check_room(recipe, f"{key}.sampling", task.sampling)
    primary = recipe.evaluation.primary
    metrics = [f"{task.name}/{scorer.name}" for task in tasks for scorer in task.scorers]
    if primary is not None and primary not in metrics:
        raise UserError(f"evaluation.primary: no metric {primary!r}; {suggest(primary, metrics)}")


def _offline(recipe: Recipe, command: Command) -> dict[str, Offline]:
    """Return the supervised trainings of `command` by key."""
    if command == "sft":
        if recipe.sft is None:
            raise UserError("sft: the recipe has no such section; add one with output and data")
        trainings = {"sft": recipe.sft}
    elif command == "reward":
        if not recipe.reward_models:
            raise UserError("reward_models: the recipe names none; add an entry with output and data")
        trainings = {f"reward_models.{name}": training for name, training in recipe.reward_models.items()}
    elif command == "dpo":
        if recipe.dpo is None:
            raise UserError("dpo: the recipe has no such section; add one with output and data")
        trainings = {"dpo": recipe.dpo}
    else:
        return {}
    check_outputs(recipe)
    for key, training in trainings.items():
        check_loss(key, training, command)
        if training.engine.ranks > 1:
            raise UserError(
                f"{key}.engine.ranks: {training.engine.ranks} ranks, but headroom {command} trains in one process; "
                f"set {key}.engine.ranks=1"
            )
        check_data(key, training, command)
    return trainings


def _data(recipe: Recipe, command: Command, offline: dict[str, Offline]) -> Iterator[tuple[str, Data]]:
    if command in ("train", "demo"):
        yield "data", recipe.data
    if command in ("train", "demo", "eval"):
        yield from ((f"evaluation.tasks.{i}.data", task.data) for i, task in enumerate(recipe.evaluation.tasks))
    yield from ((f"{key}.data", training.data) for key, training in offline.items())


def _scorers(recipe: Recipe, command: Command) -> Iterator[tuple[str, RewardComponent | EvalScorer]]:
    if command in ("train", "demo"):
        yield from ((f"reward.components.{i}", component) for i, component in enumerate(recipe.reward.components))
    if command in ("train", "demo", "eval"):
        for i, task in enumerate(recipe.evaluation.tasks):
            yield from ((f"evaluation.tasks.{i}.scorers.{j}", scorer) for j, scorer in enumerate(task.scorers))


def _functions(recipe: Recipe, command: Command) -> Iterator[tuple[str, str]]:
    if recipe.run.prepare is not None:
        yield "run.prepare", recipe.run.prepare
    for key, scorer in _scorers(recipe, command):
        if scorer.function is not None:
            yield f"{key}.function", scorer.function


def _check_function(key: str, name: str) -> None:
    module_name, _, attribute = name.partition(":")
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise UserError(f"{key}: {name!r} is not of the form module:function, for example my_rewards:brevity")
    try:
        if attribute in _defined(module_name):
            return
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise UserError(
            f"{key}: cannot import {module_name} ({type(error).__name__}: {' '.join(str(error).split())[:120]}); "
            "is it in the directory headroom is started from?"
        ) from error
    if not callable(getattr(module, attribute, None)):
        functions = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise UserError(f"{key}: {module_name} has no function {attribute!r}; {suggest(attribute, functions)}")


def _defined(module: str) -> set[str]:
    """Return the functions a module's source defines; its own imports may be heavy, so it is not run for this."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {module!r}")
    if not spec.origin or not spec.origin.endswith(".py"):
        return set()
    tree = ast.parse(Path(spec.origin).read_bytes(), filename=spec.origin)
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def _check_split(key: str, data: Data) -> None:
    if wrong := refusal(data):
        raise UserError(f"{key}.{wrong}")
    if any(share < 0 for share in data.splits.values()) or math.fsum(data.splits.values()) > 1 + 1e-9:
        raise UserError(
            f"{key}.splits: shares are not negative and add up to at most 1, not "
            f"{math.fsum(data.splits.values()):g}; lower them"
        )
    if data.split is not None and data.split not in data.splits:
        raise UserError(f"{key}.split: no split {data.split!r}; {suggest(data.split, list(data.splits))}")


def _makers(recipe: Recipe, online: bool, config: str) -> Makers:
    outputs = {training.output: f"headroom reward {config}" for training in recipe.reward_models.values()}
    for name, training in {"sft": recipe.sft, "dpo": recipe.dpo}.items():
        if training is not None:
            outputs[training.output] = f"headroom {name} {config}"
    if recipe.run.prepare is None:
        return Makers(outputs=outputs, later=False, hint="")
    # Its sft and reward_models say how run.prepare trains; their inputs are made by it too.
    hint = f"if run.prepare makes it, run this once: headroom train {config}"
    return Makers(outputs={}, later=online, hint=hint)


def _check_rows(key: str, data: Data, makers: Makers) -> None:
    if is_file(data.path) and not os.path.exists(data.path) and makers.hint:
        if makers.later:
            return
        raise UserError(f"{key}.path: no data file {data.path}; {makers.hint}")
    if not is_file(data.path):
        if _looks_local(data.path):
            raise UserError(
                f"{key}.path: {data.path!r} is not a .jsonl, .jsonl.gz, .csv or .parquet file; give one of these, or a "
                "public dataset id"
            )
        return
    try:
        rows = parse_rows(islice(read_rows(data.path), ROWS_CHECKED), data)
        splits = Counter(split_of(prompt_text(row.messages), data.splits) if data.split else None for row in rows)
        seen = 0 if splits[data.split] else sum(1 for _ in islice(read_rows(data.path), ROWS_CHECKED))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if 0 < seen < ROWS_CHECKED:
        split = f" in split {data.split!r}" if data.split else ""
        raise UserError(f"{key}: none of the {seen} rows of {data.path} is usable{split}; check format and splits")


def _check_models(recipe: Recipe, command: Command, offline: dict[str, Offline], makers: Makers) -> None:
    policies = {"model.path": recipe.model.path}
    if offline:
        policies = {
            f"{key}.base" if t.base else "model.path": t.base or recipe.model.path for key, t in offline.items()
        }
    chat = any(data.render == "chat" for _, data in _data(recipe, command, offline))
    for key, path in policies.items():
        directory = _check_model(key, path, makers)
        if directory is not None and chat and command != "reward":
            _check_chat_template(key, directory)
        if directory is not None and key == "model.path" and not offline:
            _check_context(recipe, directory)
    for key, scorer in _scorers(recipe, command):
        if scorer.model is not None:
            directory = _check_model(f"{key}.model", scorer.model, makers)
            if scorer.reference is None:
                _check_one_output(f"{key}.model", directory)
            else:
                _check_model(f"{key}.reference", scorer.reference, makers)
    if command in ("train", "demo"):
        for key, start in {"reference.path": recipe.reference.path, "critic.path": recipe.critic.path}.items():
            if start is not None:
                _check_model(key, start, makers)


def _check_model(key: str, path: str, makers: Makers) -> Path | None:
    """Return the local directory of a model, None if it will be made or downloaded."""
    directory = Path(path).expanduser()
    if makers.later and not (directory / "config.json").is_file() and _looks_local(path):
        return None
    if not directory.is_dir():
        if path in makers.outputs:
            raise UserError(f"{key}: no model at {path}; make it with: {makers.outputs[path]}")
        if _looks_local(path):
            hint = "make it with: make smollm2" if "smollm2" in path.lower() else "correct the path or give a public id"
            raise UserError(f"{key}: no model at {path}; {makers.hint or hint}")
        cached = _cached(path)
        if cached is None and os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"{key}: {path} is not in the local cache, HF_HUB_OFFLINE is set; give a local path")
        return cached
    if not (directory / "config.json").is_file():
        raise UserError(f"{key}: {path} holds no config.json; give a directory in Hugging Face format")
    return directory


def _looks_local(path: str) -> bool:
    named = path.startswith(("/", "./", "../", "~", "models/", "runs/", ".cache/")) or path in (".", "..")
    return named or os.path.exists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def _cached(model: str) -> Path | None:
    """Return the newest snapshot of a public model in the Hugging Face cache."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    found = (hub / f"models--{model.replace('/', '--')}").glob("snapshots/*/config.json")
    return max((config.parent for config in found), key=lambda snapshot: snapshot.stat().st_mtime, default=None)


def _check_chat_template(key: str, directory: Path) -> None:
    config = _json(key, directory / "tokenizer_config.json")
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if not config.get("chat_template") and not any((directory / name).exists() for name in files):
        raise UserError(
            f"{key}: the tokenizer in {directory} has no chat template, and data.render=chat needs one; "
            "set data.render=text or take a chat model"
        )


def _check_context(recipe: Recipe, directory: Path) -> None:
    longest = _json("model.path", directory / "config.json").get("max_position_embeddings")
    if isinstance(longest, int) and recipe.model.max_length > longest:
        raise UserError(
            f"model.max_length: {recipe.model.max_length} is beyond the {longest} positions of {directory}; "
            f"set model.max_length={longest} or less"
        )


def _check_one_output(key: str, directory: Path | None) -> None:
    if directory is None:
        return
    config = _json(key, directory / "config.json")
    outputs = len(config.get("id2label") or ()) or config.get("num_labels") or 2  # transformers' default is 2
    if outputs != 1:
        raise UserError(
            f"{key}: {directory} has {outputs} outputs and a reward model has one; "
            "give a sequence-classification model saved with num_labels=1, or with a DPO policy its reference"
        )


def _json(key: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{key}: {path} is not valid JSON ({error}); fetch the model again") from None
    return content if isinstance(content, dict) else {}


def suggest(wrong: str, names: list[str]) -> str:
    """Return a hint at the nearest of `names`, or at all of them."""
    near = get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"


def _warnings(recipe: Recipe) -> Iterator[str]:
    room = recipe.model.max_length - recipe.sampling.max_tokens
    if recipe.data.max_prompt_tokens > room:
        yield f"prompts beyond {room} tokens are left out: model.max_length less sampling.max_tokens"
    if not recipe.evaluation.tasks:
        yield "evaluation.tasks is empty: the reward will be measured, what it stands for will not"
    algorithm = recipe.algorithm
    corrected = algorithm.off_policy.weight != "none" or algorithm.proximal == "behaviour"
    if recipe.loop.staleness and not corrected and not FACTS[algorithm.name].chooses:
        stale = f"loop.staleness={recipe.loop.staleness}"
        yield f"{stale} with algorithm.off_policy.weight=none: stale samples go uncorrected"
    for task in recipe.evaluation.tasks:
        same = (task.data.path, task.data.source_split, task.data.split)
        if same == (recipe.data.path, recipe.data.source_split, recipe.data.split):
            yield f"evaluation task {task.name!r} reads the prompts that are trained on; give it another split"
