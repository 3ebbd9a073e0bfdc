"""The evaluation budget: what the alarm itself says of the plan, its power in simulation, its units and refusals."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st

from configs.errors import UserError
from trainers.mismatch import Curve, Series, Settings, Wanted, evaluation_budget, from_means, judge, scan

FAST = Settings(runs=2_000)
WANTED = Wanted(drop=0.2, score_sd=0.5, correlation=0.7, evaluation_cost=20.0)
POINTS = 10


def detected(prompts: int, alarm: Settings, wanted: Wanted = WANTED) -> float:
    """What the alarm states for a flat run of POINTS evaluations with so many prompts."""
    scores = wanted.score_sd**2 * ((1 - wanted.correlation) * np.eye(POINTS) + wanted.correlation)
    versions = np.arange(POINTS)
    flat = Curve(name="gold", versions=versions, mean=np.zeros(POINTS), covariance=scores / prompts, prompts=prompts)
    reward = from_means("reward", versions.tolist(), [0.0] * POINTS, None)
    drop = judge(Series(reward=reward, evaluations=(flat,)), replace(alarm, planned=POINTS))
    assert drop.primary.minimum_detectable_drop is not None
    return drop.primary.minimum_detectable_drop


@pytest.mark.parametrize("margin", [None, 0.05])
def test_the_prompts_are_the_fewest_with_which_the_alarm_states_that_drop(margin: float | None) -> None:
    alarm = replace(FAST, margin=margin)
    (option,) = evaluation_budget(WANTED, alarm, [POINTS]).options
    assert option.detectable_drop == pytest.approx(detected(option.prompts, alarm), rel=1e-6)
    assert option.detectable_drop <= WANTED.drop < detected(option.prompts - 1, alarm)
    assert option.cost == POINTS * (20 + option.prompts)
    assert option.delay == pytest.approx(3 / 9)


def test_the_fall_is_found_with_the_stated_power() -> None:
    runs, wanted = 1_000, replace(WANTED, in_se_of=100, drop=6.0)
    found = evaluation_budget(wanted, Settings(runs=4_000, margin=0.0), [POINTS])
    assert found.chosen is not None
    se = wanted.score_sd * np.sqrt((1 - wanted.correlation) / found.chosen.prompts)
    noise = np.random.default_rng(0).standard_normal((POINTS, runs))
    path = np.where(np.arange(POINTS) >= POINTS - 3, -found.drop / se, 0.0)
    bound = scan.for_prompts(scan.boundary(scan.null_maxima(np.eye(POINTS), 4_000, 1), 0.05, POINTS), 100)
    power = np.mean(np.any(scan.path_maxima(noise + path[:, None], np.eye(POINTS)) > bound[:, None], axis=0))
    assert power >= found.power - 3 * np.sqrt(0.16 / runs)


def test_the_cheapest_in_time_is_chosen() -> None:
    free = evaluation_budget(replace(WANTED, within=0.7), FAST, [20, 6, 10, 6])
    assert [option.evaluations for option in free.options] == [6, 10, 20]
    assert [option.cost for option in free.options] == sorted(option.cost for option in free.options)
    assert free.chosen == free.options[0]
    soon = evaluation_budget(replace(WANTED, within=0.2), FAST, [6, 10, 20])
    assert soon.chosen is not None and soon.chosen.evaluations == 20
    late = evaluation_budget(replace(WANTED, within=0.2), FAST, [6])
    assert late.chosen is None and late.not_enough is not None and "evaluate more often" in late.not_enough
    few = evaluation_budget(replace(WANTED, drop=0.1, most_prompts=50), FAST, [6])
    assert few.options == () and few.not_enough is not None and "50 prompts do not show" in few.not_enough


def test_base_rate_says_how_many_alarms_are_real() -> None:
    rare = evaluation_budget(replace(WANTED, base_rate=0.1), FAST, [6])
    assert rare.alarm_is_real == pytest.approx(0.1 * 0.8 / (0.1 * 0.8 + 0.9 * 0.05), rel=1e-12)


def test_a_drop_in_standard_errors_is_that_many_of_them() -> None:
    in_se = replace(WANTED, drop=5.0, in_se_of=400)
    assert in_se.in_unit == pytest.approx(5 * 0.5 * np.sqrt(0.3 / 400), rel=1e-12)
    assert evaluation_budget(replace(WANTED, drop=in_se.in_unit), FAST, [6]) == evaluation_budget(in_se, FAST, [6])


@checked(max_examples=5, deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_prompts_do_not_depend_on_the_unit(scale: float) -> None:
    base = evaluation_budget(WANTED, FAST, [6]).options[0]
    moved = evaluation_budget(
        replace(WANTED, drop=scale * WANTED.drop, score_sd=scale * WANTED.score_sd), FAST, [6]
    ).options[0]
    assert abs(moved.prompts - base.prompts) <= 1
    assert moved.detectable_drop == pytest.approx(scale * base.detectable_drop, rel=1e-2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop": 0.0},
        {"score_sd": float("nan")},
        {"correlation": 1.0},
        {"base_rate": 0.0},
        {"within": 0.0},
        {"prompt_cost": -1.0},
        {"most_prompts": 3},
        {"in_se_of": 0},
    ],
)
def test_numbers_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        replace(WANTED, **wrong)
    assert next(iter(wrong)) in str(error.value) and "\n" not in str(error.value)


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="a margin of 0.3 hides a drop of 0.2"):
        evaluation_budget(WANTED, replace(FAST, margin=0.3))
    with pytest.raises(UserError, match="5 evaluations are too few"):
        evaluation_budget(WANTED, FAST, [5])
