"""A language model small enough to enumerate: 4 tokens, completions of 3, 64 in all. Nothing here is sampled.

What an algorithm does on average is a sum over all groups of completions, weighted by how likely a policy draws them.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import schema
from trainers.algorithms import ALGORITHMS, AdvantageInputs, LossInputs
from trainers.importance import importance_weights
from trainers.losses import kl_estimate

TOKENS, LENGTH = 4, 3
SEQUENCES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))  # (64, 3)
COUNT = len(SEQUENCES)
_seeded = torch.Generator().manual_seed(0)
REWARDS = torch.rand(COUNT, generator=_seeded, dtype=torch.float64)  # (64,)
# A proxy that counts what users want plus something that they bear in small amounts only.
WANTED, UNWANTED = torch.randn(2, COUNT, generator=_seeded, dtype=torch.float64)
PROXY, GOLD = WANTED + UNWANTED, WANTED - 0.25 * UNWANTED.clamp(min=0).square()
Tables = list[Tensor]  # logits after each prefix of t tokens, (4**t, 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Import this where there are thousands of small sums: beside other programs a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_tables(seed: int, scale: float = 1.0) -> Tables:
    """A policy in which every token depends on all before it."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(TOKENS**t, TOKENS, generator=generator, dtype=torch.float64) for t in range(LENGTH)]


def logprobs_of(tables: Tables) -> Tensor:
    """Log-probs (64, 3) of the tokens of all completions."""
    prefix = torch.zeros(COUNT, dtype=torch.long)
    columns = []
    for t, table in enumerate(tables):
        columns.append(table.log_softmax(-1)[prefix, SEQUENCES[:, t]])
        prefix = prefix * TOKENS + SEQUENCES[:, t]
    return torch.stack(columns, 1)


def tables_of(logprobs: Tensor) -> Tables:
    """The policy that has these log-probs (64,) of whole completions."""
    joint = logprobs.reshape(TOKENS, TOKENS, TOKENS)
    return [joint.logsumexp((1, 2))[None], joint.logsumexp(2), joint.reshape(-1, TOKENS)]


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tables:
    """π* ∝ π₀·exp(r/β) over whole completions; reference (64, 3), rewards (64,)."""
    return tables_of((reference.sum(1) + rewards / beta).log_softmax(0))


def tokenwise(start: Tables, worth: Tensor, beta: float) -> Tables:
    """π(a|s) ∝ π₀(a|s)·exp(E[worth|s,a]/β) at every token, from the last one backwards; worth (64,)."""
    tables, value = [], worth.reshape(-1, TOKENS)  # (prefixes, 4): E[worth | s, a]
    for before in reversed(start):
        table = before.log_softmax(-1) + value / beta
        tables.append(table)
        value = (table.softmax(-1) * value).sum(-1).reshape(-1, TOKENS) if len(table) > 1 else value
    return tables[::-1]


def exact_gradient(tables: Tables, rewards: Tensor, reference: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """Gradient of E[r] - β·KL(π || π₀), flat (84,)."""
    parameters = leaves(tables)
    logprobs = logprobs_of(parameters)
    of_completion = logprobs.sum(1)
    objective = rewards if reference is None else rewards - beta * (of_completion - reference.sum(1))
    return flat(torch.autograd.grad((of_completion.exp() * objective).sum(), parameters))


def leaves(tables: Tables) -> Tables:
    return [table.detach().clone().requires_grad_() for table in tables]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def config(name: str, beta: float, **options: Any) -> schema.Algorithm:
    """The algorithm's section with its own defaults."""
    kl = {"coefficient": beta, **options.pop("kl", {})}
    return schema.Algorithm.model_validate({"name": name, "kl": kl, **options})


def expected_gradient(
    of: schema.Algorithm,
    tables: Tables,
    reference: Tensor,
    rewards: Tensor,
    *,
    size: int,
    sampled_from: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Mean of the ascent direction (84,) of one learner step per completion token, over all groups of `size`.

    By the functions of the table, in the order in which the learner calls them (tests/test_learner_algorithms.py).
    sampled_from: log-probs (64, 3) of the behaviour policy, by default the policy's own; values (64, 3).
    """
    parameters = leaves(tables)
    members = torch.cartesian_prod(*[torch.arange(COUNT)] * size).reshape(-1, size)  # (groups, size)
    rows = members.flatten()
    logprobs = logprobs_of(parameters)[rows]
    behaviour = (logprobs_of(parameters) if sampled_from is None else sampled_from).detach()
    likely = behaviour.sum(1).exp()[members].prod(1).repeat_interleave(size)  # (rows,)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    groups = torch.arange(len(members)).repeat_interleave(size)
    in_reward = of.kl.where == "reward"
    inputs = AdvantageInputs(
        rewards=rewards[rows],
        groups=groups,
        mask=mask,
        kl=kl_estimate(behaviour[rows], reference[rows], "k1") if in_reward else None,
        kl_coefficient=of.kl.coefficient if in_reward else 0.0,
        values=None if values is None else values[rows],
        greedy=torch.full((len(rows),), float(rewards[int(logprobs_of(parameters).sum(1).argmax())])),
        normalise=of.normalise,
        best=of.best,
        lam=1.0 if values is None else of.lam,
    )
    algorithm = ALGORITHMS[of.name]
    outputs = algorithm.advantages(inputs if values is not None else with_zero_values(inputs))
    proximal = logprobs.detach() if of.proximal == "recompute" else behaviour[rows]
    loss = algorithm.loss(loss_inputs(of, inputs, outputs.advantages, logprobs, proximal, reference[rows])).loss
    importance = importance_weights(logprobs.detach(), behaviour[rows], mask, **of.off_policy.model_dump())
    if of.proximal == "recompute":
        loss = loss * importance.weights
    if of.kl.where == "loss":
        term = of.kl.coefficient * kl_estimate(logprobs, reference[rows], of.kl.estimator)
        loss = loss + term * importance.weights
    total = (likely * loss.sum(1)).sum() / size  # of equal lengths: whatever `aggregate` says
    return -flat(torch.autograd.grad(total, parameters))


def loss_inputs(
    of: schema.Algorithm,
    inputs: AdvantageInputs,
    advantages: Tensor,
    logprobs: Tensor,
    proximal: Tensor,
    reference: Tensor,
) -> LossInputs:
    """All rows as one micro-batch."""
    return LossInputs(
        logprobs=logprobs,
        proximal=proximal,
        advantages=advantages,
        mask=inputs.mask,
        rewards=inputs.rewards,
        groups=inputs.groups,
        reference=reference,
        beta=of.kl.coefficient,
        clip_low=of.clip_low,
        clip_high=of.clip_high,
        dual_clip=of.dual_clip,
        ratio=of.ratio,
        labels=of.pair_labels,
    )


def with_zero_values(inputs: AdvantageInputs) -> AdvantageInputs:
    """For algorithms with a critic: one that knows nothing."""
    return replace(inputs, values=torch.zeros(inputs.mask.shape, dtype=inputs.rewards.dtype))
