"""The learner takes the step that each algorithm's functions say, however its rollouts are dealt to micro-batches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.schema import Recipe
from tests.ranks import random_batch, recipe, tiny_policy
from trainers.algorithms import ALGORITHMS, LossInputs
from trainers.critic import Critic
from trainers.importance import importance_weights
from trainers.learner import Learner
from trainers.losses import kl_estimate, token_weights
from trainers.microbatch import MicroBatch
from trainers.targets import RewardShaping, Targets, minibatches, plan, targets
from trainers.types import Batch

OPTIMIZER = {"learning_rate": 1e-3, "eps": 1e-5}  # with a tiny eps the first step is the sign of rounding errors
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_policy(tmp_path_factory.mktemp("tiny"))


def a_batch(path: str, seed: int = 5) -> Batch:
    """Rollouts that a policy near this one has sampled."""
    batch = random_batch(seed=seed)
    rng = np.random.default_rng(seed)
    logprobs, _ = forward(AutoModelForCausalLM.from_pretrained(path), batch)
    shift = rng.normal(0, 0.4, batch.mask.shape) * batch.mask
    behaviour = (logprobs.detach().numpy() + shift).astype(np.float32)
    reference = (behaviour + rng.normal(0, 0.3, batch.mask.shape) * batch.mask).astype(np.float32)
    greedy = np.repeat(rng.normal(size=3), 4).astype(np.float32)
    return replace(batch, behaviour_logprobs=behaviour, reference_logprobs=reference, greedy_rewards=greedy)


def forward(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, T), one completion at a time over the whole vocabulary."""
    logprobs, entropies = [], []
    for prompt, row, inside in zip(batch.prompt_ids, batch.completion_ids, batch.mask, strict=True):
        completion = torch.tensor(row[inside]).long()
        ids = torch.cat([torch.tensor(prompt).long(), completion])[None]
        scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        padding = (0, batch.mask.shape[1] - len(completion))
        logprobs.append(torch.nn.functional.pad(scores.gather(1, completion[:, None])[:, 0], padding))
        entropies.append(torch.nn.functional.pad(-(scores.exp() * scores).sum(1), padding))
    return torch.stack(logprobs), torch.stack(entropies)


def plain_loss(of: Recipe, batch: Batch, model: Any, values: Any) -> Tensor:
    """All rollouts at once, nothing dealt, nothing detached but what the papers say."""
    config = of.algorithm
    shaping = RewardShaping(config=config, max_tokens=of.sampling.max_tokens)
    shaping.observe(batch)
    towards = targets(batch, config, config.kl.coefficient, shaping, values)
    rows = sorted(row for unit in towards.units for row in unit)
    return surrogate_of(of, batch, model, towards, forward(model, batch)[0].detach(), rows)[0]


def surrogate_of(
    of: Recipe, batch: Batch, model: Any, towards: Targets, proximal: Tensor, rows: list[int]
) -> tuple[Tensor, int]:
    """The loss of one update on `rows`, and how many tokens it clipped."""
    config = of.algorithm
    logprobs, entropies = (x[rows] for x in forward(model, batch))
    mask, behaviour, reference = (
        torch.tensor(x[rows]) for x in (batch.mask, batch.behaviour_logprobs, batch.reference_logprobs)
    )
    in_ratio = config.proximal == "behaviour"
    outputs = ALGORITHMS[config.name].loss(
        LossInputs(
            logprobs=logprobs,
            proximal=behaviour if in_ratio else proximal[rows],
            advantages=towards.outputs.advantages[rows],
            mask=mask,
            rewards=towards.rewards[rows],
            groups=torch.tensor(batch.groups[rows]),
            reference=reference,
            beta=config.kl.coefficient,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            labels=config.pair_labels,
        )
    )
    before = logprobs.detach() if in_ratio else proximal[rows]
    importance = importance_weights(before, behaviour, mask, **config.off_policy.model_dump())
    loss = outputs.loss * (~importance.masked if in_ratio else importance.weights)
    if config.kl.where == "loss":
        term = config.kl.coefficient * kl_estimate(logprobs, reference, config.kl.estimator)
        loss = loss + term * importance.weights
    loss = loss - config.entropy_bonus * entropies
    length = config.fixed_length or of.sampling.max_tokens
    weights = token_weights(mask, config.aggregate, fixed_length=length)
    return (loss * weights).sum(), int((outputs.clipped & mask).sum())


CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ALGORITHMS] + [
    ("grpo", {"entropy_bonus": 0.3}),
    ("grpo", {"proximal": "behaviour"}),
    ("grpo", {"proximal": "behaviour", "off_policy": {"weight": "mask", "cap": 1.3, "floor": 0.7}}),
    ("grpo", {"off_policy": {"weight": "mask", "level": "geometric", "cap": 1.1, "floor": 0.9}}),
    ("rloo", {"off_policy": {"level": "sequence"}, "reward_scale": "running", "reward_clip": 1.0}),
    ("dapo", {"overlong": {"share": 0.5, "penalty": 2.0}}),
    ("online_dpo", {"pair_labels": "hard"}),
]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_a_step_is_the_plain_autograd_step(path: str, name: str, options: dict[str, Any], share_prompts: bool) -> None:
    batch = a_batch(path)
    values = np.random.default_rng(1).normal(size=batch.mask.shape).astype(np.float32) * batch.mask
    of = recipe(
        path,
        algorithm={"name": name, **options},
        learner={"token_budget": 60, "share_prompts": share_prompts, "optimizer": OPTIMIZER},
        sampling={"max_tokens": 9},
    )
    learner = Learner(of)
    stats = learner.step(batch, values if name == "ppo" else None)
    model = AutoModelForCausalLM.from_pretrained(path)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    loss = plain_loss(of, batch, model, values if name == "ppo" else None)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    assert norm > 1e-3, "a step that says nothing"
    assert stats.loss == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-3)
    for key, tensor in learner.state_dict_for_publish().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("grpo", "rloo", "online_dpo", "rft", "gspo", "cispo")]
    + [("grpo", {"proximal": "behaviour"})],
)
def test_several_updates_are_those_of_a_plain_loop(path: str, name: str, options: dict[str, Any]) -> None:
    batch, of = a_batch(path), several(path, name, options)
    config, generator = of.algorithm, np.random.default_rng(of.run.seed)
    learner = Learner(of)
    stats = learner.step(batch)
    model = AutoModelForCausalLM.from_pretrained(path)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    towards = targets(batch, config, config.kl.coefficient, RewardShaping(config=config, max_tokens=9), None)
    proximal = forward(model, batch)[0].detach()
    losses, clipped, tokens = [], 0, 0
    for units in minibatches(towards.units, 2, 2, generator):
        rows = [row for unit in units for row in unit]
        loss, outside = surrogate_of(of, batch, model, towards, proximal, rows)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
        clipped, tokens = clipped + outside, tokens + int(batch.mask[rows].sum())
    assert stats.loss == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)
    assert stats.metrics["policy/clip_fraction"] == pytest.approx(clipped / tokens, abs=1.5 / tokens)
    assert (clipped > 0) == (name not in ("rft", "online_dpo")), "or clipping is not looked at"
    for key, tensor in learner.state_dict_for_publish().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], **TOLERANCE)


def several(path: str, name: str, options: dict[str, Any]) -> Recipe:
    """Two epochs of two minibatches."""
    return recipe(
        path,
        algorithm={"name": name, "epochs": 2, "minibatches": 2, **options},
        learner={"token_budget": 60, "optimizer": {"learning_rate": 2e-3, "eps": 1e-5}},
        sampling={"max_tokens": 9},
    )


@pytest.mark.parametrize("name", ["online_dpo", "rft", "dapo"])  # the others differ from these in pure functions only
def test_several_updates_go_on_bit_equal_after_a_resume(path: str, tmp_path: Path, name: str) -> None:
    sections: dict[str, Any] = {
        "algorithm": {"name": name, "minibatches": 2, "epochs": 2, "reward_scale": "running"},
        "learner": {"optimizer": OPTIMIZER},
    }
    first = Learner(recipe(path, **sections))
    first.step(a_batch(path, 1))
    first.save(tmp_path)
    expected = first.step(a_batch(path, 2))
    second = Learner(recipe(path, **sections))
    second.load(tmp_path)
    assert second.step(a_batch(path, 2)) == expected
    assert expected.metrics["policy/grad_norm"] > 0 and "kl/reference" in expected.metrics


@pytest.mark.parametrize("name", ["rft", "online_dpo"])
def test_the_schedule_moves_on_where_fewer_rollouts_are_chosen_than_there_are_updates(path: str, name: str) -> None:
    """Of 3 groups, 3 updates in an epoch of 4; of groups whose rewards are all equal, none."""
    learner = Learner(
        recipe(
            path,
            run={"name": "test", "steps": 3},
            algorithm={"name": name, "epochs": 2, "minibatches": 4},
            learner={"optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 4}},
        )
    )
    equal = replace(a_batch(path), rewards=np.ones(12, np.float32))
    rates = [learner.step(batch).metrics["policy/learning_rate"] for batch in (equal, a_batch(path), a_batch(path))]
    assert rates == pytest.approx([1e-3 * share for share in (1 / 5, 1 - 4 / 20, 1 - 12 / 20)])
    assert learner.engine.learning_rate == 0


def test_a_batch_that_teaches_nothing_changes_nothing(path: str) -> None:
    learner = Learner(recipe(path, algorithm={"name": "rft"}))
    batch = replace(a_batch(path), rewards=np.ones(12, np.float32))
    before = learner.state_dict_for_publish()
    stats = learner.step(batch)
    after = learner.state_dict_for_publish()
    assert (stats.loss, stats.grad_norm) == (0.0, 0.0)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_of_empty_completions_changes_nothing_but_is_taken(path: str) -> None:
    batch = a_batch(path)
    empty = replace(batch, mask=np.zeros_like(batch.mask))
    values = np.zeros(batch.mask.shape, np.float32)
    of = recipe(path, algorithm={"name": "ppo"})
    learner, critic = Learner(of), Critic(of)
    before = learner.state_dict_for_publish()
    assert math.isfinite(learner.step(empty, values).loss)
    assert all(math.isfinite(value) for value in critic.step(empty, values).values())
    after = learner.state_dict_for_publish()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["grpo", "cispo"])
def test_a_batch_whose_tokens_are_all_masked_changes_nothing(path: str, name: str) -> None:
    """Every token was a third as likely when it was sampled."""
    batch = a_batch(path)
    own = forward(AutoModelForCausalLM.from_pretrained(path), batch)[0].detach().numpy()
    off = replace(batch, behaviour_logprobs=np.where(batch.mask, own - math.log(3), 0).astype(np.float32))
    learner = Learner(recipe(path, algorithm={"name": name, "off_policy": {"weight": "mask", "cap": 2.0}}))
    before = learner.state_dict_for_publish()
    metrics = learner.step(off).metrics
    assert metrics["loss/policy"] == metrics["policy/grad_norm"] == 0
    assert metrics["rollout/importance_masked_share"] == 1
    assert metrics["rollout/importance_weight_mean"] == metrics["rollout/importance_effective_share"] == 0
    after = learner.state_dict_for_publish()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_policy_whose_log_prob_is_no_number_is_not_updated(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, learner = a_batch(path), Learner(recipe(path))
    before, plain = learner.state_dict_for_publish(), learner._forward

    def broken(of: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        logprobs, entropy = plain(of, micro)
        return logprobs.where(torch.tensor(micro.rows)[:, None] != 7, math.nan), entropy

    monkeypatch.setattr(learner, "_forward", broken)
    with pytest.raises(FloatingPointError, match=f"sample {batch.uids[7]}: its loss is not a finite number"):
        learner.step(batch)
    after = learner.state_dict_for_publish()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("stale", [0.0, 0.5])  # how much likelier the engine's policy found every token
@pytest.mark.parametrize(("shift", "kl"), [(-1.0, math.exp(-1)), (1.0, math.e - 2)])
def test_the_kl_that_is_logged_is_k3_of_the_policy_weighed(path: str, shift: float, kl: float, stale: float) -> None:
    batch = a_batch(path)
    own = forward(AutoModelForCausalLM.from_pretrained(path), batch)[0].detach().numpy()
    reference, behaviour = (np.where(batch.mask, own + by, 0).astype(np.float32) for by in (shift, stale))
    shifted = replace(batch, reference_logprobs=reference, behaviour_logprobs=behaviour)
    expected = kl * math.exp(-stale)
    assert Learner(recipe(path)).step(shifted).metrics["kl/reference"] == pytest.approx(expected, abs=1e-4)


def test_the_entropy_of_an_even_policy(tmp_path: Path) -> None:
    path = tiny_policy(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(path)
    metrics = Learner(recipe(path)).step(random_batch()).metrics
    assert metrics["policy/entropy"] == pytest.approx(math.log(61), abs=1e-5)


def test_a_critics_value_that_is_no_number_is_refused(path: str) -> None:
    batch = a_batch(path)
    values = np.zeros(batch.mask.shape, np.float32)
    values[3, 0] = math.nan
    with pytest.raises(FloatingPointError, match=f"sample {batch.uids[3]}: its critic's value"):
        Learner(recipe(path, algorithm={"name": "ppo"})).step(batch, values)


@pytest.mark.parametrize("what", ["rewards", "behaviour_logprobs", "reference_logprobs", "greedy_rewards"])
def test_what_is_no_number_is_refused_with_its_sample(path: str, what: str) -> None:
    batch = a_batch(path)
    broken = getattr(batch, what).copy()
    broken[(7, 0) if broken.ndim == 2 else 7] = math.nan
    learner = Learner(recipe(path, algorithm={"name": "remax"}))
    with pytest.raises(FloatingPointError, match=f"sample {batch.uids[7]}: its .* is not a finite number"):
        learner.step(replace(batch, **{what: broken}))


def test_what_lies_in_the_padding_is_not_looked_at(path: str) -> None:
    batch = a_batch(path)
    junk = np.where(batch.mask, batch.behaviour_logprobs, np.nan).astype(np.float32)
    of = recipe(path, algorithm={"name": "rloo"})
    assert math.isfinite(Learner(of).step(replace(batch, behaviour_logprobs=junk)).loss)


def test_bounds_are_counted(path: str) -> None:
    batch = a_batch(path)
    off_policy = {"weight": "mask", "cap": 1.2, "floor": 0.8}
    metrics = Learner(recipe(path, algorithm={"off_policy": off_policy})).step(batch).metrics
    logprobs, _ = forward(AutoModelForCausalLM.from_pretrained(path), batch)
    ratio = np.exp(logprobs.detach().numpy() - batch.behaviour_logprobs)[batch.mask]
    kept = np.where((ratio <= 1.2) & (ratio >= 0.8), ratio, 0)
    assert metrics["rollout/importance_masked_share"] == pytest.approx((kept == 0).mean())
    assert metrics["rollout/importance_truncated_share"] == 0
    assert metrics["rollout/importance_weight_mean"] == pytest.approx(kept.mean(), rel=1e-3)
    assert metrics["rollout/importance_effective_share"] == pytest.approx(
        kept.sum() ** 2 / len(kept) / (kept**2).sum(), rel=1e-3
    )
    capped = Learner(recipe(path, algorithm={"off_policy": {"cap": 1.2}})).step(batch).metrics
    assert capped["rollout/importance_truncated_share"] == pytest.approx((ratio > 1.2).mean())


def shaping(**options: Any) -> RewardShaping:
    return RewardShaping(config=recipe("none", algorithm=options).algorithm, max_tokens=100)


def test_running_scale_is_that_of_all_rewards_so_far() -> None:
    of, seen = shaping(reward_scale="running"), []
    for seed in range(3):
        batch = random_batch(seed=seed)
        batch = replace(batch, rewards=batch.rewards * 3 + seed)
        of.observe(batch)
        seen += batch.rewards.tolist()
    found = of.shaped(torch.tensor([1.0, 5.0]), torch.zeros(2))
    expected = (np.array([1.0, 5.0]) - np.mean(seen)) / np.std(seen)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rewards_are_clipped_and_long_answers_pay() -> None:
    of = shaping(reward_clip=2.0, overlong={"share": 0.2, "penalty": 3.0})
    found = of.shaped(torch.tensor([5.0, -5.0, 0.0, 0.0, 0.0]), torch.tensor([10, 80, 85, 100, 100]))
    assert found.tolist() == pytest.approx([2.0, -2.0, -0.75, -3.0, -3.0])


@pytest.mark.parametrize("width", [None, 32])
def test_pairs_stay_together_in_minibatches_and_micro_batches(width: int | None) -> None:
    batch = random_batch(groups=6, n=4)
    config = recipe("none", algorithm={"name": "online_dpo"}).algorithm
    units = targets(batch, config, 0.05, shaping(), None).units
    assert len(units) == 6 and all(len(unit) == 2 for unit in units)
    for part in minibatches(units, 2, 3, np.random.default_rng(0)):
        assert len(part) == 2
        for of_rank in plan(batch, part, 40, 2, width=width):
            for micro in of_rank:
                assert sorted(micro.rows) == sorted(row for unit in units for row in unit if unit[0] in micro.rows)
                assert sum(micro.bundles) == len(micro.rows)
                assert width is None or set(micro.bundles) == {2}
