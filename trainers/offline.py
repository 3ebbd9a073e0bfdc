"""Supervised training before the online loop: SFT, reward models and DPO, by one `fit`."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from configs.errors import UserError
from configs.schema import Offline
from trainers.engine import Process, TrainEngine
from trainers.layout import tree_width
from trainers.microbatch import Bundle, MicroBatch, plan
from trainers.models import ScoreModel, export, load_policy, load_sequence_classifier
from trainers.objectives import (
    Objective,
    Rows,
    dpo_objective,
    pair_lengths,
    pair_logprobs,
    reward_objective,
    sft_objective,
    shared_length,
)
from trainers.results import RESULT, Kind, Result, foreign, load_result, training_hash, wilson
from trainers.rundir import RunDir
from trainers.unfinished import Unfinished, holds, unfinished

Log = Callable[[str], None]
Note = Callable[[int, Mapping[str, float]], None]  # values at an optimizer step
Track = Callable[[RunDir, int], AbstractContextManager[Note]]  # where records lie, and the step they go on after
LOG_EVERY_S = 5.0
_log = logging.getLogger(__name__)


def untracked(directory: RunDir, step: int) -> AbstractContextManager[Note]:
    """Track nothing."""
    return nullcontext(lambda step, metrics: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One training: what is trained on what, and what the loss is once the start weights are loaded."""

    kind: Kind
    config: Offline
    base: str  # start weights
    rows: Rows
    keys: Sequence[str]  # what may not be both trained on and held out
    objective: Callable[[TrainEngine, Unfinished], Objective]
    margins: Sequence[float] | None = None


def fit(
    engine: TrainEngine,
    objective: Objective,
    rows: Sequence[int],
    *,
    epochs: int,
    batch: int,
    token_budget: int,
    seed: int,
    log: Log = _log.info,
    note: Note | None = None,
    begin: int = 0,
    save: Callable[[TrainEngine, int], None] | None = None,
) -> int:
    """Train on `rows` for `epochs`, `batch` rows per optimizer step; return the number of steps. A collective.

    begin: how many of them the engine has taken already; save is offered each later one but the last. The order of
    rows depends on the seed alone. Raises UserError when the loss or its gradient is no number any more.
    """
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(np.asarray(rows)) for _ in range(epochs)]
    batches = [order[start : start + batch] for order in orders for start in range(0, len(order), batch)]
    started, told = time.monotonic(), 0.0
    for done, chosen in enumerate(batches[begin:], begin + 1):
        rate = engine.learning_rate
        loss, norm = _update(engine, objective, [int(row) for row in chosen], token_budget)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            hint = "lower engine.optimizer.learning_rate, or look at the rows"
            raise UserError(
                f"step {done} of {len(batches)}: the loss is {loss}, the norm of its gradient {norm}; {hint}"
            )
        if note:
            note(done, {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": rate})
        if save and done < len(batches):
            save(engine, done)
        elapsed = time.monotonic() - started
        if engine.rank == 0 and (done == len(batches) or elapsed - told >= LOG_EVERY_S):
            told = elapsed
            left = elapsed / (done - begin) * (len(batches) - done)
            log(f"step {done}/{len(batches)}  loss {loss:.4f}  {elapsed:.0f} s, {left:.0f} s left")
    return len(batches)


def _update(engine: TrainEngine, objective: Objective, rows: list[int], token_budget: int) -> tuple[float, float]:
    total = sum(objective.weights[row] for row in rows)
    shares: list[Tensor] = []

    def loss_fn(micro: MicroBatch) -> Tensor:
        losses, _ = objective.losses(engine.model, micro.rows)
        share = losses.sum() / total * micro.counts
        shares.append(share.detach())
        return share

    norm = engine.step(_plan(engine, objective.lengths, rows, token_budget), loss_fn)
    return float(engine.all_sum(torch.stack(shares).sum())), norm


def _plan(engine: TrainEngine, lengths: Sequence[int], rows: Sequence[int], token_budget: int) -> list[MicroBatch]:
    bundles = [Bundle(rows=(row,), length=lengths[row]) for row in rows]
    return plan(bundles, token_budget, engine.world_size)[engine.rank]


@torch.no_grad()
def evaluate(engine: TrainEngine, objective: Objective, rows: Sequence[int], token_budget: int) -> tuple[float, float]:
    """Return the mean loss over `rows` (NaN if there are none) and the sum of what is right. A collective."""
    if not rows:
        return math.nan, 0.0
    sums = torch.zeros(2, dtype=torch.float64)
    for micro in _plan(engine, objective.lengths, rows, token_budget):
        losses, right = objective.losses(engine.model, micro.rows)
        sums += torch.tensor([losses.double().sum(), right.double().sum()], dtype=torch.float64) * micro.counts
    loss, correct = engine.all_sum(sums).tolist()
    return loss / sum(objective.weights[row] for row in rows), correct


@torch.no_grad()
def start_logprobs(engine: TrainEngine, rows: Rows, token_budget: int, *, tree: bool) -> Tensor:
    """Return the log-probs (n, 2) of both completions of DPO's rows under the engine's weights. A collective."""
    sums = torch.zeros(len(rows), 2)
    for micro in _plan(engine, pair_lengths(rows, tree=tree), range(len(rows)), token_budget):
        if micro.counts:
            sums[list(micro.rows)] = pair_logprobs(engine.model, rows, micro.rows, tree=tree).cpu()
    return engine.all_sum(sums)


def train_sft(
    config: Offline,
    base: str,
    rows: Rows,
    keys: Sequence[str] | None = None,
    *,
    process: Process | None = None,
    log: Log = _log.info,
    track: Track = untracked,
) -> Result:
    """Train `base` to imitate; write an HF causal language model to config.output. Skipped if that is there already.

    rows: (prompt (P,), completion (T,)); keys: what may not be both trained on and held out, by default the prompt.
    process: of one rank. A training that was killed goes on. Raises UserError as `fit` does, and if another process
    is at the same output.
    """
    keys = keys or [row[0].tobytes().hex() for row in rows]

    def objective(engine: TrainEngine, kept: Unfinished) -> Objective:
        return sft_objective(rows)

    task = Task(kind="sft", config=config, base=base, rows=rows, keys=keys, objective=objective)
    return _train(task, process or Process(), log, track)


def train_reward(
    config: Offline,
    base: str,
    rows: Rows,
    keys: Sequence[str] | None = None,
    *,
    margins: Sequence[float] | None = None,
    process: Process | None = None,
    log: Log = _log.info,
    track: Track = untracked,
) -> Result:
    """Train a Bradley-Terry reward model; write an HF sequence classifier with one output to config.output.

    Skipped if that is there already. rows: texts (T_k,) of one prompt, best first: pairs, or rankings of any size for
    loss kwise. keys: what may not be both trained on and held out: give the prompts; by default the tokens that all
    texts share at the start. margins (n,): for loss margin. Goes on and raises as `train_sft` does.
    """
    keys = keys or [np.asarray(texts[0][: shared_length(texts)]).tobytes().hex() for texts in rows]
    if config.loss == "margin" and margins is None:
        raise UserError(f"{config.output}: loss margin needs a margin for each pair; take bradley_terry without")
    if config.loss != "kwise" and any(len(texts) != 2 for texts in rows):
        raise UserError(f"{config.output}: rows rank more than two texts; set loss=kwise, or give pairs")
    margins = [config.margin_scale * margin for margin in margins or ()] if config.loss == "margin" else None

    def objective(engine: TrainEngine, kept: Unfinished) -> Objective:
        return reward_objective(rows, tree=_tree(engine, config), margins=margins)

    task = Task(kind="reward", config=config, base=base, rows=rows, keys=keys, objective=objective, margins=margins)
    return _train(task, process or Process(), log, track)


def train_dpo(
    config: Offline,
    base: str,
    rows: Rows,
    keys: Sequence[str] | None = None,
    *,
    process: Process | None = None,
    log: Log = _log.info,
    track: Track = untracked,
) -> Result:
    """Train the policy `base` on preferences; write an HF causal language model to config.output.

    Skipped if that is there already. rows: (prompt (P,), chosen (C,), rejected (R,)); keys as for `train_sft`. The
    reference is `base`: its log-probs are computed once, before the first step, so no second model is in memory.
    Goes on and raises as `train_sft` does.
    """
    keys = keys or [row[0].tobytes().hex() for row in rows]

    def objective(engine: TrainEngine, kept: Unfinished) -> Objective:
        tree = _tree(engine, config)
        reference = kept.once(
            "reference", lambda: start_logprobs(engine, rows, config.engine.token_budget, tree=tree).numpy()
        )
        return dpo_objective(
            rows,
            torch.from_numpy(reference),
            tree=tree,
            loss="ipo" if config.loss == "ipo" else "dpo",
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            length_normalisation=config.length_normalisation,
        )

    task = Task(kind="dpo", config=config, base=base, rows=rows, keys=keys, objective=objective)
    return _train(task, process or Process(), log, track)


def _train(task: Task, process: Process, log: Log, track: Track) -> Result:
    if process.world_size > 1:
        raise ValueError("supervised trainings are of one rank: their checkpoints and locks are")
    config = task.config
    _check_output(config.output, task.base, task.kind)
    digest = training_hash(task.kind, config, task.base, task.rows, task.margins)
    cached = load_result(config.output, digest)
    if cached:
        log(f"{config.output}: trained already with this configuration")
        if not holds(config.output, digest):  # what it does hold, tracking is still to be told
            return cached
    split = _held_out(task)
    if config.holdout > 0 and not split[1]:
        log(f"{config.output}: no prompt fell into holdout={config.holdout:g}; raise it, or nothing is measured")
    with unfinished(config.output, digest, config.checkpoint_every, log) as kept:
        with track(kept.directory, cached.steps if cached else kept.begin) as note:
            result = cached or _trained(task, digest, split, process, kept, log, note)
        kept.end()
    return result


def _check_output(path: str, base: str, kind: Kind) -> None:
    """Refuse an output that would cost the user what lies there: `_write` replaces the whole directory."""
    output = Path(path)
    if output.resolve() == Path(base).expanduser().resolve():
        raise UserError(f"{path}: output is the start weights themselves; give another directory")
    held = None
    if (output / RESULT).is_file():
        held = foreign(output / RESULT, kind)
    elif output.is_file() or (output.is_dir() and any(output.iterdir())):
        held = "something that is no training's result"
    if held:
        raise UserError(f"{path}: holds {held}; give another directory, or empty it")


def _trained(
    task: Task,
    digest: str,
    split: tuple[list[int], list[int]],
    process: Process,
    kept: Unfinished,
    log: Log,
    note: Note,
) -> Result:
    """Train from the latest checkpoint on, and write the model."""
    config, (train, holdout) = task.config, split
    started = time.monotonic()
    torch.manual_seed(config.seed)
    budget, steps = config.engine.token_budget, config.epochs * math.ceil(len(train) / config.batch)
    model = _model(task.kind, task.base, config)
    engine = TrainEngine(model, config.engine, dtype=config.dtype, total_steps=steps, seed=config.seed, process=process)
    objective = task.objective(engine, kept)
    before = float(kept.once("loss_before", lambda: evaluate(engine, objective, holdout, budget)[0]))
    if kept.latest is None:
        note(0, {"holdout/loss": before} if holdout else {})
    else:
        engine.load(kept.latest)
        log(f"{config.output}: goes on after step {kept.begin} of {steps}")
    fit(
        engine,
        objective,
        train,
        epochs=config.epochs,
        batch=config.batch,
        token_budget=budget,
        seed=config.seed,
        log=log,
        note=note,
        begin=kept.begin,
        save=kept.save,
    )
    loss, correct = evaluate(engine, objective, holdout, budget)
    scored = task.kind != "sft" and bool(holdout)
    low, high = wilson(correct, len(holdout)) if scored else (None, None)
    result = Result(
        kind=task.kind,
        loss=loss,
        loss_before=before,
        accuracy=correct / len(holdout) if scored else None,
        accuracy_low=low,
        accuracy_high=high,
        rows=len(train),
        holdout_rows=len(holdout),
        steps=steps,
        seconds=time.monotonic() - started,
        config_hash=digest,
    )
    reached = {"holdout/loss": loss, "holdout/accuracy": result.accuracy}
    note(steps, {name: value for name, value in reached.items() if value is not None and holdout})
    _write(engine, Path(config.output), task.base, result)
    return result


def _held_out(task: Task) -> tuple[list[int], list[int]]:
    """Return the rows to train on and those held out; rows of one key are on one side."""
    held = {key for key in task.keys if _fraction(key, task.config.seed) < task.config.holdout}
    train = [i for i, key in enumerate(task.keys) if key not in held]
    if not train:
        raise UserError(
            f"{task.config.output}: none of {len(task.rows)} rows is left to train on; lower holdout or add rows"
        )
    return train, [i for i, key in enumerate(task.keys) if key in held]


def _tree(engine: TrainEngine, config: Offline) -> bool:
    """Whether the texts of a row may lie in one row of the forward pass."""
    return config.engine.share_prompts and tree_width(engine.hf) is not None


def _model(kind: Kind, base: str, config: Offline) -> nn.Module:
    if kind != "reward":
        return load_policy(base, config.dtype)
    hf = load_sequence_classifier(base, config.dtype, head="random")
    if hf.config.pad_token_id is None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        pad = tokenizer.pad_token_id
        hf.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return ScoreModel(hf)


def _write(engine: TrainEngine, output: Path, base: str, result: Result) -> None:
    """Put the model at `output` complete or not at all."""
    state = engine.state_dict()
    if engine.rank == 0:
        partial = output.with_name(output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        export(engine.hf, state, partial, base)
        told = {name: None if value != value else value for name, value in asdict(result).items()}  # JSON has no NaN
        (partial / RESULT).write_text(json.dumps(told, indent=2) + "\n")
        shutil.rmtree(output, ignore_errors=True)
        os.replace(partial, output)


def _fraction(key: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64
