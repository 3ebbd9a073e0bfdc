"""All that is said of a run, where there is hardly anything to say."""

import json

import numpy as np
import pytest

from trainers.mismatch import Series, from_means, from_scores
from trainers.mismatch.findings import find, to_json

REWARD = from_means("reward", range(8), np.arange(8.0).tolist(), None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompts", [2, 3, 5])
def test_fewer_prompts_than_versions_are_answered(prompts: int) -> None:
    """The paired covariance is singular then."""
    scores = np.random.default_rng(0).normal(size=(8, prompts))
    found = find(Series(reward=REWARD, evaluations=(from_scores("gold", range(8), scores),)))
    assert found.verdict.state == "aligned" and found.headroom.answer == "not identified" and found.headroom.reason
    json.dumps(to_json(found), allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_scores_that_never_differ_are_not_enough() -> None:
    found = find(Series(reward=REWARD, evaluations=(from_scores("gold", range(8), np.ones((8, 5))),)))
    told = to_json(found)
    assert told["state"] is None and told["chosen_version"] is None and told["headroom"]["low"] is None
    assert any("no standard error is known" in reason for reason in told["reasons"])
