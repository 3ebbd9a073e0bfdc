"""A language model small enough to enumerate: 4 tokens, completions of 3, 64 in all. Nothing here is sampled.

What an algorithm does on average is a sum over all groups of completions, weighted by how likely a policy draws them.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import schema
from trainers.algorithms import ALGORITHMS
from trainers.objective import token_losses
from trainers.targets import RewardShaping, targets
from trainers.types import Batch

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

    By what the learner itself computes of a batch, which is here all groups there are.
    sampled_from: log-probs (64, 3) of the behaviour policy, by default the policy's own; values (64, 3), by default,
    for a critic, those of one that knows nothing, with lam = 1.
    """
    parameters = leaves(tables)
    members = torch.cartesian_prod(*[torch.arange(COUNT)] * size).reshape(-1, size)  # (groups, size)
    rows = members.flatten()
    logprobs = logprobs_of(parameters)[rows]
    behaviour = (logprobs_of(parameters) if sampled_from is None else sampled_from).detach()
    likely = behaviour.sum(1).exp()[members].prod(1).repeat_interleave(size)  # (rows,)
    best = rewards[int(logprobs_of(parameters).sum(1).argmax())]
    batch = Batch(
        version=0,
        uids=("",) * len(rows),
        prompt_ids=(),
        completion_ids=SEQUENCES[rows].numpy(),
        mask=np.ones(logprobs.shape, bool),
        behaviour_logprobs=behaviour[rows].numpy(),
        reference_logprobs=reference[rows].numpy(),
        token_versions=np.zeros(logprobs.shape, np.int32),
        rewards=rewards[rows].numpy(),
        groups=np.repeat(np.arange(len(members)), size),
        greedy_rewards=np.full(len(rows), float(best)),
    )
    if ALGORITHMS[of.name].needs_critic and values is None:
        of, values = of.model_copy(update={"lam": 1.0}), torch.zeros(SEQUENCES.shape, dtype=rewards.dtype)
    shaping = RewardShaping(config=of, max_tokens=1000)
    towards = targets(batch, of, of.kl.coefficient, shaping, None if values is None else values[rows].numpy())
    everything = list(range(len(rows)))
    loss, _ = token_losses(batch, everything, towards, of, of.kl.coefficient, logprobs, logprobs.detach())
    total = (likely * loss.sum(1)).sum() / size  # of equal lengths: whatever `aggregate` says
    return -flat(torch.autograd.grad(total, parameters))
