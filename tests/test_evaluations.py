"""Evaluation tasks: the same prompts in every run, versions that are due, scores per prompt."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Data, EvalScorer, EvalTask, SamplingParams
from tests.tiny import tokenizer
from trainers.evaluations import due_versions, milestones, prepare, summarise, unused
from trainers.records import read_evaluations, write_evaluations
from trainers.types import Evaluation, Group, Rollout


def task(path: Path, prompts: int) -> EvalTask:
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "label": "safe"}) + "\n" for i in range(20)))
    return EvalTask(
        name="quiz",
        data=Data(path=str(path), render="text"),
        prompts=prompts,
        sampling=SamplingParams(n=2, max_tokens=8),
        scorers=[EvalScorer(name="length", function="actors.rules:length")],
    )


def rollout(uid: str, text: str) -> Rollout:
    return Rollout(
        uid=uid,
        seed=0,
        token_ids=np.zeros(3, np.int32),
        logprobs=np.zeros(3, np.float32),
        spans=(),
        finish_reason="length",
        text=text,
    )


def test_fewer_prompts_are_the_first_of_more(tmp_path: Path) -> None:
    few, many = (prepare(task(tmp_path / "rows.jsonl", n), tokenizer(), 100).prompts for n in (5, 50))
    assert [p.uid for p in few] == [p.uid for p in many[:5]]
    assert len(many) == 20 and len({p.uid for p in many}) == 20


def test_unused_prompts_come_after_the_evaluated_ones_each_text_once(tmp_path: Path) -> None:
    asked = task(tmp_path / "rows.jsonl", 5)
    path = tmp_path / "rows.jsonl"
    path.write_text(2 * path.read_text())
    evaluated = {prompt.messages[0]["content"] for prompt in prepare(asked, tokenizer(), 100).prompts}
    texts = [prompt.messages[0]["content"] for prompt in unused(asked, tokenizer(), 100, most=50)]
    assert len(texts) == len(set(texts)) == 20 - len(evaluated) and not evaluated & set(texts)
    some = [prompt.messages[0]["content"] for prompt in unused(asked, tokenizer(), 100, most=3)]
    assert some == texts[:3]


@pytest.mark.parametrize(
    ("steps", "every", "due", "landmarks"),
    [
        (40, 10, (0, 10, 20, 30, 40), {0, 20, 40}),
        (48, 4, tuple(range(0, 49, 4)), {0, 24, 48}),
        (7, 3, (0, 3, 6, 7), {0, 3, 7}),
        (5, 10, (0, 5), {0, 5}),
        (1, 1, (0, 1), {0, 1}),
    ],
)
def test_first_last_and_multiples_are_due(steps: int, every: int, due: tuple[int, ...], landmarks: set[int]) -> None:
    assert due_versions(steps, every) == due
    assert milestones(steps, every) == landmarks <= set(due)


def test_scores_are_means_over_a_prompts_samples_and_every_sample_is_kept(tmp_path: Path) -> None:
    prompts = prepare(task(tmp_path / "rows.jsonl", 2), tokenizer(), 100).prompts
    groups = [
        Group(prompt=prompt, rollouts=tuple(rollout(f"{prompt.uid}-s{i}", "x" * i) for i in range(2)))
        for prompt in prompts
    ]
    result = summarise(3, "quiz", groups, {"score": [[1, 2], [5, 8]], "other": [[0, 0], [1, 0]]})
    assert result.prompt_uids == tuple(p.uid for p in prompts) and result.version == 3
    np.testing.assert_array_equal(result.scores["score"], [1.5, 6.5])
    np.testing.assert_array_equal(result.scores["other"], [0, 0.5])
    assert [sample["score"] for sample in result.samples] == [1, 2, 5, 8]
    assert result.samples[3]["completion"] == "x" and result.samples[3]["label"] == "safe"
    assert result.samples[0]["prompt"] == prompts[0].messages[0]["content"]


def test_any_completion_is_read_back_as_it_was(tmp_path: Path) -> None:
    text = "".join(map(chr, (*range(0x100), 0x2028, 0x2029, 0x1F600)))  # line ends of every kind among them
    scores = {"gold": np.array([0.5, np.nan], np.float32)}
    samples = ({"prompt": "p", "completion": text},) * 2
    written = Evaluation(version=3, task="quiz", prompt_uids=("a", "b"), scores=scores, samples=samples)
    write_evaluations(tmp_path, [written])
    [found] = read_evaluations(tmp_path)[3]
    assert found.samples == samples and found.prompt_uids == ("a", "b")
    np.testing.assert_array_equal(found.scores["gold"], scores["gold"])
