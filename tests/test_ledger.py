"""The ledger: every prompt once, whatever is killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from trainers.ledger import Entry, Ledger

KILLED = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
from tests.test_ledger import entry; from trainers.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for step in range(1, 100_000):
    ledger.append(entry(step)); print(step, flush=True)
"""
ORDER = [f"e0-p{i}" for i in range(1_000_000)]


def entry(step: int, incarnation: int = 0) -> Entry:
    prompts = tuple(f"e0-p{i}" for i in range(2 * step - 2, 2 * step))
    return Entry(
        step=step, version=step, prompts=prompts[:1], rollouts=tuple(f"{p}-s0" for p in prompts[:1]),
        discarded={prompts[1]: "too long"}, loss=0.5, grad_norm=1.0, weights_hash="ab", rng_hash="cd",
        incarnation=incarnation,
    )  # fmt: skip


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in (1, 2):
        ledger.append(entry(step))
    assert list(Ledger(ledger.path)) == [entry(1), entry(2)]
    assert ledger.retired() == 4 and ledger.check(ORDER) == []


def test_check_finds_repeats_gaps_and_strangers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in (1, 3, 3):
        ledger.append(entry(step))
    problems = " | ".join(ledger.check(ORDER))
    assert "line 2 is step 3" in problems and "e0-p4 appears 2 times" in problems
    assert "e0-p2 is missing" in problems and "e0-p5 is not due yet" in problems


@pytest.mark.parametrize("tear", [0, 1, 40])
def test_a_rollback_sets_lines_aside_and_may_be_repeated(tmp_path: Path, tear: int) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(1, 6):
        ledger.append(entry(step))
    if tear:
        ledger.path.write_bytes(ledger.path.read_bytes()[:-tear])
    before = ledger.path.read_bytes()
    ledger = Ledger(ledger.path)  # moves the torn line
    ledger.roll_back(3)
    assert [e.step for e in ledger] == [1, 2, 3]
    kept, aside = ledger.path.read_bytes(), ledger.rolled_back.read_bytes()
    assert sorted((kept + aside).splitlines()) == sorted(before.splitlines())  # nothing is thrown away
    if not tear:
        ledger.path.write_bytes(before)  # as if killed between the two writes
        ledger.roll_back(3)
        assert (ledger.path.read_bytes(), ledger.rolled_back.read_bytes()) == (kept, aside)
    ledger.append(entry(4, incarnation=1))
    assert ledger.check(ORDER) == [] and ledger.roll_back(4) == 0


def test_a_spoilt_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for step in (1, 2):
        Ledger(path).append(entry(step))
    path.write_bytes(b"{" + path.read_bytes()[5:])
    with pytest.raises(UserError, match=r"ledger\.jsonl:1: not a ledger line"):
        Ledger(path)


def test_a_killed_writer_loses_no_acknowledged_step(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parents[1])]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        time.sleep(0.01)
    writer.kill()
    acknowledged = [int(line) for line in writer.communicate()[0].splitlines()]
    ledger = Ledger(path)
    steps = [e.step for e in ledger]
    assert acknowledged == steps[: len(acknowledged)] and len(steps) - len(acknowledged) <= 1
    ledger.roll_back(3)
    ledger.append(entry(4, incarnation=1))
    assert [e.step for e in ledger] == [1, 2, 3, 4] and ledger.check(ORDER) == []
