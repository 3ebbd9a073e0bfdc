"""A signal before the first step ends a run at once: in `run.prepare`, and while it waits for its actors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAITS = """
import threading


def prepare(recipe):
    print("begun", flush=True)
    threading.Event().wait()
"""
STARTS = """
import asyncio
import logging
import sys
from cluster.cast import preparation
from cluster.launch import run_until_signal
from configs.schema import Recipe


async def start():
    if sys.argv[1] == "prepares":
        some = {"model": {"path": "some"}, "data": {"path": "some"}, "sampling": {"max_tokens": 8}}
        preparation(Recipe.model_validate({"run": {"name": "a", "steps": 1, "prepare": "waits:prepare"}, **some}))()
    try:
        print("begun", flush=True)
        await asyncio.Event().wait()
    finally:
        print("closed", flush=True)


logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    run_until_signal(start())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "number", "code", "name", "closes"),
    [
        ("prepares", signal.SIGINT, 130, "Ctrl-C", []),
        ("prepares", signal.SIGTERM, 143, "SIGTERM", []),
        ("waits", signal.SIGINT, 130, "Ctrl-C", ["closed"]),
        ("waits", signal.SIGTERM, 143, "SIGTERM", ["closed"]),
    ],
)
def test_a_signal_before_the_first_step_ends_a_run(
    what: str, number: int, code: int, name: str, closes: list[str], tmp_path: Path
) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, what], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        running.send_signal(number)
        out, said = running.communicate(timeout=60)
    assert running.returncode == code, said
    assert said.splitlines()[-1] == f"ended by {name}; the same command starts again" and "Traceback" not in said
    assert out.splitlines() == closes
