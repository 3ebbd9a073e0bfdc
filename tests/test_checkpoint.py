"""Checkpoints: complete or absent."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from trainers import checkpoint

KILLED = """
import sys, time; from pathlib import Path; from trainers import checkpoint
def write(path):
    (path / "half.bin").write_bytes(b"x" * 100_000); print("half", flush=True); time.sleep(60)
checkpoint.save(Path(sys.argv[1]), 2, write, {})
"""


def write(path: Path) -> None:
    (path / "rank").mkdir()
    (path / "rank" / "weights.bin").write_bytes(bytes(range(256)) * 64)
    (path / "rng.json").write_text("{}")


def meta(step: int) -> dict[str, int]:
    return {"step": step, "position": 4 * step}


def test_the_newest_is_found_with_its_meta(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    for step in (9, 10):
        path = checkpoint.save(tmp_path, step, write, meta(step))
        assert path.name == f"step-{step:06d}"
    assert checkpoint.find_latest(tmp_path) == (tmp_path / "step-000010", meta(10))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("rank/weights.bin", "weights.bin is corrupt"),
        ("manifest.json", "manifest.json"),
        ("rng.json", "rng.json is missing"),
    ],
)
def test_a_broken_one_is_named_and_the_older_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, says: str
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, write, meta(step))
    target = tmp_path / "step-000002" / file
    if "missing" in says:
        target.unlink()
    else:
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find_latest(tmp_path) == (tmp_path / "step-000001", meta(1))
    [line] = caplog.messages
    assert "step-000002" in line and says in line and "skipped" in line


def test_a_kill_while_writing_leaves_the_older_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path, 1, write, meta(1))
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert writer.stdout is not None and writer.stdout.readline() == "half\n"
    writer.kill()
    writer.communicate()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find_latest(tmp_path) == (tmp_path / "step-000001", meta(1))
    assert "step-000002: half-written" in caplog.text
    checkpoint.save(tmp_path, 2, write, meta(2))
    assert checkpoint.find_latest(tmp_path) == (tmp_path / "step-000002", meta(2))
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_write_that_fails_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 1, fail, {})
    assert checkpoint.find_latest(tmp_path) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, write, meta(step))
    gone = checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in gone] == [f"step-{step:06d}" for step in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005", "step-000006"]
    assert checkpoint.prune(tmp_path, keep=3) == []
    checkpoint.save(tmp_path, 6, write, meta(7))  # trained again after a rollback
    assert checkpoint.find_latest(tmp_path) == (tmp_path / "step-000006", meta(7))
