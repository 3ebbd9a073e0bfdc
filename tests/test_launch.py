"""What a run says when Ray does not start, and when training meets a number that is none."""

import pytest
import ray

from cluster import __main__ as commands
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


def test_a_number_that_is_none_ends_a_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise FloatingPointError("sample e0-p3-s1: its loss is not a finite number")

    monkeypatch.setattr(commands, "_train", fails)
    assert commands.main(["train", "configs/quickstart.yaml"]) == 1
    assert capsys.readouterr().err == "headroom: error: sample e0-p3-s1: its loss is not a finite number\n"
