"""The run directory: one writer, one config."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from trainers.rundir import RunDir, config_changes, flatten

HOLD = (
    "import sys; from pathlib import Path; from trainers.rundir import RunDir\n"
    "lock = RunDir(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
)


def test_a_second_launch_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as refused:
        RunDir(tmp_path).lock()
    assert str(tmp_path) in str(refused.value) and str(holder.pid) in str(refused.value)
    assert "\n" not in str(refused.value)
    holder.kill()  # SIGKILL: nobody cleans up, the kernel lets go
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with RunDir(tmp_path).lock(), pytest.raises(UserError):
        RunDir(tmp_path).lock()
    RunDir(tmp_path).lock().release()


def test_a_changed_config_is_refused_with_a_diff_and_a_longer_run_is_not(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "a" / "run").create()
    config = {"run": {"steps": 10, "seed": 0}, "loop": {"staleness": 1}, "tracking": {"uri": "a"}, "x": (1, 2)}
    assert not rundir.adopt_config(config)
    assert rundir.adopt_config(config)
    assert rundir.adopt_config(config | {"run": {"steps": 20, "seed": 0}, "tracking": {"uri": "b"}})
    with pytest.raises(UserError, match=r"loop\.staleness: 1 -> 4, run\.seed: 0 -> 1\)"):
        rundir.adopt_config(config | {"run": {"steps": 20, "seed": 1}, "loop": {"staleness": 4}})
    assert "steps: 20" in rundir.config.read_text()  # a refused config leaves no trace
    assert rundir.config.stat().st_mode & 0o077 == 0


def test_keys_that_come_or_go_are_changes() -> None:
    assert config_changes({"a": {"b": 1}}, {"a": {"c": 1}}) == {"a.b": (1, None), "a.c": (None, 1)}
    assert flatten({"a": {"b": [1], "c": {}}}) == {"a.b": [1], "a.c": {}}


def test_a_changed_dataset_is_refused(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path).create()
    rundir.adopt_datasets({"train": "1" * 64})
    rundir.adopt_datasets({"train": "1" * 64, "gold": "2" * 64})
    with pytest.raises(UserError, match="gold: '222222222222' -> '333333333333'"):
        rundir.adopt_datasets({"gold": "3" * 64})


def test_incarnations_count_launches(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path).create()
    assert [rundir.next_incarnation() for _ in range(3)] == [0, 1, 2]


def test_a_directory_that_cannot_be_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir"):
        RunDir(tmp_path / "file" / "run").create()
