"""Supervised training before the online loop: SFT and Bradley-Terry reward models, by one `fit`."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from configs.errors import UserError
from configs.schema import Offline
from trainers.engine import Process, TrainEngine
from trainers.layout import sequences, tree_width
from trainers.microbatch import Bundle, MicroBatch, plan
from trainers.models import ScoreModel, export, load_policy, load_sequence_classifier
from trainers.types import Ints

Log = Callable[[str], None]
Rows = Sequence[tuple[Ints, Ints]]
LOG_EVERY_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a supervised training reached on the prompts it did not see; also its `result.json`."""

    kind: str  # sft or reward
    loss: float  # held-out: nats per token (sft), nats per pair (reward); NaN without held-out rows
    loss_before: float  # of the start weights
    accuracy: float | None  # reward: share of held-out pairs in the annotators' order
    accuracy_low: float | None  # Wilson interval, 95 %
    accuracy_high: float | None
    rows: int  # trained on
    holdout_rows: int
    steps: int
    seconds: float
    config_hash: str  # of configuration, start weights and rows: equal hashes are not trained again


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What `fit` minimises: the sum of `losses` over rows, divided by the sum of their weights."""

    lengths: Sequence[int]  # padded tokens that a row takes in the longest place of a micro-batch
    weights: Sequence[float]  # per row: its tokens, or 1
    losses: Callable[[nn.Module, Sequence[int]], tuple[Tensor, Tensor]]  # rows -> loss (b,), whether correct (b,)


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
) -> int:
    """Train on `rows` for `epochs`, `batch` rows per optimizer step; return the number of steps. A collective."""
    generator = np.random.default_rng(seed)
    steps = epochs * math.ceil(len(rows) / batch)
    started, told, done, recent = time.monotonic(), 0.0, 0, 0.0
    for _ in range(epochs):
        order = generator.permutation(np.asarray(rows))
        for start in range(0, len(order), batch):
            recent = _update(engine, objective, [int(row) for row in order[start : start + batch]], token_budget)
            done += 1
            elapsed = time.monotonic() - started
            if engine.rank == 0 and (done == steps or elapsed - told >= LOG_EVERY_S):
                told = elapsed
                left = elapsed / done * (steps - done)
                log(f"step {done}/{steps}  loss {recent:.4f}  {elapsed:.0f} s, {left:.0f} s left")
    return done


def _update(engine: TrainEngine, objective: Objective, rows: list[int], token_budget: int) -> float:
    total = sum(objective.weights[row] for row in rows)
    shares: list[Tensor] = []

    def loss_fn(micro: MicroBatch) -> Tensor:
        losses, _ = objective.losses(engine.model, micro.rows)
        share = losses.sum() / total * micro.counts
        shares.append(share.detach())
        return share

    engine.step(_plan(engine, objective, rows, token_budget), loss_fn)
    return float(engine.all_sum(torch.stack(shares).sum()))


def _plan(engine: TrainEngine, objective: Objective, rows: Sequence[int], token_budget: int) -> list[MicroBatch]:
    bundles = [Bundle(rows=(row,), length=objective.lengths[row]) for row in rows]
    return plan(bundles, token_budget, engine.world_size)[engine.rank]


@torch.no_grad()
def evaluate(engine: TrainEngine, objective: Objective, rows: Sequence[int], token_budget: int) -> tuple[float, int]:
    """Return the mean loss over `rows` (NaN if there are none) and how many are correct. A collective."""
    if not rows:
        return math.nan, 0
    sums = torch.zeros(2, dtype=torch.float64)
    for micro in _plan(engine, objective, rows, token_budget):
        losses, correct = objective.losses(engine.model, micro.rows)
        sums += torch.tensor([losses.double().sum(), correct.sum()], dtype=torch.float64) * micro.counts
    loss, right = engine.all_sum(sums).tolist()
    return loss / sum(objective.weights[row] for row in rows), round(right)


def sft_objective(rows: Rows) -> Objective:
    """Negative log-likelihood of completions, mean over tokens. rows: (prompt (P,), completion (T,))."""

    def losses(model: nn.Module, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch = sequences([rows[i][0] for i in chosen], [rows[i][1] for i in chosen], next(model.parameters()).device)
        logprobs, _ = model(batch)
        return -logprobs.sum(1), torch.zeros(len(chosen))

    return Objective(
        lengths=[len(prompt) + len(completion) for prompt, completion in rows],
        weights=[float(len(completion)) for _, completion in rows],
        losses=losses,
    )


def preference_objective(rows: Rows, *, tree: bool) -> Objective:
    """-log sigmoid(score of chosen - score of rejected). rows: (chosen (C,), rejected (R,)).

    tree: both lie in one row behind what they share at the start. Bradley & Terry 1952; Ouyang et al. 2022, eq. 1 with
    one pair per prompt.
    """

    shared = [_shared(a, b) for a, b in rows]

    def losses(model: nn.Module, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        prompts = [rows[i][0][: shared[i]] for i in chosen for _ in range(2)]
        rests = [text[shared[i] :] for i in chosen for text in rows[i]]
        batch = sequences(prompts, rests, next(model.parameters()).device, bundles=[2] * len(chosen) if tree else None)
        better, worse = model(batch).view(-1, 2).unbind(1)
        return -F.logsigmoid(better - worse), (better > worse).float()

    lengths = [
        len(a) + len(b) - both if tree else 2 * max(len(a), len(b)) for (a, b), both in zip(rows, shared, strict=True)
    ]
    return Objective(lengths=lengths, weights=[1.0] * len(rows), losses=losses)


def train_sft(
    config: Offline,
    base: str,
    rows: Rows,
    keys: Sequence[str] | None = None,
    *,
    process: Process | None = None,
    log: Log = _log.info,
) -> Result:
    """Train `base` to imitate; write an HF causal language model to config.output. Skipped if that is there already.

    rows: (prompt (P,), completion (T,)); keys: what may not be both trained on and held out, by default the prompt.
    """
    keys = keys or [prompt.tobytes().hex() for prompt, _ in rows]
    return _train("sft", config, base, rows, keys, process or Process(), log)


def train_reward(
    config: Offline,
    base: str,
    rows: Rows,
    keys: Sequence[str] | None = None,
    *,
    process: Process | None = None,
    log: Log = _log.info,
) -> Result:
    """Train a Bradley-Terry reward model; write an HF sequence classifier with one output to config.output.

    Skipped if that is there already. rows: (chosen (C,), rejected (R,)); keys: what may not be both trained on and
    held out: give the prompts; by default the tokens that both share at the start.
    """
    keys = keys or [np.asarray(a[: _shared(a, b)]).tobytes().hex() for a, b in rows]
    return _train("reward", config, base, rows, keys, process or Process(), log)


def _train(
    kind: str, config: Offline, base: str, rows: Rows, keys: Sequence[str], process: Process, log: Log
) -> Result:
    config_hash = training_hash(kind, config, base, rows)
    if cached := load_result(config.output, config_hash):
        log(f"{config.output}: trained already with this configuration")
        return cached
    started = time.monotonic()
    torch.manual_seed(config.seed)
    held = {key for key in keys if _fraction(key, config.seed) < config.holdout}
    train = [i for i, key in enumerate(keys) if key not in held]
    holdout = [i for i, key in enumerate(keys) if key in held]
    if not train:
        raise UserError(f"{config.output}: none of {len(rows)} rows is left to train on; lower holdout or add rows")
    budget = config.engine.token_budget
    engine = TrainEngine(
        _model(kind, base, config),
        config.engine,
        dtype=config.dtype,
        total_steps=config.epochs * math.ceil(len(train) / config.batch),
        process=process,
    )
    tree = config.engine.share_prompts and tree_width(engine.hf) is not None
    objective = sft_objective(rows) if kind == "sft" else preference_objective(rows, tree=tree)
    before, _ = evaluate(engine, objective, holdout, budget)
    steps = fit(
        engine,
        objective,
        train,
        epochs=config.epochs,
        batch=config.batch,
        token_budget=budget,
        seed=config.seed,
        log=log,
    )
    loss, correct = evaluate(engine, objective, holdout, budget)
    scored = kind == "reward" and bool(holdout)
    low, high = wilson(correct, len(holdout)) if scored else (None, None)
    result = Result(
        kind=kind,
        loss=loss,
        loss_before=before,
        accuracy=correct / len(holdout) if scored else None,
        accuracy_low=low,
        accuracy_high=high,
        rows=len(train),
        holdout_rows=len(holdout),
        steps=steps,
        seconds=time.monotonic() - started,
        config_hash=config_hash,
    )
    _write(engine, Path(config.output), base, result)
    return result


def _model(kind: str, base: str, config: Offline) -> nn.Module:
    if kind == "sft":
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
        (partial / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
        shutil.rmtree(output, ignore_errors=True)
        os.replace(partial, output)


def load_result(output: str | Path, config_hash: str) -> Result | None:
    """Return the result at `output` if it came from the same configuration, start weights and rows."""
    path = Path(output) / "result.json"
    if not path.exists():
        return None
    result = Result(**json.loads(path.read_text()))
    return result if result.config_hash == config_hash else None


def training_hash(kind: str, config: Offline, base: str, rows: Rows) -> str:
    """Return a sha256 of everything that decides the trained weights."""
    places: Any = {"output": True, "engine": {"resources", "threads", "share_prompts"}}
    digest = hashlib.sha256(f"{kind}\n{config.model_dump_json(exclude=places)}\n".encode())
    files = sorted(p for p in Path(base).glob("*") if p.suffix in (".safetensors", ".json") and p.name != "result.json")
    if not files:
        digest.update(base.encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    for pair in rows:
        for ids in pair:
            digest.update(len(ids).to_bytes(4, "little") + np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default. Wilson 1927."""
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return centre - half, centre + half


def _fraction(key: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def _shared(a: Ints, b: Ints) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a)[:size] != np.asarray(b)[:size])
    return int(different[0]) if len(different) else size
