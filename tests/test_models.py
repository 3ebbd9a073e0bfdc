"""Log-probs, values and scores against the plain HF forward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import VOCABULARY, tiny_policy
from trainers.layout import sequences
from trainers.models import (
    PolicyModel,
    ScoreModel,
    ValueModel,
    completion_logprobs,
    export,
    load_policy,
    load_sequence_classifier,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_policy(tmp_path_factory.mktemp("tiny"))


def texts(seed: int, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, rng.integers(low, high)).astype(np.int32)

    return [draw(1, 9) for _ in range(count)], [draw(1, 7) for _ in range(count)]


def naive(model: nn.Module, prompt: np.ndarray, completion: np.ndarray, temperature: float) -> tuple[torch.Tensor, ...]:
    """One unpadded sequence, all logits at once."""
    ids = torch.tensor(np.concatenate([prompt, completion]))[None].long()
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(torch.tensor(completion).long()), distribution.entropy()


@pytest.mark.parametrize("logits_per_chunk", [1, 5 * VOCABULARY, 2**24])
def test_logprobs_entropies_and_gradients_equal_full_logits(path: str, logits_per_chunk: int) -> None:
    prompts, completions = texts(0, 5)
    plain = AutoModelForCausalLM.from_pretrained(path)
    policy = PolicyModel(AutoModelForCausalLM.from_pretrained(path), logits_per_chunk=logits_per_chunk)
    batch = sequences(prompts, completions, "cpu", width=9)
    logprobs, entropies = policy(batch, temperature=0.7)
    assert logprobs.shape == entropies.shape == (5, 9)
    expected = [naive(plain, p, c, 0.7) for p, c in zip(prompts, completions, strict=True)]
    for row, (wanted, entropy) in enumerate(expected):
        torch.testing.assert_close(logprobs[row, : len(wanted)], wanted)
        torch.testing.assert_close(entropies[row, : len(wanted)], entropy)
        assert not logprobs[row, len(wanted) :].any()
    torch.cat([wanted for wanted, _ in expected]).square().sum().backward()
    logprobs.square().sum().backward()
    for mine, other in zip(policy.hf.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("token_budget", [1, 20, 10_000])
def test_completion_logprobs_do_not_depend_on_the_budget(path: str, token_budget: int) -> None:
    prompts, completions = texts(1, 7)
    policy = load_policy(path, "float32")
    found = completion_logprobs(policy, prompts, completions, 1.3, token_budget)
    for p, c, logprobs in zip(prompts, completions, found, strict=True):
        np.testing.assert_allclose(logprobs, naive(policy.hf, p, c, 1.3)[0].detach().numpy(), atol=2e-5)


def test_a_fresh_critic_is_zero_and_one_from_a_reward_model_reads_its_score(path: str, tmp_path: Path) -> None:
    prompts, completions = texts(2, 3)
    batch = sequences(prompts, completions, "cpu")
    assert not ValueModel(load_sequence_classifier(path, "float32"))(batch).any()
    reward = load_sequence_classifier(path, "float32", head="random")
    export(reward, reward.state_dict(), tmp_path, path)
    values = ValueModel(load_sequence_classifier(tmp_path, "float32"))(batch)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for t in range(len(completion)):
            score = ScoreModel(reward)(sequences([prompt], [completion[:t]], "cpu"))[0]
            torch.testing.assert_close(values[row, t], score, atol=1e-5, rtol=1e-5)


def test_an_exported_policy_is_the_same_model_with_its_tokenizer(path: str, tmp_path: Path) -> None:
    policy = load_policy(path, "float32")
    with torch.no_grad():
        policy.hf.lm_head.weight += 0.1
    export(policy.hf, {n: p.detach() for n, p in policy.hf.named_parameters()}, tmp_path, path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(again(ids).logits, policy.hf(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w7")["input_ids"] == [5, 7]
