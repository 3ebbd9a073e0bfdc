"""Which policy each algorithm leads to, by exact expectations over 64 outcomes; the table and its refusals."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs import schema
from configs.algorithms import FACTS, check
from trainers.advantages import token_rewards
from trainers.algorithms import ALGORITHMS, AdvantageInputs
from trainers.losses import clipped_surrogate, kl_estimate

BETA = 0.5
TOKENS, LENGTH = 4, 3
SEQUENCES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))  # (64, 3)
GENERATOR = torch.Generator().manual_seed(0)
REWARDS = torch.rand(64, generator=GENERATOR, dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]  # log-probs, those of the reference (64, T) -> loss (64, T)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    GENERATOR.manual_seed(1)


def random_logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def bandit(logits: Tensor) -> Tensor:
    """Log-probs (64, 1) of a policy with 64 one-token completions."""
    return logits.log_softmax(-1)[:, None]


def sequential(tables: list[Tensor]) -> Tensor:
    """Log-probs (64, 3) of all completions of 3 tokens; tables[t] holds the logits after each prefix, (4**t, 4)."""
    prefix = torch.zeros(64, dtype=torch.long)
    columns = []
    for t, table in enumerate(tables):
        columns.append(table.log_softmax(-1)[prefix, SEQUENCES[:, t]])
        prefix = prefix * TOKENS + SEQUENCES[:, t]
    return torch.stack(columns, 1)


def tables_of(logprobs: Tensor) -> list[Tensor]:
    """The logits by which `sequential` has these completion log-probs (64,)."""
    joint = logprobs.reshape(TOKENS, TOKENS, TOKENS)
    return [joint.logsumexp((1, 2))[None], joint.logsumexp(2), joint.reshape(-1, TOKENS)]


def expected_gradient(logprobs: Tensor, parameters: list[Tensor], loss: Tensor) -> Tensor:
    """Mean over the policy of each sampled completion's loss gradient."""
    probability = logprobs.sum(1).exp().detach()
    return torch.cat([g.flatten() for g in torch.autograd.grad((probability[:, None] * loss).sum(), parameters)])


def surrogate(logprobs: Tensor, advantages: Tensor) -> Tensor:
    return clipped_surrogate(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.2)[0]


def k1_in_reward(logprobs: Tensor, reference: Tensor) -> Tensor:
    k1 = kl_estimate(logprobs, reference, "k1").detach()
    rewards = token_rewards(REWARDS, torch.ones_like(k1), k1, BETA)
    return surrogate(logprobs, rewards.flip(1).cumsum(1).flip(1))  # what is still to come


def k1_in_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    return surrogate(logprobs, REWARDS[:, None]) + BETA * kl_estimate(logprobs, reference, "k1")


def k2_in_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    return surrogate(logprobs, REWARDS[:, None]) + BETA * kl_estimate(logprobs, reference, "k2")


def k3_in_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    return surrogate(logprobs, REWARDS[:, None]) + BETA * kl_estimate(logprobs, reference, "k3")


def descend(loss: Loss, reference: Tensor) -> Tensor:
    """Follow the expected natural gradient of a bandit policy, from random logits to where it stands still."""
    logits = random_logits(64)
    for _ in range(400):
        logprobs = bandit(logits.requires_grad_())
        gradient = expected_gradient(logprobs, [logits], loss(logprobs, reference))
        logits = (logits - 0.3 * gradient / logprobs[:, 0].exp()).detach()
    return logits.softmax(-1)


@pytest.mark.parametrize(
    ("loss", "low", "high"), [(k1_in_reward, 0, 1e-9), (k2_in_loss, 0, 1e-9), (k3_in_loss, 0.02, 1)]
)
def test_where_one_token_policies_end(loss: Loss, low: float, high: float) -> None:
    reference = bandit(random_logits(64))
    optimum = (reference[:, 0] + REWARDS / BETA).softmax(-1)
    distance = (descend(loss, reference) - optimum).abs().sum().item() / 2
    assert low <= distance <= high


def test_mean_gradient_of_each_kl_estimator() -> None:
    logits, reference = random_logits(64).requires_grad_(), bandit(random_logits(64))
    logprobs = bandit(logits)
    k1, k2, k3 = (
        expected_gradient(bandit(logits), [logits], kl_estimate(bandit(logits), reference, estimator))
        for estimator in ("k1", "k2", "k3")
    )
    (forward,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    assert reverse.norm() > 0.1 and (reverse - forward).norm() > 0.1
    assert k1.abs().max() < 1e-14
    assert torch.allclose(k2, reverse, atol=1e-14)
    assert torch.allclose(k3, forward, atol=1e-14)


def test_k1_in_the_loss_does_not_hold_the_policy() -> None:
    logits, reference = random_logits(64).requires_grad_(), bandit(random_logits(64))
    logprobs = bandit(logits)
    with_kl = expected_gradient(logprobs, [logits], k1_in_loss(logprobs, reference))
    logprobs = bandit(logits)
    assert torch.allclose(with_kl, expected_gradient(logprobs, [logits], surrogate(logprobs, REWARDS[:, None])))


def optimal_tables(reference: Tensor) -> list[Tensor]:
    return tables_of((reference.sum(1) + REWARDS / BETA).log_softmax(0))


def tokenwise_tables(reference: list[Tensor], beta: float) -> list[Tensor]:
    """The policy of grpo's stated fixed point, from the last token backwards."""
    tables, value = [], REWARDS.reshape(-1, TOKENS)  # value (prefixes, 4): E[r | s, a]
    for start in reversed(reference):
        table = start.log_softmax(-1) + value / beta
        tables.append(table)
        value = (table.softmax(-1) * value).sum(-1).reshape(-1, TOKENS) if len(table) > 1 else value
    return tables[::-1]


def test_on_sequences_k1_in_the_reward_has_the_optimum_and_k2_in_the_loss_its_own_fixed_point() -> None:
    start = [random_logits(TOKENS**t, TOKENS) for t in range(LENGTH)]
    reference = sequential(start)
    ends = {"optimum": optimal_tables(reference), "tokenwise": tokenwise_tables(start, BETA)}
    norms = {}
    for end, tables in ends.items():
        parameters = [table.requires_grad_() for table in tables]
        for loss in (k1_in_reward, k2_in_loss, k3_in_loss):
            logprobs = sequential(parameters)
            norms[loss.__name__, end] = expected_gradient(logprobs, parameters, loss(logprobs, reference)).norm().item()
    assert norms["k1_in_reward", "optimum"] < 1e-14 and norms["k2_in_loss", "tokenwise"] < 1e-14
    for pair in (("k1_in_reward", "tokenwise"), ("k2_in_loss", "optimum"), ("k3_in_loss", "optimum")):
        assert norms[pair] > 1e-3, pair


def inputs_at(logprobs: Tensor, reference: Tensor) -> AdvantageInputs:
    """Every completion once, as one group."""
    return AdvantageInputs(
        rewards=REWARDS,
        groups=torch.zeros(64, dtype=torch.long),
        mask=torch.ones(64, logprobs.shape[1], dtype=torch.bool),
        kl=kl_estimate(logprobs, reference, "k1").detach(),
        kl_coefficient=BETA,
    )


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_grpo_with_the_kl_in_the_reward_rests_at_the_optimum(divide_by_std: bool) -> None:
    reference = sequential([random_logits(TOKENS**t, TOKENS) for t in range(LENGTH)])
    inputs = replace(inputs_at(sequential(optimal_tables(reference)), reference), divide_by_std=divide_by_std)
    assert ALGORITHMS["grpo"].advantages(inputs).advantages.abs().max() < 1e-8
    elsewhere = replace(inputs, kl_coefficient=2 * BETA)
    assert ALGORITHMS["grpo"].advantages(elsewhere).advantages.abs().max() > 0.1


@pytest.mark.parametrize(("lam", "exact_critic"), [(1.0, False), (0.95, True), (0.0, True)])
def test_ppo_rests_at_the_optimum(lam: float, exact_critic: bool) -> None:
    reference = sequential([random_logits(TOKENS**t, TOKENS) for t in range(LENGTH)])
    parameters = [table.requires_grad_() for table in optimal_tables(reference)]
    logprobs = sequential(parameters)
    inputs = inputs_at(logprobs, reference)
    later = token_rewards(REWARDS, inputs.mask, inputs.kl, BETA).flip(1).cumsum(1).flip(1)
    prefix = torch.stack([SEQUENCES[:, :t] @ TOKENS ** torch.arange(t) for t in range(LENGTH)], 1)
    # At the optimum what is still to come depends on the prefix alone: that is the exact value.
    values = later if exact_critic else torch.sin(1.0 + prefix + 10 * torch.arange(LENGTH)).double()
    outputs = ALGORITHMS["ppo"].advantages(replace(inputs, values=values, lam=lam))
    loss = surrogate(logprobs, outputs.advantages)
    assert expected_gradient(logprobs, parameters, loss).norm() < 1e-10
    assert outputs.returns is not None and torch.allclose(outputs.returns, later) == (exact_critic or lam == 1)
    if not exact_critic:
        biased = ALGORITHMS["ppo"].advantages(replace(inputs, values=values, lam=0.5))
        assert (
            expected_gradient(
                sequential(parameters), parameters, surrogate(sequential(parameters), biased.advantages)
            ).norm()
            > 1e-3
        )


def expected_grpo_gradient(logits: Tensor, rewards: Tensor, size: int, divide_by_std: bool) -> Tensor:
    """Exact mean of grpo's gradient over all groups of `size` one-token completions."""
    members = torch.cartesian_prod(*[torch.arange(len(logits))] * size)  # (groups, size)
    logprobs = logits.log_softmax(-1)
    inputs = AdvantageInputs(
        rewards=rewards[members].flatten(),
        groups=torch.arange(len(members)).repeat_interleave(size),
        mask=torch.ones(members.numel(), 1, dtype=torch.bool),
        divide_by_std=divide_by_std,
    )
    advantages = ALGORITHMS["grpo"].advantages(inputs).advantages.reshape(members.shape)
    probability = logprobs[members].sum(1).exp().detach()
    objective = (probability[:, None] * advantages * logprobs[members]).sum() / size
    (gradient,) = torch.autograd.grad(objective, logits)
    return gradient


@pytest.mark.parametrize("size", [2, 3, 5])
def test_grpo_shrinks_the_policy_gradient_by_its_own_share_of_the_mean(size: int) -> None:
    logits, rewards = random_logits(4).requires_grad_(), REWARDS[:4]
    (true,) = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)
    got = expected_grpo_gradient(logits, rewards, size, divide_by_std=False)
    assert torch.allclose(got, true * (size - 1) / size, atol=1e-12)


def test_division_by_std_removes_the_scale_of_the_reward() -> None:
    logits, rewards = random_logits(4).requires_grad_(), REWARDS[:4]
    plain, scaled = (expected_grpo_gradient(logits, factor * rewards, 3, divide_by_std=True) for factor in (1, 100))
    assert plain.norm() > 0.01 and torch.allclose(plain, scaled, rtol=1e-3)


def test_grpo_takes_the_kl_of_the_whole_completion_off_the_reward() -> None:
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    inputs = AdvantageInputs(
        rewards=torch.tensor([4.0, 1.0, 3.0]),
        groups=torch.tensor([5, 5, 5]),
        mask=mask,
        kl=torch.tensor([[1.0, 3.0], [-2.0, 99.0], [99.0, 99.0]]),
        kl_coefficient=0.5,
        divide_by_std=False,
    )
    # 4 - 0.5·4, 1 + 0.5·2, and 3: the empty completion counts in the mean though it has no token to train.
    expected = torch.tensor([2.0, 2.0, 3.0]) - 7 / 3
    outputs = ALGORITHMS["grpo"].advantages(inputs)
    assert torch.allclose(outputs.advantages, expected[:, None] * mask) and outputs.returns is None


def test_ppo_whitens_the_estimates_over_the_batch() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    inputs = AdvantageInputs(
        rewards=torch.tensor([4.0, 1.0]),
        groups=torch.tensor([0, 1]),
        mask=mask,
        kl=torch.tensor([[1.0, 3.0], [-2.0, 99.0]]),
        kl_coefficient=0.5,
        values=torch.tensor([[1.0, 0.5], [0.0, 99.0]]),
        lam=0.0,
    )
    # One-step estimates: -0.5·1 + 0.5 - 1 = -1, (4 - 0.5·3) - 0.5 = 2, and 1 + 0.5·2 = 2; mean 1, variance 2.
    outputs = ALGORITHMS["ppo"].advantages(inputs)
    assert torch.allclose(outputs.advantages, torch.tensor([[-2.0, 1.0], [1.0, 0.0]]) / 2**0.5)
    assert outputs.returns is not None and outputs.returns.tolist() == [[0.0, 2.5], [2.0, 0.0]]


def test_a_missing_input_is_an_error() -> None:
    logprobs = bandit(random_logits(64))
    inputs = replace(inputs_at(logprobs, logprobs), values=torch.zeros(64, 1))
    for name in ALGORITHMS:
        ALGORITHMS[name].advantages(inputs)
        with pytest.raises(ValueError, match="KL"):
            ALGORITHMS[name].advantages(replace(inputs, kl=None))
    with pytest.raises(ValueError, match="values"):
        ALGORITHMS["ppo"].advantages(replace(inputs, values=None))


def test_the_table_is_complete_and_its_defaults_are_accepted() -> None:
    assert ALGORITHMS.keys() == FACTS.keys()
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.name == name and algorithm.fixed_point and algorithm.paper
        assert check(name, algorithm.kl_where, algorithm.kl_estimator, n=8) is None
    default = schema.Algorithm()
    assert check(default.name, default.kl.where, default.kl.estimator, schema.SamplingParams().n) is None


@pytest.mark.parametrize(
    ("combination", "words"),
    [
        (("gpro", "loss", "k2", 8), ["'gpro'", "did you mean 'grpo'"]),
        (("PPO", "reward", "k1", 8), ["did you mean 'ppo'"]),
        (("dreamer", "loss", "k2", 8), ["choose one of grpo, ppo"]),
        (("grpo", "loss", "k2", 1), ["sampling.n", "n = 1", "sampling.n >= 2"]),
        (("grpo", "loss", "k1", 8), ["zero mean gradient", "estimator=k2", "where=reward"]),
        (("ppo", "reward", "k2", 1), ["k2 in the reward", "estimator=k1", "where=loss"]),
        (("ppo", "reward", "k3", 1), ["k3 in the reward", "estimator=k1"]),
    ],
)
def test_refused_combinations_say_what_to_do(combination: tuple[str, str, str, int], words: list[str]) -> None:
    message = check(*combination)
    assert message is not None and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "combination",
    [("ppo", "reward", "k1", 1), ("grpo", "none", "k1", 2), ("ppo", "none", "k3", 1), ("grpo", "loss", "k3", 2)],
)
def test_accepted_combinations(combination: tuple[str, str, str, int]) -> None:
    assert check(*combination) is None


def test_check_imports_no_torch() -> None:
    command = "import configs.algorithms, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
