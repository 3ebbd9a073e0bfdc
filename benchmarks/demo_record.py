"""What one run of the demo's world came to: its curves, what it said of itself, and what gold truly did.

The run's own evaluations have chosen a version and raised an alarm, so they cannot say how good that was. Each
evaluated version is therefore sampled again after the run, from its checkpoint, on the held-out prompts on which
nothing was chosen. Gold is a function of the text, so all that is left of chance is which prompts and which answers:
the standard errors say how much, and the true curve is estimated by `trainers.mismatch.smoothing`.
"""

import json
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_plan import ANSWERS, SURE
from configs.schema import Recipe
from trainers import gold, spool, world, world_build
from trainers.checkpoint import MANIFEST, name_of
from trainers.checkpoint import save as save_checkpoint
from trainers.mismatch import Curve, from_scores
from trainers.mismatch.findings import to_json
from trainers.mismatch.smoothing import smooth
from trainers.records import read_evaluations
from trainers.rundir import RunDir
from trainers.scoring import Judged, RewardModel
from trainers.sources import read
from trainers.types import Message
from trainers.watcher import alarm_settings, judge_run

BATCH = 128  # prompts at a time
FALLEN = ("parted", "decayed", "broken")
WEIGHTS = Path("policy", "engine", "mp_rank_00_model_states.pt")  # in a checkpoint of one rank without ZeRO
Row = dict[str, Any]


def record(directory: Path, recipe: Recipe) -> Row:
    """Return all that is kept of a finished run. Raises ValueError if it ended before its time."""
    rundir = RunDir(directory)
    status = [one["value"] for one in spool.read(rundir.metrics) if one["kind"] == "status"]
    if status[-1:] != ["FINISHED"]:
        raise ValueError(f"the run was asked to end, or killed: its last status is {status[-1] if status else None}")
    evaluations = read_evaluations(rundir.evaluations)
    if max(evaluations, default=0) < recipe.run.steps:
        raise ValueError(f"the run ended at version {max(evaluations, default=0)} of {recipe.run.steps}")
    settings = alarm_settings(recipe.alarm)
    findings = to_json(judge_run(read(str(directory)), settings))
    said = told(spool.read(rundir.metrics), f"eval/{recipe.evaluation.primary}")
    answers = sample_versions(recipe, weights_of(recipe, rundir), untouched(rundir))
    truth = from_scores("gold", sorted(answers), golds_of(answers))
    return {
        "world": json.loads((Path(recipe.model.path).parent / world_build.MANIFEST).read_text())
        | {"reward_result": json.loads((_reward_model(recipe) / "result.json").read_text())},
        "reward": _training(rundir, "reward/mean", recipe.loop.batch_prompts * recipe.sampling.n),
        "kl": _training(rundir, "kl/reference", None),
        "evaluations": _evaluations(evaluations),
        "told": said,
        "alarm": alarm_of(said),
        "findings": findings,
        "truth": outcome(truth, chosen_by_rule(findings), alarm_of(said)),
        "reward_model": {
            "first": accuracy(recipe, answers[min(answers)]),
            "last": accuracy(recipe, answers[max(answers)]),
        },
    }


def told(records: Iterable[Mapping[str, Any]], primary: str) -> list[Row]:
    """Return what a run said of itself, in order, from its spool.

    Each row: the evaluated version, the version then in training, the state, and since when it was said to be. A
    resume takes back what lies beyond its checkpoint.
    """
    said: list[Row] = []
    evaluated = trained = 0
    state: str | None = None
    for one in records:
        key, value = one.get("key"), one.get("value")
        if key == spool.INCARNATION:
            trained = one["step"]
            said = [row for row in said if row["version"] <= trained]
        elif key == primary:
            evaluated = one["step"]
        elif key == "time/step":
            trained = one["step"]
        elif key == "alarm.state":
            state = None if value == "None" else value
        elif key == "alarm.since_version" and state is not None:
            said.append({"version": evaluated, "trained": trained, "state": state, "since": int(value or 0)})
    return said


def alarm_of(said: Sequence[Row]) -> Row | None:
    """Return the first time that gold was said to have fallen; None: never."""
    return next((row for row in said if row["state"] in FALLEN), None)


def chosen_by_rule(findings: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the version that the run chose, and what simpler rules would have taken."""
    return {"chosen": findings["chosen_version"]} | {one["rule"]: one["version"] for one in findings["rivals"]}


def outcome(truth: Curve, rules: Mapping[str, int | None], alarm: Row | None) -> Row:
    """Return what gold truly did, up to the alarm too, and the share of its gain that each rule's version keeps.

    `truth` has a covariance. The gain is that of the largest smoothed value over the first version as measured, which
    is biased upward by chance, so the shares are biased downward. None where gold did not rise by SURE standard errors.
    """
    if truth.covariance is None or truth.se is None:
        raise ValueError("the true curve needs standard errors")
    smoothed, _ = smooth(truth)
    top = int(np.argmax(smoothed))
    rise, fall = difference(truth, 0, top), difference(truth, -1, top)
    gain = float(smoothed[top] - truth.mean[0])
    places = {int(version): place for place, version in enumerate(truth.versions)}
    at = {rule: places[version] for rule, version in rules.items() if version in places}
    rose = rise["value"] > SURE * rise["se"]
    claim = [places.get(alarm[key]) for key in ("since", "version")] if alarm else []
    return {
        "prompts": truth.prompts,
        "versions": truth.versions.tolist(),
        "mean": truth.mean.tolist(),
        "se": truth.se.tolist(),
        "smoothed": smoothed.tolist(),
        "peak_version": int(truth.versions[top]),
        "rise": rise,
        "fall": fall,
        # What the alarm says: gold at its version is below that at `since`. A resumed copy has not sampled all again.
        "at_alarm": difference(truth, *claim) if claim and None not in claim else None,
        "rose": bool(rose),
        "fell": bool(fall["value"] > SURE * fall["se"]),
        "gain": gain,
        "kept": {rule: float(smoothed[place] - truth.mean[0]) / gain for rule, place in at.items()} if rose else None,
    }


def difference(curve: Curve, before: int, after: int) -> dict[str, float]:
    """Return the mean at place `after` less that at `before`, with its standard error."""
    if curve.covariance is None:
        raise ValueError("a difference needs standard errors")
    weights = np.eye(len(curve.mean))[after] - np.eye(len(curve.mean))[before]
    variance = max(float(weights @ curve.covariance @ weights), 0.0)
    return {"value": float(weights @ curve.mean), "se": math.sqrt(variance)}


def untouched(rundir: RunDir) -> list[world.PromptRow]:
    """Return the held-out prompts on which nothing was chosen: neither by the curve nor by what was evaluated again.

    Raises ValueError if there is none.
    """
    chosen_on = [rundir.evaluations, *(rundir.path / "final").glob("*/again")]
    found = [result for root in chosen_on for results in read_evaluations(root).values() for result in results]
    used = {sample["prompt"] for result in found for sample in result.samples}
    rows = [row for row in world.prompts("heldout", world.size("heldout"), 0) if row["prompt"] not in used]
    if not rows:
        raise ValueError("all held-out prompts were used to choose: none is left to measure on")
    return rows


def weights_of(recipe: Recipe, rundir: RunDir) -> dict[int, Path]:
    """Return where the weights of each evaluated version lie: a checkpoint, or the model that the run began with."""
    found = {version: rundir.checkpoints / name_of(version) for version in read_evaluations(rundir.evaluations)}
    return {
        version: Path(recipe.model.path) if version == 0 else path
        for version, path in sorted(found.items())
        if version == 0 or (path / MANIFEST).is_file()
    }


def sample_versions(
    recipe: Recipe, weights: Mapping[int, Path], rows: Sequence[world.PromptRow]
) -> dict[int, list[tuple[world.PromptRow, list[str]]]]:
    """Return each version's answers to each prompt, ANSWERS in all, sampled as the primary evaluation samples."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    tokens = recipe.evaluation.tasks[0].sampling.max_tokens
    questions = [row["prompt"] for row in rows]
    each = 2 * max(1, round(ANSWERS / len(rows) / 2))  # even: they make pairs
    found = {}
    for version, path in weights.items():
        with TemporaryDirectory() as directory:
            policy = str(path if version == 0 else as_hf(path, recipe.model.path, Path(directory)))
            texts = world_build.sample(policy, tokenizer, questions, each, version, BATCH, tokens)
        found[version] = list(zip(rows, texts, strict=True))
    return found


def as_hf(checkpoint: Path, start: str, directory: Path) -> Path:
    """Write the policy of a checkpoint in HF format; `start` is the model that the run began with."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    # What a run of ours wrote: DeepSpeed pickles more than tensors.
    state = torch.load(checkpoint / WEIGHTS, map_location="cpu", weights_only=False)["module"]
    model.load_state_dict({name.removeprefix("hf."): tensor for name, tensor in state.items()})
    model.save_pretrained(directory)
    return directory


def golds_of(answers: Mapping[int, Sequence[tuple[world.PromptRow, Sequence[str]]]]) -> NDArray[np.float64]:
    """Return gold of each version (n, N), the mean over a prompt's answers."""
    return np.array(
        [
            [np.mean([gold.gold(row["prompt"], text, row) for text in texts]) for row, texts in answers[version]]
            for version in sorted(answers)
        ]
    )


def accuracy(recipe: Recipe, answers: Sequence[tuple[world.PromptRow, Sequence[str]]]) -> Row:
    """Return how often the reward model orders two answers of the policy as gold does, and as the annotators would.

    Two answers of a prompt that differ make a pair, as in what the reward model was trained on; gold must decide it.
    """
    limits = recipe.reward
    model = RewardModel(str(_reward_model(recipe)), max_length=limits.max_length, token_budget=limits.token_budget)
    pairs = [
        (row, pair) for row, texts in answers for pair in zip(texts[::2], texts[1::2], strict=True) if len({*pair}) == 2
    ]
    judged = [
        Judged(messages=(Message(role="user", content=row["prompt"]),), completion=text)
        for row, pair in pairs
        for text in pair
    ]
    scores = np.array(model.score(judged)).reshape(-1, 2)
    golds = np.array([[gold.gold(row["prompt"], text, row) for text in pair] for row, pair in pairs]).reshape(-1, 2)
    rng = random.Random("accuracy")
    bias = world_build.options(recipe).length_bias
    annotators = replace(world_build.ANNOTATORS, length_bias=bias)
    first = [annotators.prefer_first(pair, tuple(of), rng) for (_, pair), of in zip(pairs, golds, strict=True)]
    return agreement(scores, golds, np.array(first, bool))


def agreement(scores: NDArray[np.float64], golds: NDArray[np.float64], first: NDArray[np.bool_]) -> Row:
    """Return in what share of pairs scores (P, 2) order as golds (P, 2) where these differ, and as `first` (P,)."""
    by_score = scores[:, 0] > scores[:, 1]
    decided = golds[:, 0] != golds[:, 1]
    right = by_score[decided] == (golds[decided, 0] > golds[decided, 1])
    return {
        "with_gold": float(right.mean()) if len(right) else None,
        "gold_pairs": len(right),
        "with_annotators": float((by_score == first).mean()) if len(first) else None,
        "pairs": len(first),
    }


def branch(parent: Path, copy: Path, version: int, factor: float) -> None:
    """Copy a run up to its checkpoint of `version`, with the KL coefficient in it times `factor`.

    The coefficient is part of the checkpoint, so that a resume of the copy goes on with the new one. Everything else
    is as a kill right after that checkpoint would have left it; the copy is another run in MLflow.
    """
    mine = ("checkpoints", "artifacts.jsonl", "*.sent", "mlflow_run_id", "uid", "lock", "report", "final", "*.png")
    shutil.copytree(parent, copy, ignore=shutil.ignore_patterns(*mine))
    source = parent / "checkpoints" / name_of(version)
    meta = json.loads((source / MANIFEST).read_text())["meta"]

    def write(target: Path) -> None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        state = torch.load(target / WEIGHTS, map_location="cpu", weights_only=False)
        state["extra"]["kl_coefficient"] *= factor
        torch.save(state, target / WEIGHTS)

    save_checkpoint(copy / "checkpoints", version, write, meta)


def _reward_model(recipe: Recipe) -> Path:
    return Path(next(iter(recipe.reward_models.values())).output)


def _training(rundir: RunDir, key: str, rollouts: int | None) -> Row:
    """Return a training metric by version; with the number of rollouts behind a mean, its standard error."""
    metrics = spool.read_metrics(rundir.metrics)
    points = metrics.get(key, [])
    spread = dict(metrics.get(key.replace("/mean", "/std"), []))
    errors = [spread[version] / math.sqrt(rollouts) for version, _ in points] if rollouts else None
    return {"versions": [version for version, _ in points], "mean": [value for _, value in points], "se": errors}


def _evaluations(found: Mapping[int, Sequence[Any]]) -> dict[str, Row]:
    """Return mean and standard error over the prompts of every metric, by version."""
    curves: dict[str, Row] = {}
    for version, results in sorted(found.items()):
        for result in results:
            for metric, scores in result.scores.items():
                curve = curves.setdefault(f"{result.task}/{metric}", {"versions": [], "mean": [], "se": []})
                curve["versions"].append(version)
                curve["mean"].append(float(np.nanmean(scores)))
                curve["se"].append(float(np.nanstd(scores, ddof=1) / math.sqrt(np.isfinite(scores).sum())))
    return curves
