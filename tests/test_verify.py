"""Verifiable rewards: gold answers, what counts as equal, and what a comparison that hangs or fails becomes."""

import asyncio
import gzip
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.reward import RewardActor
from configs.formats import parse_row
from configs.load import load
from configs.schema import Data, Reward, RewardComponent
from configs.validate import validate
from trainers import verify
from trainers.scoring import RuleFunction
from trainers.types import DataError, Group, Prompt, Rollout
from trainers.verify import Checker, gsm8k, gsm8k_gold, marked, math, math_gold

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
RIGHT = r"\boxed{1}"
TOWER = r"\boxed{9^{9^{9^{9^{9}}}}}"


@pytest.fixture
def checker() -> Iterator[Checker]:
    made = Checker(check_s=1.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("He needs 1,080 of them.\n#### 1080", True),
        ("#### $1,080", True),
        ("#### 1080.00 dollars", True),
        ("The answer is 1080.", True),
        (r"So it is \boxed{1080}.", True),
        ("She pays $20 and $1060, so the answer is $1080", True),
        ("#### 1080\nQuestion: how many are 2 and 3?", True),
        ("#### 7\nNo, again:\n#### 1080", True),
        ("#### 1080 apples for 3 kids", True),
        ("#### **1080**", True),
        ("#### about -1,080, not 1080", False),
        ("#### 3 kids, 1080 apples", False),
        ("#### 1080/2", False),
        ("#### 108", False),
        ("Each of the games is worth 1080", False),  # no final answer, perhaps cut off
        ("1080 at first, then #### 5", False),
        ("1080 at first, but 5 in the end", False),
        ("#### none", False),
        ("I do not know", False),
        ("", False),
    ],
)
def test_gsm8k_compares_the_final_number(completion: str, right: bool) -> None:
    assert gsm8k("", completion, {"question": "q", "answer": "40 * 27 = <<40*27=1080>>1,080\n#### 1,080"}) == right


@pytest.mark.parametrize(
    ("solution", "completion", "right"),
    [
        (r"Hence $\boxed{\frac{1}{2}}$.", r"The answer is $\frac{2}{4}$", True),
        (r"Hence $\boxed{\frac{1}{2}}$.", r"It is $\frac{2}{4}$", False),
        (r"Hence $\boxed{\frac{1}{2}}$.", r"\boxed{0.5}", True),
        (r"Hence $\boxed{\frac{1}{2}}$.", r"\boxed{0.6}", False),
        (r"$\boxed{\sqrt{8}}$", r"$$\boxed{2\sqrt{2}}$$", True),
        (r"$\boxed{(x+1)^2}$", r"\boxed{x^2 + 2x + 1}", True),
        (r"$\boxed{(x+1)^2}$", r"\boxed{x^2 + 1}", False),
        (r"first $\boxed{1}$, then $\boxed{[2, 5)}$", r"\boxed{[2,5)}", True),
        (r"first $\boxed{1}$, then $\boxed{[2, 5)}$", r"\boxed{(2,5)}", False),
        (r"$\boxed 3$", "The final answer is 3", True),
    ],
)
def test_math_compares_expressions(solution: str, completion: str, right: bool) -> None:
    assert math("", completion, {"problem": "p", "solution": solution}) == right


def test_marked_is_about_the_form_alone() -> None:
    assert [marked("", text, {}) for text in ("so\n#### 7", "#### ", "7")] == [1, 0, 0]


def test_gold_answers_are_taken_from_the_published_fields() -> None:
    assert gsm8k_gold({"answer": "1 + 2 = 3 #### 3\n#### -1,234,567 "}) == "-1234567"
    assert math_gold({"solution": r"\boxed{1} and \boxed{ \frac{1}{\sqrt{2}} }. End"}) == r"\frac{1}{\sqrt{2}}"
    assert math_gold({"solution": r"\boxed{\left\{ 1, 2 \right.}. End}"}) == r"\left\{ 1, 2 \right."
    assert math_gold({"solution": r"\boxed{a\\{b}c}. End"}) == r"a\\{b}c"
    assert math_gold({"solution": r"\fbox{4}"}) == "4" and math_gold({"solution": r"so $\boxed 12$."}) == "12"


@pytest.mark.parametrize(
    ("function", "row", "says"),
    [
        (gsm8k, {"prompt": "p"}, "no 'answer' with a number behind ####; is its data.format gsm8k"),
        (gsm8k, {"answer": "####  "}, "no 'answer' with a number"),
        (math, {"solution": "2"}, "no 'solution' with \\\\boxed"),
        (math, {"solution": r"\boxed{2"}, "never closed"),
    ],
)
def test_a_row_without_a_gold_answer_is_named(function: Any, row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        function("", "2", row)


def test_a_comparison_that_hangs_is_not_equal_said_once_and_the_next_one_works(
    checker: Checker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not checker.same("1", TOWER)
    [line] = caplog.messages
    assert "over 1 s of CPU" in line and "9^{9^" in line
    assert checker.same("1", RIGHT) and not checker.same("1", r"\boxed{2}")


def test_a_gold_answer_that_cannot_be_read_is_an_error_of_one_line(checker: Checker) -> None:
    with pytest.raises(ValueError, match="cannot read the gold answer ''") as error:
        checker.same("", RIGHT)
    assert "\n" not in str(error.value)
    assert checker.same("1", RIGHT)


def test_a_child_that_dies_at_a_question_is_a_wrong_answer_and_is_replaced(
    checker: Checker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kill(child: subprocess.Popen[str], question: Mapping[str, str]) -> dict[str, Any] | None:
        child.kill()
        return ask(child, question)

    ask = verify._ask
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(verify, "_ask", kill)
        assert not checker.same("1", RIGHT)
    assert "ended with code -9" in caplog.text
    assert checker.same("1", RIGHT) and checker._child is not None
    checker._child.kill()  # between two questions
    checker._child.wait()
    assert checker.same("1", RIGHT)


def test_a_child_that_cannot_start_is_an_error_and_holds_up_nobody(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="runs math-verify ended with code 1 at its start"):
            checker.same("1", RIGHT)
    monkeypatch.undo()
    assert checker.same("1", RIGHT)


SLOW = Checker(check_s=0.2)  # so that five hanging calls take much longer than one, however busy the machine


def boxed(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return SLOW.same("1", completion)


boxed.queue = SLOW


def test_calls_that_wait_behind_ones_that_hang_keep_their_deadline() -> None:
    async def scenario() -> list[float]:
        rule = RuleFunction(f"{__name__}:boxed", deadline_s=3)
        return list(await asyncio.gather(*(rule("", text, {}) for text in [*[TOWER] * 5, *[RIGHT] * 15])))

    try:
        assert asyncio.run(scenario()) == [0.0] * 5 + [1.0] * 15  # five children were started on the way
    finally:
        SLOW.close()


def test_only_the_end_of_a_completion_and_the_beginning_of_a_marked_answer_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(verify.CHECKER, "same", lambda gold, answer: asked.append(answer) or True)
    row = {"answer": "#### 1", "solution": RIGHT}
    for function, text in ((gsm8k, "#### 1" + "2" * 9000), (gsm8k, "3" * 9000), (math, "{" * 9000)):
        function("", text, row)
    assert [len(text) for text in asked] == [len("The final answer is ") + 200, 2000, 2000]


def rollout(uid: str, text: str) -> Rollout:
    return Rollout(
        uid=uid,
        seed=0,
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        spans=(),
        finish_reason="stop",
        text=text,
    )


def group(raw: dict[str, Any], *texts: str) -> Group:
    row = parse_row(raw, Data(path="x", format="gsm8k"), "x:1")
    assert row is not None
    prompt = Prompt(uid="p", position=0, messages=row.messages, token_ids=np.zeros(1, np.int32), row=row.fields)
    return Group(prompt=prompt, rollouts=tuple(rollout(f"p-{i}", text) for i, text in enumerate(texts)))


def test_a_group_is_scored_as_a_run_scores_it() -> None:
    spec = RewardComponent(name="correct", function="trainers.verify:gsm8k", weight=2)
    actor = RewardActor(Reward(components=[spec]))
    answered = group({"question": "6 * 7?", "answer": "#### 42"}, "#### 42", "#### 41", "The answer is 42.")
    scored = asyncio.run(actor.score(answered))
    assert [(one["rewards"]["correct"], one["reward"]) for one in scored] == [(1, 2), (0, 0), (1, 2)]
    broken = group({"question": "6 * 7?", "answer": "####"}, "42")
    with pytest.raises(DataError, match=r"'correct', sample p-0: trainers.verify:gsm8k raised ValueError: the row"):
        asyncio.run(actor.score(broken))


@pytest.mark.skipif(not SHARED.exists(), reason="shared/data is not beside the repository")
def test_published_answers_of_gsm8k_equal_themselves_and_the_recipe_takes_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with gzip.open(SHARED / "gsm8k_test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 1319
    for row in rows[::20]:
        assert gsm8k("", row["answer"], row) == 1
        assert gsm8k("", f"The answer is {float(gsm8k_gold(row)) + 1:.0f}.", row) == 0
    local = (f"data.path={SHARED}/gsm8k_train.jsonl.gz", f"evaluation.tasks.0.data.path={SHARED}/gsm8k_test.jsonl.gz")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # the model is not looked for
    assert validate(load(ROOT / "configs/gsm8k.yaml", [*local, "ray.address=auto"]), "train") == []
