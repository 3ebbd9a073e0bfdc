"""The build of the demo's world: one at a time, and only where it may write."""

import fcntl
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load
from configs.schema import Recipe
from trainers.world_build import LOCK, MANIFEST, is_prepared, prepare, skeleton, world_hash

ROOT = Path(__file__).parents[1]
BEGIN_AND_WAIT = """
import sys
from configs.load import load
from trainers.world_build import skeleton
skeleton(load(sys.argv[1], sys.argv[2:]))
print("begun", flush=True)
sys.stdin.readline()
"""


def overrides(directory: Path) -> list[str]:
    """Put all that the quickstart builds below `directory`."""
    places = {
        "model.path": "policy",
        "data.path": "prompts.jsonl",
        "sft.base": "start",
        "sft.output": "policy",
        "sft.data.path": "demonstrations.jsonl",
        "reward_models.helpdesk.output": "reward",
        "reward_models.helpdesk.data.path": "pairs.jsonl",
    }
    return [f"{key}={directory / name}" for key, name in places.items()]


def quickstart(directory: Path, *more: str) -> Recipe:
    return load(ROOT / "configs" / "quickstart.yaml", [*overrides(directory), *more])


class Told(logging.Handler):
    """Sets an event at the first line that is logged, and keeps all."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.event.set()


def test_a_second_build_waits_for_the_first_and_uses_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = quickstart(tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", BEGIN_AND_WAIT, str(ROOT / "configs" / "quickstart.yaml"), *overrides(tmp_path)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert first.stdin is not None and first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    weights = (tmp_path / "policy" / "model.safetensors").read_bytes()

    told = Told()
    logger = logging.getLogger("trainers.world_build")
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(told)
    try:
        second = threading.Thread(target=prepare, args=(recipe, logger.info), daemon=True)
        second.start()
        assert told.event.wait(60) and second.is_alive()
        assert f"waiting for process {first.pid} on " in told.lines[0]

        (tmp_path / MANIFEST).write_text(json.dumps({"hash": world_hash(recipe)}))  # the first has finished
        first.communicate("\n", timeout=60)
        second.join(60)
    finally:
        logger.removeHandler(told)
    assert not second.is_alive() and told.lines[1:] == ["the demo's world is built already"]
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == weights


def test_an_interrupted_build_counts_for_nothing_and_holds_up_nobody(tmp_path: Path) -> None:
    recipe = quickstart(tmp_path)

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt, match="SFT"):
        prepare(recipe, interrupt)
    assert not is_prepared(recipe)
    with (tmp_path / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held


def test_a_build_writes_nowhere_but_in_a_directory_of_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"^data.path: .*mine.jsonl is outside .*world, where run.prepare builds"):
        skeleton(quickstart(tmp_path / "world", f"data.path={mine}"))
    with pytest.raises(UserError, match=r"^model.path: .* holds other files"):
        skeleton(quickstart(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    assert mine.read_text() == '{"prompt": "a"}\n'
