"""Reward models and functions: scores do not depend on company, and a failure is never a number."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.batching import Batcher
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from configs.errors import UserError
from configs.schema import Reference, Reward, RewardComponent
from tests.tiny import encoder_reward_model, policy, reward_model, tokenizer
from trainers.data import conversation_ids
from trainers.scoring import Judged, RewardModel, RuleFunction, combine
from trainers.types import DataError, Group, Message, Prompt, Rollout

ITEMS = [
    Judged(messages=(Message(role="user", content="q" * length),), completion=text)
    for length, text in ((3, "yes"), (40, "no"), (9, "perhaps, but who can say"), (1, ""), (9, "never"))
]


def shout(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return float(completion.isupper())


async def slowly(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    await asyncio.sleep(row.get("seconds", 0))
    return row["value"] + len(prompt)


def fail(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    raise KeyError("answer")


def nan(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return math.nan


TURN = threading.Lock()
CALLED: list[str] = []


def queued(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    CALLED.append(completion)
    return len(prompt)


queued.queue = TURN


def hang(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    time.sleep(2)
    return 1.0


def group(texts: Sequence[str] = ("a", "B"), row: Mapping[str, Any] | None = None) -> Group:
    prompt = Prompt(
        uid="e0-p7",
        position=7,
        messages=(Message(role="user", content="hey"),),
        token_ids=np.array([5, 6, 7], np.int32),
        row=row or {},
    )
    rollouts = tuple(
        Rollout(
            uid=f"e0-p7-s{i}",
            seed=i,
            token_ids=np.array([8 + i] * (i + 1), np.int32),
            logprobs=np.zeros(i + 1, np.float32),
            spans=(),
            finish_reason="stop",
            text=text,
        )
        for i, text in enumerate(texts)
    )
    return Group(prompt=prompt, rollouts=rollouts)


@pytest.mark.parametrize("write", [reward_model, encoder_reward_model])
@pytest.mark.parametrize("chat", [False, True])
def test_a_score_is_that_of_hf_on_the_text_alone_whatever_the_batch(
    tmp_path: Path, chat: bool, write: Callable[..., str]
) -> None:
    path = write(tmp_path / "right", chat=chat)
    hf = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    ids = [conversation_ids(tokenizer(chat=chat), item.messages, item.completion) for item in ITEMS]
    with torch.no_grad():
        alone = [float(hf(input_ids=torch.tensor([row])).logits[0, 0]) for row in ids]
    assert np.ptp(alone) > 1e-3, "the oracle must tell the items apart"
    for budget in (1, 60, 10_000):
        scores = RewardModel(path, token_budget=budget).score(ITEMS)
        np.testing.assert_allclose(scores, alone, atol=2e-6)
    model = RewardModel(path)
    np.testing.assert_allclose(model.score(ITEMS[::-1])[::-1], alone, atol=2e-6)
    left = RewardModel(write(tmp_path / "left", chat=chat, padding_side="left"))
    np.testing.assert_allclose(left.score(ITEMS), alone, atol=2e-6)


def test_more_than_one_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has 3 outputs; give a model with one"):
        RewardModel(reward_model(tmp_path, num_labels=3))


def test_reward_functions_may_be_async_and_see_prompt_and_row() -> None:
    rule = RuleFunction(f"{__name__}:slowly")
    assert asyncio.run(rule("four", "", {"value": 0.5})) == 4.5
    assert asyncio.run(RuleFunction(f"{__name__}:shout")("", "HI", {})) == 1.0


@pytest.mark.parametrize(
    ("function", "row", "message"),
    [
        ("fail", {}, "raised KeyError: 'answer'"),
        ("nan", {}, "returned nan"),
        ("hang", {}, "took longer than 0.2 s"),
        ("slowly", {"seconds": 5, "value": 1}, "took longer than 0.2 s"),
        ("slowly", {"value": "text"}, "raised TypeError"),
    ],
)
def test_a_failing_reward_function_names_component_and_sample(
    function: str, row: Mapping[str, Any], message: str
) -> None:
    components = [RewardComponent(name="mine", function=f"{__name__}:{function}")]
    actor = RewardActor(Reward(components=components, deadline_s=0.2))
    with pytest.raises(DataError, match=rf"'mine', sample e0-p7-s\d: {__name__}:{function} {message}"):
        asyncio.run(actor.score(group(row=row)))


def test_the_wait_in_a_functions_queue_is_no_part_of_its_deadline() -> None:
    async def scenario() -> None:
        rule = RuleFunction(f"{__name__}:queued", deadline_s=0.2)
        with TURN:
            waiting, given_up = (asyncio.create_task(rule("four", text, {})) for text in ("", "given up"))
            await asyncio.wait([waiting], timeout=0.5)
            assert not waiting.done()
            given_up.cancel()
            await asyncio.wait([given_up])
        assert await waiting == 4
        assert await rule("four", "", {}) == 4
        assert CALLED == ["", ""]

    asyncio.run(scenario())


def test_a_function_that_cannot_be_imported_is_the_users_mistake() -> None:
    for spec in ("no_such_module:f", "actors.rules:no_such", "actors.rules:WORD", "actors.rules"):
        with pytest.raises(UserError, match=spec):
            RuleFunction(spec)


def test_components_are_weighed_and_kept_raw(tmp_path: Path) -> None:
    path = reward_model(tmp_path)
    components = [
        RewardComponent(name="model", model=path, weight=2),
        RewardComponent(name="shout", function=f"{__name__}:shout", weight=-0.5),
    ]
    scored = asyncio.run(RewardActor(Reward(components=components)).score(group()))
    items = [Judged(messages=group().prompt.messages, completion=text) for text in ("a", "B")]
    expected = RewardModel(path).score(items)
    for fields, model, loud in zip(scored, expected, (0.0, 1.0), strict=True):
        assert fields["rewards"] == pytest.approx({"model": model, "shout": loud}, abs=1e-6)
        assert fields["reward"] == pytest.approx(2 * model - 0.5 * loud, abs=1e-6)
    assert combine({"a": 3.0, "b": 1.0}, {"a": 0.5, "b": -1.0}) == 0.5


def test_reference_logprobs_are_those_of_a_tempered_softmax(tmp_path: Path) -> None:
    path = policy(tmp_path)
    actor = ReferenceActor(path, Reference(token_budget=8), "float32", 0.7)
    example = group(("a", "b", "c"))
    fields = asyncio.run(actor.score(example))
    hf = actor._model.hf
    for rollout, field in zip(example.rollouts, fields, strict=True):
        ids = np.concatenate([example.prompt.token_ids, rollout.token_ids])
        with torch.no_grad():
            logits = hf(torch.tensor(ids[None], dtype=torch.long)).logits[0, 2:-1] / 0.7
        expected = logits.log_softmax(-1)[range(len(rollout.token_ids)), rollout.token_ids]
        np.testing.assert_allclose(field["reference_logprobs"], expected, atol=2e-6)


def test_calls_that_wait_share_the_next_forward_pass_and_only_failures_of_their_batch() -> None:
    batches: list[list[int]] = []

    def double(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        time.sleep(0.05)
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(double)
        first = asyncio.create_task(batcher.submit([1, 2]))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher.submit([number])) for number in (3, 4, 5)]
        assert await first == [2, 4]
        assert await asyncio.gather(*others) == [[6], [8], [10]]
        assert batches == [[1, 2], [3, 4, 5]]
        with pytest.raises(ValueError, match="unlucky"):
            await batcher.submit([13])
        assert await batcher.submit([7]) == [14]
        times = batcher.times()
        assert times["busy"] >= 0.2 and times["waiting"] >= 0

    asyncio.run(scenario())
