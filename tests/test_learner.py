"""One rank or two, any ZeRO stage, any token budget: the same training."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.ranks import RUNS, random_batch, recipe, tiny_policy, train_and_publish
from trainers.critic import Critic
from trainers.engine import free_port, learning_rate_factor, load_ops
from trainers.kl import adapt
from trainers.learner import Learner
from trainers.microbatch import MicroBatch
from trainers.types import Batch

# They train on one pair of each group, or on its best rollout: 3 units in 2 minibatches, so that one of two ranks has
# nothing of the second.
CHOOSERS = ("online_dpo", "rft")
# At 1e-3 an update moves a weight by about 1e-3, so equality to 1e-5 sees a loss that is scaled or shared out wrongly.
# Sums in another order differ by 1e-7, which Adam magnifies where a gradient is about 0; bit-equality is not to be had.
# Every step is clipped, and with such an eps it matters by how much.
OPTIMIZER = {"optimizer": {"learning_rate": 3e-3, "warmup_steps": 1, "eps": 1e-3, "max_grad_norm": 0.05}}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_policy(tmp_path_factory.mktemp("tiny"))


def two_ranks(path: str, directory: Path, learner: dict[str, Any], runs: Sequence[tuple[str, int]] = RUNS) -> None:
    """Run `train_and_publish` in two processes."""
    directory.mkdir()
    arguments = {
        "path": path,
        "runs": runs,
        "ranks": 2,
        "port": free_port(),
        "directory": str(directory),
        "learner": learner,
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", json.dumps({**arguments, "rank": rank})],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_zero_stages_and_token_budgets_train_the_same_policy(path: str, tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    alone = (*RUNS, *((name, 0) for name in CHOOSERS))
    shared = (*RUNS, *((name, zero) for name in CHOOSERS for zero in (2, 3)))
    train_and_publish(path, alone, 0, 1, 0, str(one), {"token_budget": 10_000, **OPTIMIZER})
    two_ranks(path, tmp_path / "two", {"token_budget": 30, **OPTIMIZER}, shared)
    start = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for ranks, name, zero in [*(("one", *run) for run in alone), *(("two", *run) for run in shared)]:
        expected = torch.load(one / f"{name}-zero0.pt", weights_only=False)
        moved = max(float((start[key] - tensor).abs().max()) for key, tensor in expected["state"].items())
        assert moved > 100 * TOLERANCE["atol"]
        found = torch.load(tmp_path / f"{ranks}/{name}-zero{zero}.pt", weights_only=False)
        assert found["state"].keys() == expected["state"].keys()
        for key, tensor in expected["state"].items():
            where = f"{ranks} {name} zero {zero} {key}: "
            torch.testing.assert_close(found["state"][key], tensor, **TOLERANCE, msg=where.__add__)
        np.testing.assert_allclose(found["probe"], expected["probe"], atol=1e-4)
        for mine, other in zip(found["metrics"], expected["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-5), (ranks, name, zero)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    missing, unexpected = loaded.load_state_dict(expected["state"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied: published once


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_step_is_the_plain_autograd_step(path: str, share_prompts: bool) -> None:
    """Against the loss of the papers written out on full logits, in one batch, with torch's AdamW."""
    batch = random_batch(seed=5)
    # With a large eps the step is the clipped gradient's; with a tiny one it would be the sign of rounding errors.
    optimizer = {"learning_rate": 1e-2, "eps": 1e-2, "max_grad_norm": 0.1}
    learner = Learner(
        recipe(path, learner={"token_budget": 60, "share_prompts": share_prompts, "optimizer": optimizer})
    )
    stats = learner.step(batch)
    model = AutoModelForCausalLM.from_pretrained(path)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0)
    rewards = torch.tensor(batch.rewards).view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True, correction=0)).flatten()
    total = torch.zeros(())
    for i, (prompt, row) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        completion = torch.tensor(row[batch.mask[i]]).long()
        ids = torch.cat([torch.tensor(prompt).long(), completion])[None]
        scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logprobs = scores.gather(1, completion[:, None])[:, 0]
        count = len(completion)
        importance = (logprobs.detach() - torch.tensor(batch.behaviour_logprobs[i, :count])).exp().clamp(max=2.0)
        ratio = (logprobs - logprobs.detach()).exp()
        penalty = 0.05 * (logprobs - torch.tensor(batch.reference_logprobs[i, :count])).square() / 2
        total = total + (importance * (penalty - advantages[i] * ratio)).sum()
    loss = total / batch.mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.2, "nothing was clipped"
    adam.step()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-4)
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, tensor in learner.state_dict_for_publish().items():
        step = model.state_dict()[name] - start[name]
        torch.testing.assert_close(tensor - start[name], step, rtol=1e-3, atol=1e-3 * float(step.abs().max()))


@pytest.mark.parametrize(("zero", "dtype"), [(2, "bfloat16"), (3, "float32"), (0, "bfloat16")])
def test_a_loaded_learner_goes_on_bit_equal(path: str, tmp_path: Path, zero: int, dtype: str) -> None:
    optimizer = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2}
    sections = {
        "learner": {"zero": zero, "optimizer": optimizer},
        "model": {"path": path, "dtype": dtype},
        "algorithm": {"minibatches": 2, "epochs": 2, "kl": {"target": 1.0, "horizon": 50}},
    }
    first = Learner(recipe(path, **sections))
    first.step(random_batch(seed=1))
    first.save(tmp_path)
    expected = [first.step(random_batch(seed=seed)) for seed in (2, 3)]
    torch.rand(3)
    second = Learner(recipe(path, **sections))
    second.load(tmp_path)
    found = [second.step(random_batch(seed=seed)) for seed in (2, 3)]
    assert found == expected
    assert expected[0].metrics["kl/coefficient"] != 0.05
    mine, other = second.state_dict_for_publish(), first.state_dict_for_publish()
    assert all(torch.equal(mine[name], other[name]) for name in other)
    start = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert any(not torch.equal(start[name].to(other[name].dtype), other[name]) for name in other)


def test_a_raised_kl_coefficient_is_that_of_the_next_step_and_of_the_checkpoint(path: str, tmp_path: Path) -> None:
    raised, plain = Learner(recipe(path)), Learner(recipe(path, algorithm={"kl": {"coefficient": 0.2}}))
    assert raised.raise_kl(4.0, 12, 0)
    raised.save(tmp_path)
    again = Learner(recipe(path))
    again.load(tmp_path)
    assert not again.raise_kl(4.0, 16, 0) and not again.raise_kl(4.0, 16, 12), "the same fall"
    states = []
    for learner in (plain, raised, again):
        assert learner.step(random_batch()).metrics["kl/coefficient"] == 0.2
        states.append(learner.state_dict_for_publish())
    assert all(torch.equal(state[name], tensor) for state in states[1:] for name, tensor in states[0].items())
    assert again.raise_kl(4.0, 16, 13) and again.kl.value == 0.8, "another fall"


def test_policy_and_critic_raise_an_adaptive_coefficient_alike(path: str) -> None:
    kl = {"where": "reward", "estimator": "k1", "target": 1.0, "horizon": 100}
    config = recipe(path, algorithm={"name": "ppo", "kl": kl})
    learner, critic, batch = Learner(config), Critic(config), random_batch()
    for trained in (learner, critic):
        assert trained.raise_kl(2.0, 8, 0)
    values = critic.values(batch)
    learner.step(batch, values)
    critic.step(batch, values)
    observed = float(((batch.behaviour_logprobs - batch.reference_logprobs) * batch.mask).sum(1).mean())
    assert learner.kl.value == critic.kl.value == adapt(0.1, observed, 1 / 4, 100, len(batch.uids)) != 0.1


def test_untied_weights_are_published_and_exported(tmp_path: Path) -> None:
    learner = Learner(recipe(tiny_policy(tmp_path / "untied", tied=False), learner={"zero": 3}))
    learner.step(random_batch())
    state = learner.state_dict_for_publish()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= state.keys()
    learner.export(tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    probe = np.array([7, 9, 4, 30], np.int32)
    logprobs = model(torch.tensor(probe)[None].long()).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(probe[1:])[:, None].long())[:, 0].detach()
    np.testing.assert_allclose(learner.probe_logprobs(probe), expected, atol=1e-5)


def logprobs_of(learner: Learner, batch: Batch) -> torch.Tensor:
    """Return the learner's own log-probs (B, T) of the rollouts, as it computes them before several updates."""
    return learner._recomputed(batch, learner.trainee.targets(batch, None)).proximal


def on_policy(learner: Learner, batch: Batch) -> Batch:
    """Record the learner's own log-probs as behaviour and reference."""
    own = logprobs_of(learner, batch).numpy()
    return replace(batch, behaviour_logprobs=own, reference_logprobs=own)


def test_gaps_tell_fresh_stale_and_mixed_tokens_apart(path: str) -> None:
    learner = Learner(recipe(path))
    batch = on_policy(learner, random_batch())
    rows = np.arange(len(batch.uids))[:, None]
    first = np.arange(batch.mask.shape[1])[None] == 0
    long = batch.mask.sum(1, keepdims=True) > 1
    mixed = (rows < 6) & long  # versions 2 and 3; the other rows: 3 (fresh) up to row 9, then 2 (stale)
    versions = np.where(mixed & first, 2, np.where(rows > 9, 2, 3))
    offset = np.where(mixed, 0.5, np.where(rows > 9, 9.0, 0.25))
    behaviour = ((batch.behaviour_logprobs - offset) * batch.mask).astype(np.float32)
    batch = replace(
        batch, version=3, token_versions=(versions * batch.mask).astype(np.int32), behaviour_logprobs=behaviour
    )
    metrics = learner.step(batch).metrics
    assert metrics["rollout/mixed_gap"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["rollout/behaviour_gap"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["kl/reference"] == pytest.approx(0, abs=1e-4)
    assert "rollout/mixed_gap" not in learner.step(on_policy(learner, random_batch())).metrics


def test_steps_raise_the_probability_of_what_is_rewarded(path: str) -> None:
    learner = Learner(recipe(path, algorithm={"kl": {"where": "none"}, "epochs": 2}))
    batch = replace(on_policy(learner, random_batch()), reference_logprobs=None)
    before = logprobs_of(learner, batch).sum(1)
    for _ in range(4):
        stats = learner.step(batch)
        batch = on_policy(learner, batch)
        batch = replace(batch, reference_logprobs=None)
    change = logprobs_of(learner, batch).sum(1) - before
    rewards = torch.tensor(batch.rewards).view(-1, 4)
    best, worst = rewards.argmax(1), rewards.argmin(1)
    per_group = change.view(-1, 4)
    assert (per_group[range(3), best] > per_group[range(3), worst]).all()
    assert "kl/reference" not in stats.metrics


def test_ppo_with_a_critic(path: str, tmp_path: Path) -> None:
    config = recipe(
        path,
        algorithm={"name": "ppo", "kl": {"where": "reward", "estimator": "k1"}, "minibatches": 2, "epochs": 2},
        critic={"zero": 2, "token_budget": 40, "optimizer": {"learning_rate": 1e-2}},
    )
    learner, critic = Learner(config), Critic(config)
    batch = random_batch(seed=3)
    losses = []
    for _ in range(6):
        values = critic.values(batch)
        stats = learner.step(batch, values)
        losses.append(critic.step(batch, values)["loss/value"])
    assert np.isfinite(stats.loss) and stats.metrics["policy/clip_fraction"] > 0
    assert losses[-1] < 0.7 * losses[0]
    assert not critic.values(batch)[~batch.mask].any()
    critic.save(tmp_path / "state")
    again = Critic(config)
    again.load(tmp_path / "state")
    np.testing.assert_array_equal(again.values(batch), critic.values(batch))
    critic.export(tmp_path / "exported")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").config.num_labels == 1


def test_a_critics_step_by_hand(path: str) -> None:
    """With gamma = lam = 1 and no KL the return of every token is its rollout's reward."""
    critic = Critic(recipe(path, algorithm={"name": "ppo", "lam": 1.0, "kl": {"coefficient": 0.0}}))
    batch = random_batch()
    values = critic.values(batch)
    metrics = critic.step(batch, values)
    before = values[batch.mask]
    returns = np.broadcast_to(batch.rewards[:, None], batch.mask.shape)[batch.mask]
    assert metrics["loss/value"] == pytest.approx(((before - returns) ** 2).mean() / 2, rel=1e-4)
    assert metrics["value/mean"] == pytest.approx(before.mean(), rel=1e-4)
    assert metrics["value/explained_variance"] == pytest.approx(1 - (returns - before).var() / returns.var(), rel=1e-4)


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run(path: str, zero: int, broken: float) -> None:
    learner, batch = Learner(recipe(path, learner={"zero": zero})), random_batch()

    def loss(micro: MicroBatch) -> torch.Tensor:
        return learner._forward(batch, micro)[0].sum() * broken

    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        learner.trainee.update(batch, [(row,) for row in range(12)], loss)


def test_gradient_checkpointing_changes_nothing(path: str) -> None:
    states = []
    for on in (False, True):
        learner = Learner(recipe(path, learner={"gradient_checkpointing": on, "zero": 3}))
        learner.step(random_batch())
        states.append(learner.state_dict_for_publish())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_learning_rate_schedules() -> None:
    constant = [learning_rate_factor(step, "constant", 3, 10) for step in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = [learning_rate_factor(step, "linear", 2, 10) for step in (2, 6, 10, 12)]
    assert linear == [1.0, 0.5, 0.0, 0.0]
    assert [learning_rate_factor(step, "cosine", 0, 10) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


def test_a_process_killed_while_it_built_the_op_blocks_nobody(tmp_path: Path) -> None:
    load_ops()
    built = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    ours = shutil.copytree(built, tmp_path / built.name)
    left = ours / "deepspeed_shm_comm" / "lock"
    left.touch()  # what torch waits for, as long as it exists
    command = [sys.executable, "-c", "from trainers.engine import load_ops; load_ops(); print('loaded')"]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert child.stdout.splitlines()[-1:] == ["loaded"], child.stderr
    assert not left.exists()


def test_joining_a_group_prints_nothing() -> None:
    command = [sys.executable, "-c", "from trainers.engine import Process, join; join(Process()); print('joined')"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert child.stdout == "joined\n", child.stderr
