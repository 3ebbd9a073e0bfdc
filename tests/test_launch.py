"""What a run says when Ray does not start."""

import pytest
import ray

from cluster.launch import connect
from configs.errors import UserError
from configs.schema import Recipe
from trainers.types import InfraError

SLOW = "The current node timed out during startup. This could happen because the GCS has become overloaded."
RECIPE = {
    "run": {"name": "a", "steps": 1},
    "model": {"path": "m"},
    "data": {"path": "d"},
    "sampling": {"max_tokens": 8},
}


@pytest.mark.parametrize(
    ("raised", "kind", "says"),
    [
        (Exception(SLOW), InfraError, "not up after 30 s; is the machine busy"),
        (ConnectionError("refused"), UserError, "no Ray answers at local"),
        (ValueError("a mistake of ours"), ValueError, "a mistake of ours"),
    ],
)
def test_why_ray_does_not_start(
    raised: Exception, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    for name in ("OMP_WAIT_POLICY", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "0")  # so that what `connect` sets does not stay
    with pytest.raises(kind, match=says):
        connect(Recipe.model_validate(RECIPE))
