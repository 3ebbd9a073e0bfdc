"""The table: advantages and losses worked by hand, both sides of every bound, batches that hold nothing, refusals."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import algorithms as facts_of_configs
from configs import schema
from configs.algorithms import FACTS, check
from configs.checks import check_options
from configs.errors import UserError
from tests.by_hand import BY_HAND, INPUTS, KL, MASK, expected
from trainers import algorithms
from trainers.algorithms import ALGORITHMS, AdvantageInputs, AdvantageOutputs


def advantages(name: str, inputs: AdvantageInputs, **options: Any) -> AdvantageOutputs:
    section = schema.Algorithm.model_validate({"name": name})
    return ALGORITHMS[name].advantages(replace(inputs, **{"normalise": section.normalise, **options}))


def test_the_table_is_complete_and_its_defaults_are_accepted() -> None:
    assert ALGORITHMS.keys() == FACTS.keys() == BY_HAND.keys()
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.name == name and algorithm.fixed_point and algorithm.paper
        of = schema.Algorithm.model_validate({"name": name})
        assert check(name, of.kl.where, of.kl.estimator, 8, normalise=of.normalise) is None
        assert all(key in schema.Algorithm.model_fields for key in algorithm.options)
    default = schema.Algorithm()
    assert check(default.name, default.kl.where, default.kl.estimator, schema.SamplingParams().n) is None


# Place and estimator of the KL, normalise, aggregate, clip_low, clip_high, ratio, off_policy's weight and level.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "grpo": ("loss", "k2", "group", "token", 0.2, 0.2, "token", "truncate", "token"),
    "dr_grpo": ("loss", "k2", "none", "fixed", 0.2, 0.2, "token", "truncate", "token"),
    "rloo": ("reward", "k1", "none", "token", 0.2, 0.2, "token", "truncate", "token"),
    "reinforce_pp": ("reward", "k1", "batch", "token", 0.2, 0.2, "token", "truncate", "token"),
    "reinforce_pp_baseline": ("loss", "k2", "batch", "token", 0.2, 0.2, "token", "truncate", "token"),
    "remax": ("reward", "k1", "none", "token", 0.2, 0.2, "token", "truncate", "token"),
    "ppo": ("reward", "k1", "batch", "token", 0.2, 0.2, "token", "truncate", "token"),
    "dapo": ("none", "k2", "group", "token", 0.2, 0.28, "token", "truncate", "token"),
    "gspo": ("loss", "k2", "group", "sequence", 3e-4, 4e-4, "sequence", "truncate", "geometric"),
    "cispo": ("none", "k2", "group", "token", 1.0, 4.0, "token", "truncate", "token"),
    "rft": ("none", "k2", "none", "token", 0.2, 0.2, "token", "none", "token"),
    "online_dpo": ("pairs", "k2", "none", "sequence", 0.2, 0.2, "token", "none", "token"),
    "online_ipo": ("pairs", "k2", "none", "sequence", 0.2, 0.2, "token", "none", "token"),
}


@pytest.mark.parametrize("name", FACTS)
def test_defaults_are_those_of_the_docs(name: str) -> None:
    of = schema.Algorithm.model_validate({"name": name})
    method = (of.normalise, of.aggregate, of.clip_low, of.clip_high, of.ratio)
    assert (of.kl.where, of.kl.estimator, *method, of.off_policy.weight, of.off_policy.level) == DEFAULTS[name]
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{name}` \|.*$", page, re.M)
    assert rows, "the docs have no row of it"
    assert all(f"abs/{number}" in rows[0] for number in re.findall(r"arXiv:([\d.]+\d)", FACTS[name].paper))


def test_a_given_key_is_not_overruled_by_the_algorithm() -> None:
    of = schema.Algorithm.model_validate({"name": "gspo", "clip_low": 0.1, "off_policy": {"cap": 3}})
    assert (of.clip_low, of.clip_high, of.ratio) == (0.1, 4e-4, "sequence")
    assert (of.off_policy.level, of.off_policy.cap) == ("geometric", 3)
    assert schema.Algorithm.model_validate({"name": "rloo"}).kl.estimator == "k1"


@pytest.mark.parametrize("name", BY_HAND)
def test_advantages_by_hand(name: str) -> None:
    found = advantages(name, INPUTS)
    torch.testing.assert_close(found.advantages.float(), expected(name), atol=1e-5, rtol=0)
    assert (found.returns is not None) == (name == "ppo")
    if found.chosen is not None:
        assert found.chosen.tolist() == [bool(row[0]) for row in BY_HAND[name]]


THREE = AdvantageInputs(
    rewards=torch.tensor([1.0, 2.0, 6.0]),
    groups=torch.zeros(3),
    mask=torch.ones(3, 1, dtype=torch.bool),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [-2 / 2.160247, -1 / 2.160247, 3 / 2.160247]),  # the deviation is sqrt((4 + 1 + 9) / 3)
        ("dr_grpo", [-2.0, -1.0, 3.0]),
        ("rloo", [-3.0, -1.5, 4.5]),  # 1 - (2 + 6) / 2, ...
        ("rft", [0.0, 0.0, 1.0]),
        ("online_dpo", [-1.0, 0.0, 1.0]),
        ("online_ipo", [-1.0, 0.0, 1.0]),
    ],
)
def test_a_group_of_three_by_hand(name: str, expected: list[float]) -> None:
    assert advantages(name, THREE).advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_discount_and_lambda_by_hand() -> None:
    """Reward 4 after two tokens, values 1 and 2, gamma = lam = 0.5: deltas 0 + 1 - 1 = 0 and 4 - 2 = 2."""
    inputs = AdvantageInputs(
        rewards=torch.tensor([4.0]),
        groups=torch.zeros(1),
        mask=torch.tensor([[True, True]]),
        kl=torch.ones(1, 2),
        values=torch.tensor([[1.0, 2.0]]),
        gamma=0.5,
        lam=0.5,
        normalise="none",
    )
    found = ALGORITHMS["ppo"].advantages(inputs)
    assert (found.advantages.tolist(), found.returns.tolist()) == ([[0.5, 2.0]], [[1.5, 4.0]])
    found = ALGORITHMS["ppo"].advantages(replace(inputs, kl_coefficient=0.5))  # 0.5 less at every token
    assert (found.advantages.tolist(), found.returns.tolist()) == ([[-0.125, 1.5]], [[0.875, 3.5]])
    found = ALGORITHMS["reinforce_pp"].advantages(replace(inputs, kl_coefficient=0.5))
    assert found.advantages.tolist() == [[1.25, 3.5]]


# Without the first completion's tokens: its reward 4 has no KL and counts in its group's mean; the second's is 2.
WITHOUT_THE_FIRST: dict[str, list[float]] = {  # of the four tokens that are left
    "grpo": [-1.0, 1.0, -1.0, -1.0],
    "dapo": [-1.0, 1.0, -1.0, -1.0],
    "gspo": [-1.0, 1.0, -1.0, -1.0],
    "cispo": [-1.0, 1.0, -1.0, -1.0],
    "dr_grpo": [-1.0, 0.5, -0.5, -0.5],
    "rloo": [-2.0, 1.0, -1.0, -1.0],
    "reinforce_pp_baseline": [-1.147079, 1.605910, -0.229416, -0.229416],  # those of dr_grpo, whitened
    "remax": [1.0, 2.0, 1.0, 1.0],
    "reinforce_pp": [0.904534, 0.904534, -1.507557, -0.301511],  # 2, 2, 1, 1.5, whitened
    "ppo": [0.904534, 0.904534, -1.507557, -0.301511],
    "rft": [0.0, 1.0, 0.0, 0.0],
    "online_dpo": [0.0, 0.0, 0.0, 0.0],
    "online_ipo": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_empty_completion_by_hand(name: str) -> None:
    mask = MASK.clone()
    mask[0] = False
    found = advantages(name, replace(INPUTS, mask=mask)).advantages
    assert found[mask].tolist() == pytest.approx(WITHOUT_THE_FIRST[name], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("remax", [2.0, 2.0]), ("reinforce_pp", [-1.0, 1.0]), ("ppo", [-1.0, 1.0])],  # to go 3 and 3.5, whitened
)
def test_one_rollout_by_hand(name: str, expected: list[float]) -> None:
    first = {key: getattr(INPUTS, key)[:1] for key in ("rewards", "groups", "mask", "kl", "values", "greedy")}
    found = advantages(name, replace(INPUTS, **first)).advantages
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", BY_HAND)
def test_equal_rewards_teach_nothing(name: str) -> None:
    equal = replace(INPUTS, rewards=torch.full((4,), 0.1), kl=torch.zeros(4, 2), greedy=torch.full((4,), 0.1))
    found = advantages(name, equal)
    assert found.advantages.abs().max() < 1e-6
    assert found.chosen is None or not found.chosen.any()


@pytest.mark.parametrize("name", BY_HAND)
def test_one_rollout_an_empty_completion_and_a_batch_without_tokens_are_finite(name: str) -> None:
    one = AdvantageInputs(
        rewards=torch.tensor([4.0]),
        groups=torch.tensor([0]),
        mask=torch.tensor([[True, True]]),
        kl=torch.ones(1, 2),
        kl_coefficient=0.5,
        values=torch.zeros(1, 2),
        greedy=torch.tensor([1.0]),
    )
    alone = advantages(name, one)
    assert alone.advantages.isfinite().all()
    assert not FACTS[name].needs_group or not alone.advantages.any(), "nothing to compare with"
    empty = MASK.clone()
    empty[0] = False
    for mask in (empty, torch.zeros_like(MASK)):
        found = advantages(name, replace(INPUTS, mask=mask))
        assert found.advantages.isfinite().all() and not found.advantages[~mask].any()


def test_an_empty_completion_counts_in_its_groups_mean_and_is_no_half_of_a_pair() -> None:
    mask = MASK.clone()
    mask[0] = False
    assert advantages("dr_grpo", replace(INPUTS, mask=mask)).advantages[1, 0] == (2 - 4) / 2  # 4 has no token, no KL
    assert not advantages("online_dpo", replace(INPUTS, mask=mask)).advantages.any()


def test_more_than_one_of_the_best_is_imitated_if_asked_for() -> None:
    inputs = replace(INPUTS, groups=torch.zeros(4, dtype=torch.long), kl_coefficient=0.0)
    assert advantages("rft", inputs, best=1).chosen.tolist() == [True, False, False, False]
    assert advantages("rft", inputs, best=2).chosen.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("name", "words"), [("ppo", "values"), ("remax", "greedy"), ("rloo", "KL")])
def test_a_missing_input_is_an_error(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        advantages(name, replace(INPUTS, values=None, greedy=None, kl=None if name == "rloo" else KL))


@pytest.mark.parametrize(
    ("combination", "words"),
    [
        (("gpro", "loss", "k2", 8), ["'gpro'", "did you mean", "or 'grpo'?", "rloo", "online_ipo"]),
        (("PPO", "reward", "k1", 8), ["did you mean 'ppo'"]),
        (("dreamer", "loss", "k2", 8), ["choose one of grpo, dr_grpo"]),
        (("grpo", "loss", "k2", 1), ["sampling.n", "n = 1", "sampling.n >= 2"]),
        (("grpo", "loss", "k1", 8), ["zero mean gradient", "estimator=k2", "where=reward"]),
        (("ppo", "reward", "k2", 1), ["k2 in the reward", "estimator=k1", "where=loss"]),
        (("ppo", "reward", "k3", 1), ["k3 in the reward", "estimator=k1"]),
        (("rft", "loss", "k2", 4), ["algorithm.kl.where: loss", "chosen", "where=reward"]),
        (("online_dpo", "reward", "k1", 4), ["algorithm.kl.where", "where=pairs"]),
        (("grpo", "pairs", "k2", 4), ["compares no pairs", "where=loss"]),
    ],
)
def test_refused_combinations_say_what_to_do(combination: tuple[str, str, str, int], words: list[str]) -> None:
    message = check(*combination)
    assert message is not None and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ppo", {"normalise": "group"}, ["algorithm.normalise", "batch or none"]),
        ("rft", {"entropy_bonus": 0.1}, ["algorithm.entropy_bonus", "entropy_bonus=0"]),
        ("online_ipo", {"kl_coefficient": 0.0}, ["algorithm.kl.coefficient", "above 0"]),
    ],
)
def test_refused_options_say_what_to_do(name: str, options: dict[str, Any], words: list[str]) -> None:
    of = schema.Algorithm.model_validate({"name": name})
    message = check(name, of.kl.where, of.kl.estimator, 4, **options)
    assert message is not None and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("online_dpo", {"clip_low": 0.1}, "algorithm.clip_low: online_dpo does not read it"),
        ("rft", {"off_policy": {"weight": "truncate"}}, "algorithm.off_policy: rft"),
        ("cispo", {"dual_clip": 3.0}, "algorithm.dual_clip: cispo"),
        ("online_ipo", {"aggregate": "token"}, "algorithm.aggregate: online_ipo"),
        ("grpo", {"gamma": 0.9}, "algorithm.gamma: grpo"),
        ("reinforce_pp", {"lam": 0.9}, "algorithm.lam: reinforce_pp"),
        ("rloo", {"best": 2}, "algorithm.best: rloo"),
        ("grpo", {"pair_labels": "hard"}, "algorithm.pair_labels: grpo"),
        ("ppo", {"ratio": "sequence"}, "set algorithm.ratio=token"),
        ("remax", {"informative_groups": True}, "algorithm.informative_groups: remax"),
        ("grpo", {"fixed_length": 9}, "algorithm.aggregate=fixed"),
        ("dapo", {"kl": {"target": 1.0}}, "algorithm.kl.target"),
        ("grpo", {"off_policy": {"weight": "mask", "floor": 3.0}}, "algorithm.off_policy.floor"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    check_options(schema.Algorithm.model_validate({"name": name}))
    with pytest.raises(UserError, match=re.escape(words)):
        check_options(schema.Algorithm.model_validate({"name": name, **options}))


def test_a_kl_section_of_whatever_kind_leaves_the_other_defaults() -> None:
    of = schema.Algorithm(name="rloo", kl=schema.KL(coefficient=0.3))
    assert (of.normalise, of.kl.where, of.kl.coefficient) == ("none", "reward", 0.3)
    with pytest.raises(ValueError, match="name"):
        schema.Algorithm.model_validate({"name": ["grpo"]})


@pytest.mark.parametrize(
    "combination",
    [("ppo", "reward", "k1", 1), ("grpo", "none", "k1", 2), ("ppo", "none", "k3", 1), ("grpo", "loss", "k3", 2)],
)
def test_accepted_combinations(combination: tuple[str, str, str, int]) -> None:
    assert check(*combination) is None


def test_the_example_of_the_docs_is_an_algorithm_in_less_than_thirty_lines() -> None:
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code.splitlines()) < 30
    facts, rest = code.split("# trainers/algorithms.py")
    function, row = rest.split("# and in _FUNCTIONS")
    names: dict[str, Any] = {**vars(algorithms), **vars(facts_of_configs)}
    exec(function, names)
    (of,) = eval(f"({facts.partition(chr(10))[2].strip()})", names)
    assert eval(f"{{{row}}}", names) == {of.name: (names["ranks"], algorithms.surrogate)}
    found = names["ranks"](replace(INPUTS, rewards=torch.tensor([4.0, 1.0, 2.0, 2.0])))
    assert found.advantages.tolist() == [[0.5, 0.5], [-0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_check_imports_no_torch() -> None:
    command = "import configs.algorithms, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
