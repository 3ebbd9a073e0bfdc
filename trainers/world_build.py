"""Builds the demo's inputs: tokenizer, policy by SFT, preference pairs, reward model, and the data files.

The one module of the training side that knows gold, since the simulated annotators judge by it; learner and reward
model get no more than their choices.
"""

import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from pydantic import Field, ValidationError
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from configs.errors import UserError
from configs.schema import Offline, Recipe, Section
from trainers import gold, world
from trainers.data import load_demonstrations, load_pairs, prompt_ids
from trainers.engine import Process
from trainers.offline import train_reward, train_sft
from trainers.results import RESULT
from trainers.types import Message

Log = Callable[[str], None]
ANNOTATORS = world.Annotators(length_bias=0.08, courtesy_bias=0.0, noise=0.2)
DEMONSTRATIONS = 3_200
PAIRS = 2_000
PAIRS_PER_PROMPT = 3
ANSWER_TOKENS = 48
HELDOUT = 240  # all of the split: 128 to evaluate on, the others to choose the best version and to value it
MANIFEST = "manifest.json"
LOCK = "lock"
_log = logging.getLogger(__name__)
_building: dict[Path, IO[str]] = {}  # what this process has begun to build, and its hold on it


class Options(Section):
    """What `run.prepare_options` may change of the world: what the reward model learns from."""

    pairs: int = Field(PAIRS, ge=1)
    length_bias: float = ANNOTATORS.length_bias


def skeleton(recipe: Recipe) -> None:
    """Write what engines need to start: tokenizer, configs and random weights at every path, and the data files.

    Does nothing if a finished build is there; waits for another process that is building one. From here to the end
    of `prepare` other processes wait. Deterministic in sft.seed. Raises UserError if a section is missing, for an
    option that there is not, or if the build would write among files that are not its own.
    """
    root = _root(recipe)
    options(recipe)  # what is wrong with them is told first
    if is_prepared(recipe) or root in _building:
        return
    _check_places(recipe)
    _begin(root)
    try:
        if is_prepared(recipe):  # by the process that was waited for
            _end(root)
        else:
            _write_skeleton(recipe)
    except BaseException:
        _end(root)
        raise


def _write_skeleton(recipe: Recipe) -> None:
    sft, reward = _sections(recipe)
    root = _root(recipe)
    (root / MANIFEST).unlink(missing_ok=True)
    for trained in (sft.output, reward.output):
        # The place is a training's, but the random weights below must not pass for the trained ones.
        Path(trained).mkdir(parents=True, exist_ok=True)
        (Path(trained) / RESULT).write_text("{}\n")
    tokenizer = world.tokenizer()
    config = world.policy_config(tokenizer)
    torch.manual_seed(sft.seed)
    policy = LlamaForCausalLM(config)
    for directory in (Path(_base(sft, recipe)), Path(recipe.model.path)):
        policy.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(reward.output)
    tokenizer.save_pretrained(reward.output)
    demonstrations = world.demonstrations(DEMONSTRATIONS, sft.seed)
    world.write_jsonl(Path(sft.data.path), [_conversation(row) for row in demonstrations])
    world.write_jsonl(Path(recipe.data.path), world.prompts("rl", world.size("rl"), sft.seed))
    world.write_jsonl(root / "heldout.jsonl", world.prompts("heldout", HELDOUT, sft.seed))


def prepare(recipe: Recipe, log: Log = _log.info) -> None:
    """Train policy and reward model of the demo's world where model.path and the reward component expect them.

    Deterministic in the seeds of the sections sft and reward_models; a finished build of the same recipe and code is
    kept. Raises UserError as `skeleton` does.
    """
    skeleton(recipe)
    root = _root(recipe)
    if root not in _building:
        log("the demo's world is built already")
        return
    try:
        _train(recipe, log)
    finally:
        _end(root)


def _train(recipe: Recipe, log: Log) -> None:
    sft, reward = _sections(recipe)
    tokenizer = world.tokenizer()
    base = _base(sft, recipe)
    log(f"SFT on {DEMONSTRATIONS} demonstrations")
    demonstrations = load_demonstrations(sft.data, tokenizer, sft.max_length).items
    process = Process()
    train_sft(sft, base, [(d.prompt, d.completion) for d in demonstrations], process=process, log=log)
    wanted = options(recipe)
    log(f"sampling {wanted.pairs} preference pairs from the policy")
    annotators = replace(ANNOTATORS, length_bias=wanted.length_bias)
    rows, statistics = preference_rows(sft.output, tokenizer, reward.seed, wanted.pairs, annotators)
    world.write_jsonl(Path(reward.data.path), rows)
    pairs = load_pairs(reward.data, tokenizer, reward.max_length).items
    log("reward model")
    keys = [row["prompt"] for row in rows]
    scored = [(pair.chosen, pair.rejected) for pair in pairs]
    result = train_reward(reward, reward.base or recipe.model.path, scored, keys, process=process, log=log)
    log(f"reward model: accuracy {result.accuracy:.2f} on {result.holdout_rows} held-out pairs")
    manifest = {"hash": world_hash(recipe), "reward_accuracy": result.accuracy, **statistics}
    _write(_root(recipe) / MANIFEST, manifest)


def is_prepared(recipe: Recipe) -> bool:
    """Return whether a finished build of this recipe by this code is there."""
    path = _root(recipe) / MANIFEST
    return path.exists() and json.loads(path.read_text())["hash"] == world_hash(recipe)


def world_hash(recipe: Recipe) -> str:
    """Return a sha256 over everything the build depends on: options, sections of the recipe, and the source."""
    sft, reward = _sections(recipe)
    digest = hashlib.sha256(f"{recipe.model.path}\n{recipe.data.path}\n".encode())
    digest.update(options(recipe).model_dump_json().encode())
    for section in (sft, reward):
        digest.update(section.model_dump_json(exclude={"engine": {"resources", "threads"}}).encode())
    for module in (world, gold, inspect.getmodule(world_hash)):
        assert module is not None
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def preference_rows(
    policy: str,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    number: int = PAIRS,
    annotators: world.Annotators = ANNOTATORS,
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Return judged pairs of the policy's own answers on prompts of the split `pairs`, and statistics on them.

    The two answers of a pair differ and are not empty.
    Statistics: the share of pairs that gold decides where the annotators chose with
    gold, and where they chose the longer answer.
    """
    rng = random.Random(f"annotators-{seed}")
    count, per_prompt = asked(number)
    questions = world.prompts("pairs", count, seed)
    answers = sample(policy, tokenizer, [row["prompt"] for row in questions], 2 * per_prompt, seed)
    rows: list[dict[str, str]] = []
    with_gold, with_longer = [], []
    for row, texts in zip(questions, answers, strict=True):
        for pair in zip(texts[::2], texts[1::2], strict=True):
            if pair[0] == pair[1] or not all(text.strip() for text in pair) or len(rows) == number:
                continue
            golds = (gold.gold(row["prompt"], pair[0], row), gold.gold(row["prompt"], pair[1], row))
            first = annotators.prefer_first(pair, golds, rng)
            rows.append(
                {"prompt": row["prompt"], "topic": row["topic"], "chosen": pair[not first], "rejected": pair[first]}
            )
            with_gold += [(golds[0] > golds[1]) == first] if golds[0] != golds[1] else []
            lengths = [len(text.split()) for text in pair]
            with_longer += [(lengths[0] > lengths[1]) == first] if lengths[0] != lengths[1] else []
    statistics = {name: sum(x) / max(len(x), 1) for name, x in (("with_gold", with_gold), ("with_longer", with_longer))}
    return rows, {"pairs": float(len(rows)), **statistics}


def asked(number: int) -> tuple[int, int]:
    """Return how many prompts are asked for `number` pairs, and how many pairs each: beyond PAIRS more of each prompt.

    Some more than `number` in all, since equal and empty answers are left out.
    """
    per_prompt = PAIRS_PER_PROMPT * math.ceil(number / PAIRS)
    return min(world.size("pairs"), round(1.2 * number / per_prompt) + 1), per_prompt


def sample(
    policy: str,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    n: int,
    seed: int,
    batch: int = 32,
    tokens: int = ANSWER_TOKENS,
) -> list[list[str]]:
    """Return `n` answers of the policy at a path to each question at temperature 1, as plain text."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    return answers_of(model, tokenizer, questions, n, batch, tokens)


@torch.inference_mode()
def answers_of(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    n: int,
    batch: int,
    tokens: int = ANSWER_TOKENS,
) -> list[list[str]]:
    """Return `n` answers to each question, drawn from torch's global generator, `batch` questions at a time."""
    pad = tokenizer.pad_token_id
    answers: list[list[str]] = []
    for start in range(0, len(questions), batch):
        turns = [[Message(role="user", content=question)] for question in questions[start : start + batch]]
        prompts = [prompt_ids(tokenizer, turn, "chat") for turn in turns]
        width = max(map(len, prompts))
        # Padded on the left, so that every answer begins in the same column.
        ids = torch.full((len(prompts), width), pad)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = torch.from_numpy(prompt)
        output = model.generate(
            input_ids=ids, attention_mask=(ids != pad).long(), do_sample=True, top_k=0, num_return_sequences=n,
            max_new_tokens=tokens, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        answers += [texts[i : i + n] for i in range(0, len(texts), n)]
    return answers


def options(recipe: Recipe) -> Options:
    """Return what the recipe changes of the world. Raises UserError for what it cannot change."""
    try:
        return Options.model_validate(recipe.run.prepare_options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("run.prepare_options", *first["loc"])))
        names = ", ".join(Options.model_fields)
        raise UserError(f"{key}: {first['msg']}; the demo's world has the options {names}") from None


def _sections(recipe: Recipe) -> tuple[Offline, Offline]:
    if recipe.sft is None or len(recipe.reward_models) != 1:
        raise UserError("run.prepare: trainers.world_build needs section sft and one entry in reward_models")
    return recipe.sft, next(iter(recipe.reward_models.values()))


def _root(recipe: Recipe) -> Path:
    return Path(recipe.model.path).resolve().parent


def _check_places(recipe: Recipe) -> None:
    """Refuse to write outside the build's own directory, or into one that somebody else has filled."""
    sft, reward = _sections(recipe)
    root = _root(recipe)
    places = {
        "data.path": recipe.data.path,
        "sft.base": _base(sft, recipe),
        "sft.output": sft.output,
        "sft.data.path": sft.data.path,
        "reward_models.*.output": reward.output,
        "reward_models.*.data.path": reward.data.path,
    }
    for key, path in places.items():
        if root not in Path(path).resolve().parents:
            raise UserError(
                f"{key}: {path} is outside {root}, where run.prepare builds the demo's world beside model.path; "
                "give a path inside, or set run.prepare=null to use your own models and data"
            )
    known = (LOCK, MANIFEST)
    if root.exists() and any(root.iterdir()) and not any((root / name).exists() for name in known):
        raise UserError(
            f"model.path: {root} holds other files, and run.prepare would write the demo's world among them; give "
            "model.path in a directory of its own, or set run.prepare=null to use what is there"
        )


def _begin(root: Path) -> None:
    """Hold `root` until `_end` or death; wait for another process that does."""
    root.mkdir(parents=True, exist_ok=True)
    file = (root / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        _log.info("waiting for process %s, which builds %s", file.read().strip() or "unknown", root)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    _building[root] = file


def _end(root: Path) -> None:
    _building.pop(root).close()


def _base(sft: Offline, recipe: Recipe) -> str:
    if sft.base is None or Path(sft.base) == Path(recipe.model.path):
        raise UserError("sft.base: give a path of its own, where the random start weights are written")
    return sft.base


def _conversation(row: world.DemonstrationRow) -> dict[str, object]:
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": turns, "topic": row["topic"]}


def _write(path: Path, content: Mapping[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
