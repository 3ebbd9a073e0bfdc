"""What is refused of a DPO policy as a scorer, and of a loss: one line that names the key."""

from collections.abc import Mapping
from typing import Any

import pytest

from configs.checks import check_data, check_loss, check_source
from configs.errors import UserError
from configs.schema import EvalScorer, Offline, Recipe, RewardComponent
from configs.validate import validate


def training(**fields: Any) -> Offline:
    return Offline.model_validate({"output": "o", "data": {"path": "p.jsonl", "format": "pairs"}, **fields})


@pytest.mark.parametrize(
    ("command", "fields", "says"),
    [
        ("reward", {"loss": "ipo"}, "reward_models.a.loss: headroom reward has no loss 'ipo'; choose one of bradley"),
        ("dpo", {"loss": "kwise"}, "choose one of dpo, ipo"),
        ("sft", {"loss": "dpo"}, "it has one loss: leave the key out"),
        ("reward", {"beta": 0.5}, "reward_models.a.beta: headroom reward does not read it"),
        ("sft", {"label_smoothing": 0.1}, "label_smoothing"),
        ("reward", {"length_normalisation": True}, "length_normalisation"),
        ("reward", {"margin_scale": 0.5}, "set reward_models.a.loss=margin, or leave it out"),
    ],
)
def test_a_loss_of_another_training_is_refused(command: Any, fields: Mapping[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        check_loss("reward_models.a", training(**fields), command)
    assert says in str(refused.value)


@pytest.mark.parametrize("loss", [None, "bradley_terry", "margin", "kwise"])
def test_a_loss_of_its_own_is_not(loss: str | None) -> None:
    check_loss("reward_models.a", training(loss=loss, beta=0.1), "reward")
    check_loss("reward_models.a", training(loss="margin", margin_scale=0.3), "reward")
    check_loss("dpo", training(loss="ipo", beta=0.5, label_smoothing=0.2), "dpo")


@pytest.mark.parametrize(
    ("command", "data", "says"),
    [
        ("sft", {"format": "prompt"}, "data.format: 'prompt' rows hold no completions; use one of pairs, "),
        ("dpo", {"format": "gsm8k"}, "data.format: 'gsm8k' rows hold no preference pairs; use one of pairs, "),
        ("sft", {"columns": {"prompt": "q"}}, "data.columns: completions are read from chosen, or completions"),
        ("dpo", {"columns": {"prompt": "q"}}, "data.columns: preference pairs are read from chosen and rejected"),
        ("reward", {"columns": {"prompt": "q", "chosen": "c"}}, "or completions and scores; name their columns"),
        ("sft", {"max_prompt_tokens": 9}, "data.max_prompt_tokens: headroom sft does not read it"),
        ("dpo", {"max_prompt_tokens": 9}, "data.max_prompt_tokens: headroom dpo does not read it"),
        ("reward", {"max_prompt_tokens": 9}, "a.max_length bounds prompt and completion together; leave it out"),
        ("reward", {"render": "text"}, "a.data.render: headroom reward does not read it"),
    ],
)
def test_data_that_a_training_cannot_use_or_would_ignore_are_refused(
    command: Any, data: Mapping[str, Any], says: str
) -> None:
    of = training(data={"path": "p.jsonl", "format": "columns" if "columns" in data else "pairs", **data})
    with pytest.raises(UserError) as refused:
        check_data("reward_models.a", of, command)
    assert str(refused.value).startswith("reward_models.a.data.") and says in str(refused.value)


def test_data_that_a_training_reads_are_not() -> None:
    def of(**data: Any) -> Offline:
        return training(data={"path": "p.jsonl", "format": "columns" if "columns" in data else "pairs", **data})

    check_data("sft", of(columns={"prompt": "q", "chosen": "c"}, render="text", max_prompt_tokens=512), "sft")
    check_data("dpo", of(columns={"prompt": "q", "chosen": "c", "rejected": "r"}, render="text"), "dpo")
    for command in ("sft", "reward", "dpo"):
        check_data("a", of(columns={"prompt": "q", "completions": "c", "scores": "s"}), command)
        check_data("a", of(name="part"), command)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"function": "m:f", "reference": "r"}, "k.reference (a): it goes with a policy that DPO trained"),
        ({"model": "m", "beta": 0.1}, "k.beta (a): it scales the score of a DPO policy"),
        ({"reference": "r"}, "neither model nor function is given"),
    ],
)
def test_a_scorer_that_is_not_whole_is_refused(fields: Mapping[str, Any], says: str) -> None:
    for kind in (RewardComponent, EvalScorer):
        with pytest.raises(UserError) as refused:
            check_source("k", kind.model_validate({"name": "a", **fields}))
        assert says in str(refused.value)
    check_source("k", RewardComponent(name="a", model="m", reference="r", beta=0.3))


def test_keys_that_are_not_given_leave_no_trace_in_hashes() -> None:
    assert RewardComponent(name="a", model="m").model_dump().keys() == {"name", "model", "function", "weight"}
    assert EvalScorer(name="a", model="m", reference="r").model_dump().keys() == {
        "name", "model", "reference", "function",
    }  # fmt: skip


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"run": {"name": "a"}, "model": {"path": "org/model"}, "data": {"path": "org/data"}, **sections}
    )


def test_dpo_wants_its_section_preferences_and_one_process() -> None:
    with pytest.raises(UserError, match="dpo: the recipe has no such section"):
        validate(recipe(), "dpo")
    section = {"output": "o", "data": {"path": "org/data", "format": "messages"}}
    with pytest.raises(UserError, match=r"dpo\.data\.format: 'messages' rows hold no preference pairs; use one of"):
        validate(recipe(dpo=section), "dpo")
    section = {"output": "o", "data": {"path": "org/data", "format": "pairs"}, "engine": {"ranks": 2}}
    with pytest.raises(UserError, match=r"dpo\.engine\.ranks: 2 ranks, but headroom dpo trains in one process"):
        validate(recipe(dpo=section), "dpo")


def test_an_output_that_is_the_start_or_another_training_s_is_refused() -> None:
    data = {"path": "org/data", "format": "pairs"}
    with pytest.raises(UserError, match=r"^sft\.output: \./org/model is model\.path, its own start weights"):
        validate(recipe(sft={"output": "./org/model", "data": data}), "sft")
    with pytest.raises(UserError, match=r"^dpo\.output: start is dpo\.base"):
        validate(recipe(dpo={"output": "start", "base": "./start", "data": data}), "dpo")
    one = {"output": "o", "data": data}
    with pytest.raises(UserError, match=r"^reward_models\.b\.output: o is reward_models\.a\.output too"):
        validate(recipe(reward_models={"a": one, "b": one}), "reward")


def test_a_missing_dpo_policy_or_reference_is_named_with_the_command_that_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    section = {"output": "runs/policy", "data": {"path": "org/data", "format": "pairs"}}
    component = {"name": "a", "model": "runs/policy", "reference": "./start"}
    with pytest.raises(UserError, match=r"components\.0\.model: no model at runs/policy; make it with: headroom dpo C"):
        validate(recipe(dpo=section, reward={"components": [component]}), "train", "C")
    component = {"name": "a", "model": "org/policy", "reference": "./start"}
    with pytest.raises(UserError, match=r"reward\.components\.0\.reference: no model at \./start"):
        validate(recipe(reward={"components": [component]}), "train", "C")
