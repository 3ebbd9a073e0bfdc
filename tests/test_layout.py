"""Completions that share their prompt's row against each alone in plain HF, and the plan of micro-batches."""

from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import reward_model
from trainers.layout import TREE_FAMILIES, sequences, tree_width
from trainers.microbatch import best_branches, bundle, pack, plan
from trainers.models import PolicyModel, ScoreModel, ValueModel, completion_logprobs
from trainers.scoring import Judged, RewardModel
from trainers.types import Message

VOCABULARY = 50
SIZES = (3, 1, 4)  # completions behind each of three prompts


def tiny_config(family: str, **changes: object) -> AutoConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {} if family == "gpt_neox" else {"num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": 1}
    return AutoConfig.for_model(family, **shape, **heads, **tokens, **changes)


def tree(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three prompts with SIZES completions, one of them empty."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, VOCABULARY, rng.integers(2, 9)).astype(np.int32) for _ in SIZES]
    completions = [rng.integers(1, VOCABULARY, rng.integers(1, 8)).astype(np.int32) for _ in range(sum(SIZES))]
    completions[1] = completions[1][:0]
    return [prompt for prompt, n in zip(prompts, SIZES, strict=True) for _ in range(n)], completions


def alone(hf: torch.nn.Module, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """The plain forward pass of one unpadded text: its logits."""
    return hf(input_ids=torch.tensor(np.concatenate([prompt, completion]))[None].long()).logits[0]


@pytest.mark.parametrize("family", sorted(TREE_FAMILIES))
def test_a_shared_prompt_changes_no_logprob_and_no_gradient(family: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(family, **({"sliding_window": None} if family == "mistral" else {}))
    shared, plain = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    shared.load_state_dict(plain.state_dict())
    assert tree_width(shared) == 32
    prompts, completions = tree(1)
    batch = sequences(prompts, completions, "cpu", bundles=SIZES)
    assert batch.input_ids.shape[0] == len(SIZES)
    logprobs, _ = PolicyModel(shared)(batch, temperature=0.8)
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = alone(plain, prompt, completion)[len(prompt) - 1 : -1] / 0.8
        wanted = torch.tensor(completion).long()[:, None]
        expected.append(logits.log_softmax(-1)[: len(wanted)].gather(1, wanted)[:, 0])
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(logprobs[row, : len(wanted)], wanted, atol=2e-5, rtol=1e-4)
        assert not logprobs[row, len(wanted) :].any()
    torch.cat(expected).square().sum().backward()
    logprobs.square().sum().backward()
    for mine, other in zip(shared.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-3)


def test_values_and_scores_behind_a_shared_prompt_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    hf = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    prompts, completions = tree(2)
    batch = sequences(prompts, completions, "cpu", bundles=SIZES)
    single = sequences(prompts, completions, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(ValueModel(hf)(batch), ValueModel(hf)(single), atol=1e-5, rtol=1e-4)
        scores = ScoreModel(hf)(batch)
        expected = torch.stack([alone(hf, p, c)[0] for p, c in zip(prompts, completions, strict=True)])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert scores.std() > 0.01


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"sliding_window": 8}), ("gemma2", {"head_dim": 8}), ("llama", {"attn_implementation": "eager"})],
)
def test_a_model_that_cannot_share_is_not_asked_to(family: str, changes: dict[str, object]) -> None:
    assert tree_width(AutoModelForCausalLM.from_config(tiny_config(family, **changes))) is None


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_completion_logprobs_are_alike_with_and_without_sharing(token_budget: int) -> None:
    torch.manual_seed(0)
    policy = PolicyModel(AutoModelForCausalLM.from_config(tiny_config("llama")))
    prompts, completions = tree(3)
    order = np.random.default_rng(0).permutation(len(prompts))  # a group's rollouts need not be neighbours
    chosen = [prompts[i] for i in order], [completions[i] for i in order]
    apart = completion_logprobs(policy, *chosen, 1.0, token_budget)
    together = completion_logprobs(policy, *chosen, 1.0, token_budget, width=32)
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_reward_model_scores_alike_with_and_without_sharing(tmp_path: Path) -> None:
    path = reward_model(tmp_path, chat=True)
    first, second = ((Message(role="user", content=text),) for text in ("what is it?", "and what else?"))
    items = [Judged(messages=m, completion=c) for m, c in [(first, "a"), (second, "bc"), (first, "ad"), (first, "a")]]
    together, apart = (RewardModel(path, share_prompts=share) for share in (True, False))
    assert (together.width, apart.width) == (32, None)
    np.testing.assert_allclose(together.score(items), apart.score(items), atol=1e-5)
    alone_scores = [together.score([item])[0] for item in items]
    np.testing.assert_allclose(together.score(items), alone_scores, atol=1e-5)


@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("token_budget", [1, 90, 10_000])
def test_micro_batches_cover_all_rows_once_within_the_budget_and_equally_many(
    ranks: int, token_budget: int, width: int | None
) -> None:
    rng = np.random.default_rng(ranks)
    for count in (1, 2, 17):
        prompts = [np.full(3 + row // 4, row // 4) for row in range(40)]  # groups of four
        lengths = rng.integers(1, 20, 40).tolist()
        rows = [int(row) for row in rng.permutation(40)[:count]]
        planned = plan(bundle(rows, prompts, lengths, token_budget, ranks, width=width), token_budget, ranks)
        assert len({len(micro_batches) for micro_batches in planned}) == 1 and len(planned) == ranks
        real = [m for m in chain.from_iterable(planned) if m.counts]
        assert sorted(chain.from_iterable(m.rows for m in real)) == sorted(rows)
        for micro in real:
            assert sum(micro.bundles) == len(micro.rows)
            edges = np.cumsum([0, *micro.bundles])
            inside = [micro.rows[a:b] for a, b in zip(edges, edges[1:], strict=False)]
            assert all(len({row // 4 for row in members}) == 1 for members in inside)
            row_lengths = [len(prompts[m[0]]) + sum(lengths[row] for row in m) for m in inside]
            assert len(inside) * max(row_lengths) <= token_budget or len(micro.rows) == 1


def test_siblings_share_a_bundle_up_to_the_size_that_costs_least() -> None:
    prompts = [np.arange(57)] * 64
    whole = bundle(range(8), prompts, [48] * 64, 10_000, width=576)
    assert [len(one.rows) for one in whole] == [8]

    def cost(m: float, width: int) -> float:
        tokens = 57 + m * 48
        return (6 * width * tokens + tokens**2) / m

    for width in (32, 576, 4096):
        best = best_branches(57, 48, width)
        assert all(cost(best, width) <= cost(best * factor, width) for factor in (0.5, 0.9, 1.1, 2))
    many = bundle(range(64), prompts, [48] * 64, 10_000, width=576)
    assert max(len(one.rows) for one in many) <= best_branches(57, 48, 576) + 1


@pytest.mark.parametrize("fewest", [True, False])
@pytest.mark.parametrize("token_budget", [1, 64, 128, 320, 1000])
def test_groups_are_the_cheapest_of_all_ways_to_cut_the_sorted_lengths(token_budget: int, fewest: bool) -> None:
    def cost(sizes: list[tuple[int, int]]) -> tuple[float, float]:  # longest, rows
        padded = sum(longest * rows for longest, rows in sizes)
        return (len(sizes), padded) if fewest else (padded + token_budget // 32 * len(sizes), 0)

    rng = np.random.default_rng(token_budget)
    for count in (1, 2, 9):
        lengths = rng.integers(1, 100, count).tolist()
        longest_first = sorted(lengths, reverse=True)
        ways = []
        for number in range(count):
            for places in combinations(range(1, count), number):
                edges = [0, *places, count]
                sizes = [(longest_first[a], b - a) for a, b in zip(edges, edges[1:], strict=False)]
                if all(longest * rows <= token_budget or rows == 1 for longest, rows in sizes):
                    ways.append(cost(sizes))
        groups = pack(range(count), lengths, token_budget, fewest=fewest)
        assert [lengths[item] for group in groups for item in group] == longest_first
        assert cost([(lengths[group[0]], len(group)) for group in groups]) == min(ways)
