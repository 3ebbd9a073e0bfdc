"""Trained completion tokens/s of the learner beside a plain transformers loop: equal weights, batch and loss.

python -m benchmarks.learner [--model DIRECTORY] [--prompts 4] [--rounds 12]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import environment, interleaved, interval, ratio, report
from benchmarks.recipes import command
from configs.errors import UserError
from configs.schema import Recipe
from tests import tiny
from trainers.layout import tree_width
from trainers.learner import Learner
from trainers.types import Batch, Floats

N = 8  # completions of a prompt
SEED = 0
MEDIAN, SIGMA = 16, 1.2  # completion tokens: quantiles of this log-normal
FIXED = 48
IGNORED = -100
# AdamW does all of its work and moves no weight that fp32 can tell: every step of every arm is the same step.
RATE = 1e-12
SAME = 1e-3  # relative difference of loss, gradient norm and log-probs beyond which the arms don't do equal work
GOALS = {"fixed": 0.95, "heavy-tailed": 1.8}
PLAIN, CUT = "plain loop", "plain loop, cut"
HEADROOM, SHARED = "headroom", "headroom, prompts shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A batch that all arms train on."""

    name: str
    batch: Batch
    rows: int  # of the plain loop's micro-batches

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(p) + int(n) for p, n in zip(self.batch.prompt_ids, self.batch.mask.sum(1), strict=True))


class PlainLoop:
    """The same step written with transformers and torch alone: every row padded to the batch's longest.

    Or, cut, to the longest of its own micro-batch, as a collator pads rows that come in any order.
    """

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        settings = {"lr": RATE, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)

    def step(self, case: Case, *, cut: bool = False) -> tuple[float, float]:
        """Return loss and gradient norm of one optimizer step: policy gradient, mean over completion tokens."""
        ids, attention, labels = padded(case)
        advantages, tokens = torch.tensor(case.batch.rewards)[:, None], int(case.batch.mask.sum())
        total = 0.0
        for start in range(0, len(ids), case.rows):
            rows = slice(start, start + case.rows)
            width = int(attention[rows].sum(1).max()) if cut else case.longest
            micro = [x[rows, :width] for x in (ids, attention, labels)]
            logprobs = self.logprobs(*micro)
            weight = (logprobs - logprobs.detach()).exp() * (micro[2] != IGNORED)
            loss = -(advantages[rows] * weight).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm)

    def logprobs(self, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        """Return the log-prob (b, L) of each label, 0 where there is none."""
        logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return -losses.view(labels.shape)

    @torch.no_grad()
    def behaviour(self, case: Case) -> Floats:
        """Return the log-probs (B, T) of the completions, as an engine would have recorded them."""
        ids, attention, labels = padded(case)
        found = np.zeros(case.batch.mask.shape, np.float32)
        for row, count in enumerate(case.batch.mask.sum(1)):
            logprobs = self.logprobs(*(x[row : row + 1] for x in (ids, attention, labels)))[0]
            found[row, :count] = logprobs[labels[row] != IGNORED].numpy()
        return found


def padded(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and labels (B, L); a label is the token after its place, of completions only."""
    shape = (len(case.batch.uids), case.longest)
    ids, attention, labels = (torch.full(shape, fill) for fill in (0, 0, IGNORED))
    for row, prompt in enumerate(case.batch.prompt_ids):
        completion = case.batch.completion_ids[row][case.batch.mask[row]]
        text = torch.tensor(np.concatenate([prompt, completion])).long()
        ids[row, : len(text)], attention[row, : len(text)] = text, 1
        labels[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
    return ids, attention, labels


class Headroom:
    """The learner as a run has it: `Learner.step` with a DeepSpeed engine, on one rank."""

    def __init__(self, path: str, zero: int) -> None:
        recipe = {
            "run": {"name": "benchmark", "steps": 1_000_000},
            "model": {"path": path, "dtype": "float32"},
            "data": {"path": "none"},
            "algorithm": {"name": "grpo", "kl": {"where": "none"}, "aggregate": "token"},
            "learner": {"zero": zero, "optimizer": {"learning_rate": RATE, "max_grad_norm": 1.0}},
        }
        self.learner = Learner(Recipe.model_validate(recipe))
        self.width = tree_width(self.learner.engine.hf)

    def step(self, case: Case, *, share: bool) -> tuple[float, float]:
        """Return loss and gradient norm of one step. Raises RuntimeError if its log-probs are not the plain loop's."""
        # One engine for both arms, since two would hold weights and optimizer state twice.
        self.learner.trainee.width = self.width if share else None
        self.learner.trainee.token_budget = case.rows * case.longest
        stats = self.learner.step(case.batch)
        if not stats.metrics["rollout/behaviour_gap"] < SAME:
            raise RuntimeError(f"log-probs differ by {stats.metrics['rollout/behaviour_gap']:.2g} on average")
        return stats.loss, stats.grad_norm

    def forwarded(self, case: Case, *, share: bool) -> int:
        """Return the padded tokens that go through the model in one step."""
        trainee = self.learner.trainee
        trainee.width, trainee.token_budget = self.width if share else None, case.rows * case.longest
        micros = trainee.plan(case.batch, [(row,) for row in range(len(case.batch.uids))])
        return sum(trainee.inputs(case.batch, micro).input_ids.numel() for micro in micros)


def make_case(name: str, *, prompts: int, rows: int, vocabulary: int) -> Case:
    """Draw a batch of `prompts` groups: prompts of 16 to 48 tokens, completions of fixed or log-normal lengths."""
    rng = np.random.default_rng(SEED)
    count = prompts * N
    lengths = np.full(count, FIXED)
    if name == "heavy-tailed":  # quantiles instead of draws: no luck in the longest
        z = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
        lengths = rng.permutation(np.maximum(1, np.rint(MEDIAN * np.exp(SIGMA * np.array(z))).astype(int)))
    mask = np.arange(lengths.max()) < lengths[:, None]
    drawn = [rng.integers(4, vocabulary, rng.integers(16, 49)).astype(np.int32) for _ in range(prompts)]
    zeros = np.zeros(mask.shape, np.float32)
    batch = Batch(
        version=0,
        uids=tuple(f"s{i}" for i in range(count)),
        prompt_ids=tuple(drawn[i // N] for i in range(count)),
        completion_ids=(rng.integers(4, vocabulary, mask.shape) * mask).astype(np.int32),
        mask=mask,
        behaviour_logprobs=zeros,
        reference_logprobs=None,
        token_versions=zeros.astype(np.int32),
        # Mean 0 and standard deviation 1 in every group: each is its own advantage, however groups are normalised.
        rewards=np.where(np.arange(count) % 2, 1.0, -1.0).astype(np.float32),
        groups=np.repeat(np.arange(prompts), N).astype(np.int32),
    )
    return Case(name=name, batch=batch, rows=rows)


def measure(path: str, *, prompts: int, rows: int, rounds: int, zero: int) -> dict[str, Any]:
    """Return tokens/s of each arm and their ratios to the plain loop's. Raises RuntimeError if their work differs."""
    plain, headroom = PlainLoop(path), Headroom(path, zero)
    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    cases = [make_case(name, prompts=prompts, rows=rows, vocabulary=vocabulary) for name in GOALS]
    cases = [replace(c, batch=replace(c.batch, behaviour_logprobs=plain.behaviour(c))) for c in cases]
    arms: dict[str, Callable[[Case], tuple[float, float]]] = {
        PLAIN: plain.step,
        CUT: lambda case: plain.step(case, cut=True),
        HEADROOM: lambda case: headroom.step(case, share=False),
        SHARED: lambda case: headroom.step(case, share=True),
    }
    expected = {case.name: plain.step(case) for case in cases}
    for arm in arms:  # warm-up
        check(arm, arms[arm](cases[0]), expected[cases[0].name])
    spent: dict[tuple[str, str], list[np.ndarray]] = {(case.name, arm): [] for case in cases for arm in arms}
    for arm in interleaved(list(arms), rounds):
        for case in cases:
            start = np.array([time.perf_counter(), time.process_time()])
            found = arms[arm](case)
            spent[case.name, arm].append(np.array([time.perf_counter(), time.process_time()]) - start)
            check(f"{case.name}, {arm}", found, expected[case.name])
    results: dict[str, Any] = {}
    for case in cases:
        tokens = int(case.batch.mask.sum())
        wall, cpu = ({arm: tokens / np.stack(spent[case.name, arm])[:, i] for arm in arms} for i in (0, 1))
        results |= {f"{case.name}: {arm}, tokens/s": interval(wall[arm]) for arm in arms}
        for arm in (HEADROOM, SHARED):
            for plain_arm in (PLAIN, CUT):
                goal = {"goal": GOALS[case.name]} if plain_arm == PLAIN else {}
                results[f"{case.name}: {arm} / {plain_arm}"] = ratio(wall[arm], wall[plain_arm]) | goal
                results[f"{case.name}: {arm} / {plain_arm}, by CPU time"] = ratio(cpu[arm], cpu[plain_arm])
        results |= sizes(case, headroom)
    return results


def sizes(case: Case, headroom: Headroom) -> dict[str, int]:
    """Return how many tokens are trained on, how many there are, and how many each arm sends through the model."""
    lengths = case.batch.mask.sum(1)
    return {
        f"{case.name}: longest completion": int(lengths.max()),
        f"{case.name}: completion tokens": int(lengths.sum()),
        f"{case.name}: tokens, prompts of all": int(lengths.sum()) + sum(map(len, case.batch.prompt_ids)),
        f"{case.name}: tokens forwarded, plain loop": len(lengths) * case.longest,
        f"{case.name}: tokens forwarded, headroom": headroom.forwarded(case, share=False),
        f"{case.name}: tokens forwarded, prompts shared": headroom.forwarded(case, share=True),
    }


def check(where: str, found: tuple[float, float], expected: tuple[float, float]) -> None:
    """Raise RuntimeError unless loss and gradient norm are the plain loop's."""
    for name, mine, other in zip(("loss", "gradient norm"), found, expected, strict=True):
        if not abs(mine - other) <= SAME * max(abs(other), 1e-2):
            raise RuntimeError(f"{where}: {name} {mine:.6g}, of the plain loop {other:.6g}: not equal work")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="HF directory; without it, the tiny random policy of tests/tiny.py")
    parser.add_argument("--prompts", type=int, default=4, help=f"groups of a batch, of {N} completions each")
    parser.add_argument("--rows", type=int, default=8, help="of the plain loop's micro-batches")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each arm on each batch: A B …, … B A")
    parser.add_argument("--zero", type=int, default=0, choices=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    if options.model and not (Path(options.model) / "config.json").is_file():
        raise UserError(f"--model {options.model}: no config.json there; give a directory in HF format")
    machine = environment() | {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as directory:
        path = options.model or tiny.policy(Path(directory) / "policy")
        chosen = {"prompts": options.prompts, "rows": options.rows, "rounds": options.rounds, "zero": options.zero}
        results = measure(path, **chosen)
    result = {"environment": machine, "options": chosen | {"model": options.model or "tiny"}, "results": results}
    report(options.out / time.strftime("learner-%Y%m%d-%H%M%S") / "result.json", result)


if __name__ == "__main__":
    command(main)
