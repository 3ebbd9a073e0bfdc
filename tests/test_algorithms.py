"""The table: advantages and losses worked by hand, both sides of every bound, batches that hold nothing, refusals."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import algorithms as facts_of_configs
from configs import schema
from configs.algorithms import FACTS, check
from configs.checks import check_options
from configs.errors import UserError
from trainers import algorithms
from trainers.algorithms import ALGORITHMS, AdvantageInputs, AdvantageOutputs, LossInputs

MASK = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
KL = torch.tensor([[1.0, 1.0], [-2.0, 99.0], [0.0, 99.0], [1.0, 1.0]])
INPUTS = AdvantageInputs(
    rewards=torch.tensor([4.0, 1.0, 2.0, 2.0]),
    groups=torch.tensor([5, 5, 3, 3]),
    mask=MASK,
    kl=KL,
    kl_coefficient=0.5,  # rewards less the KL: 3, 2 and 2, 1
    values=torch.zeros(4, 2),
    greedy=torch.tensor([1.0, 1.0, 0.0, 0.0]),
    lam=1.0,
)
TO_GO = [[3.0, 3.5], [2.0, 0.0], [2.0, 0.0], [1.0, 1.5]]
BY_HAND: dict[str, list[Any]] = {
    "grpo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],  # ± 0.5 in each group, by its deviation 0.5
    "dapo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],
    "gspo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],
    "cispo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],
    "dr_grpo": [[0.5, 0.5], [-0.5, 0.0], [0.5, 0.0], [-0.5, -0.5]],
    "rloo": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],  # 3 - 2, 2 - 3, ...
    "reinforce_pp_baseline": [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]],  # ± 0.5 by the batch's 0.5
    "remax": [[2.0, 2.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]],
    "reinforce_pp": TO_GO,  # less their mean 13/6, by their deviation
    "ppo": TO_GO,  # with a critic that says 0 and lam = 1
    "rft": [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
    "online_dpo": [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]],  # the second group's rewards are equal
    "online_ipo": [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
}


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


def test_a_given_key_is_not_overruled_by_the_algorithm() -> None:
    of = schema.Algorithm.model_validate({"name": "gspo", "clip_low": 0.1, "off_policy": {"cap": 3}})
    assert (of.clip_low, of.clip_high, of.ratio) == (0.1, 4e-4, "sequence")
    assert (of.off_policy.level, of.off_policy.cap) == ("geometric", 3)
    assert schema.Algorithm.model_validate({"name": "rloo"}).kl.estimator == "k1"


@pytest.mark.parametrize("name", BY_HAND)
def test_advantages_by_hand(name: str) -> None:
    expected = torch.tensor(BY_HAND[name])
    if name in ("reinforce_pp", "ppo"):
        inside = expected[MASK]
        expected = torch.where(MASK, (expected - inside.mean()) / inside.std(correction=0), torch.zeros(4, 2))
    found = advantages(name, INPUTS)
    torch.testing.assert_close(found.advantages.float(), expected, atol=1e-5, rtol=0)
    assert (found.returns is not None) == (name == "ppo")
    if found.chosen is not None:
        assert found.chosen.tolist() == [bool(row[0]) for row in BY_HAND[name]]


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


# One completion a row, two tokens; of the second row the last is padding.
LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]])
TOKENS = torch.tensor([[True, True], [True, False]])


def losses(name: str, ratios: Any, signs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and whether clipped, for ratios current / proximal of the tokens."""
    section = schema.Algorithm.model_validate({"name": name})
    inputs = LossInputs(
        logprobs=LOGPROBS,
        proximal=LOGPROBS - torch.tensor(ratios).log(),
        advantages=torch.tensor(signs) * TOKENS,
        mask=TOKENS,
        rewards=torch.tensor([math.log(3), 0.0]),
        groups=torch.tensor([0, 0]),
        reference=LOGPROBS - torch.tensor([[0.5, 0.5], [-1.0, 77.0]]),  # log-ratios to it: 1 and -1
        beta=0.5,
        clip_low=options.pop("clip_low", section.clip_low),
        clip_high=options.pop("clip_high", section.clip_high),
        ratio=section.ratio,
        **options,
    )
    found = ALGORITHMS[name].loss(inputs)
    return found.loss, found.clipped & TOKENS


SURROGATES = sorted(name for name in FACTS if name not in ("gspo", "cispo", "rft", "online_dpo", "online_ipo"))


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(
    ("sign", "ratio", "expected", "clipped"),
    [
        (1.0, 0.5, -0.5, False),
        (1.0, 1.19, -1.19, False),
        (1.0, 1.5, -1.2, True),
        (-1.0, 0.5, 0.8, True),
        (-1.0, 0.81, 0.81, False),
        (-1.0, 1.5, 1.5, False),
    ],
)
def test_the_clipped_surrogate_on_either_side_of_its_bounds(
    name: str, sign: float, ratio: float, expected: float, clipped: bool
) -> None:
    loss, where = losses(name, [[ratio, 1.0], [1.0, 1.0]], [[sign, sign], [sign, sign]], clip_low=0.2, clip_high=0.2)
    assert loss[0, 0].item() == pytest.approx(expected) and loss[0, 1].item() == pytest.approx(-sign)
    assert where.tolist() == [[clipped, False], [False, False]] and loss[1, 1] == 0


def test_clip_higher_is_asymmetric_by_default_in_dapo_only() -> None:
    ratios, plus = [[1.25, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]
    assert losses("dapo", ratios, plus)[0][0, 0].item() == pytest.approx(-1.25)
    assert losses("dapo", [[1.35, 1.0], [1.0, 1.0]], plus)[0][0, 0].item() == pytest.approx(-1.28)
    assert losses("grpo", ratios, plus)[0][0, 0].item() == pytest.approx(-1.2)


def test_dual_clip_bounds_the_loss_of_what_is_bad_and_became_likely() -> None:
    minus = [[-1.0, -1.0], [-2.0, -2.0]]
    loss, clipped = losses("ppo", [[5.0, 2.9], [5.0, 1.0]], minus, dual_clip=3.0)
    assert loss[0].tolist() == pytest.approx([3.0, 2.9]) and loss[1, 0].item() == pytest.approx(6.0)
    assert clipped.tolist() == [[True, False], [True, False]]
    good, _ = losses("ppo", [[0.1, 0.1], [0.1, 0.1]], [[1.0, 1.0], [1.0, 1.0]], dual_clip=3.0)
    assert good[0].tolist() == pytest.approx([-0.1, -0.1]), "only negative advantages are bounded"


def test_gspo_clips_whole_completions_by_the_geometric_mean() -> None:
    plus = [[1.0, 1.0], [1.0, 1.0]]
    loss, clipped = losses("gspo", [[0.5, 2.0], [1.0003, 50.0]], plus)
    assert loss[0].tolist() == pytest.approx([-1.0, -1.0]) and loss[1, 0].item() == pytest.approx(-1.0003)
    loss, clipped = losses("gspo", [[1.0, 2.0], [1.001, 50.0]], plus)  # sqrt(2), and 1.001: both above 1.0004
    assert loss[0].tolist() == pytest.approx([-1.0004, -1.0004]) and loss[1, 0].item() == pytest.approx(-1.0004)
    assert clipped.tolist() == [[True, True], [True, False]]


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    inputs = LossInputs(
        logprobs=logprobs,
        proximal=LOGPROBS - torch.tensor([[1.5, 0.1], [1.0, 1.0]]).log(),
        advantages=torch.tensor([[2.0, 2.0], [-1.0, 0.0]]),
        mask=TOKENS,
        rewards=torch.zeros(2),
        groups=torch.zeros(2),
        clip_low=1.0,
        clip_high=0.2,
    )
    found = ALGORITHMS["cispo"].loss(inputs)
    # -A · min(ratio, 1.2) · log-prob; nothing is limited from below.
    torch.testing.assert_close(found.loss.detach(), torch.tensor([[2.4, 0.4], [-0.5, 0.0]]))
    (gradient,) = torch.autograd.grad(found.loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-2.4, -0.2], [1.0, 0.0]]))
    assert found.clipped.tolist() == [[True, False], [False, False]]


def test_rft_imitates() -> None:
    loss, clipped = losses("rft", [[5.0, 5.0], [5.0, 5.0]], [[1.0, 1.0], [0.0, 0.0]])
    assert loss.tolist() == [[1.0, 2.0], [0.0, 0.0]] and not clipped.any()


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        # β · (1 - -1) = 1; the label σ(ln 3) = 0.75: 0.75·ln(1 + e⁻¹) + 0.25·ln(1 + e)
        ("online_dpo", "bradley_terry", 0.563262),
        ("online_dpo", "hard", 0.313262),
        # log-ratio 2 against (2 · 0.75 - 1) / (2 · 0.5) = 0.5, and against 1
        ("online_ipo", "bradley_terry", 2.25),
        ("online_ipo", "hard", 1.0),
    ],
)
def test_the_loss_of_a_pair_stands_at_every_token_of_both(name: str, labels: str, expected: float) -> None:
    loss, clipped = losses(name, [[5.0, 5.0], [5.0, 5.0]], [[1.0, 1.0], [-1.0, -1.0]], labels=labels)
    torch.testing.assert_close(loss, torch.tensor([[expected, expected], [expected, 0.0]]), atol=1e-5, rtol=0)
    assert not clipped.any()


def test_pairs_find_each_other_in_any_order_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = LossInputs(
        logprobs=torch.randn(6, 3, generator=generator),
        proximal=torch.zeros(6, 3),
        advantages=torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])[:, None].expand(-1, 3),
        mask=torch.ones(6, 3, dtype=torch.bool),
        rewards=torch.randn(6, generator=generator),
        groups=torch.tensor([7, 7, 2, 2, 4, 4]),
        reference=torch.randn(6, 3, generator=generator),
        beta=0.3,
    )
    order = torch.tensor([4, 1, 3, 0, 5, 2])
    per_row = ("logprobs", "proximal", "advantages", "mask", "rewards", "groups", "reference")
    moved = replace(inputs, **{name: getattr(inputs, name)[order] for name in per_row})
    for name in ("online_dpo", "online_ipo"):
        torch.testing.assert_close(ALGORITHMS[name].loss(moved).loss, ALGORITHMS[name].loss(inputs).loss[order])


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
