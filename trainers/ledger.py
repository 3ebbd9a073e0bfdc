"""What every step was trained on: the run's memory, one durable line a step.

A line is written before its step's checkpoint, so a checkpoint never knows more than the ledger. After
a crash the lines beyond the checkpoint are set aside, and in what remains every prompt stands once.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.errors import UserError
from trainers.rundir import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One learner step."""

    step: int  # 1, 2, … ; the policy version it led to is `version`
    version: int
    prompts: tuple[str, ...]  # uids trained on, in admission order
    rollouts: tuple[str, ...]
    discarded: Mapping[str, str] = field(default_factory=dict)  # prompt uid -> reason
    loss: float
    grad_norm: float
    weights_hash: str
    rng_hash: str
    incarnation: int

    @property
    def retired(self) -> tuple[str, ...]:
        """Prompts this step used up, trained or discarded."""
        return (*self.prompts, *self.discarded)


class Ledger:
    """The ledger file of a run, and beside it what was rolled back."""

    def __init__(self, path: Path, rolled_back: Path | None = None) -> None:
        self.path = path
        self.rolled_back = rolled_back or path.with_suffix(".rolled_back.jsonl")
        self._split_at(lambda entry: True)  # a line that a kill cut short must not run into the next

    def append(self, entry: Entry) -> None:
        """Add one step; it is on disk when this returns."""
        with self.path.open("ab") as file:
            file.write(json.dumps(asdict(entry)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, entry in self._lines() if entry)

    def roll_back(self, to_step: int) -> int:
        """Set the lines beyond `to_step` aside and return how many they were; safe to be killed in and repeated."""
        return self._split_at(lambda entry: entry.step <= to_step)

    def retired(self) -> int:
        """How many prompts were used up: the data position of the last step."""
        return sum(len(entry.retired) for entry in self)

    def check(self, expected: Iterable[str] | None = None) -> list[str]:
        """Return what is wrong, nothing if all is well.

        Steps must count up by one from 1, every prompt must appear once, as trained or as discarded;
        `expected` is the data order, of which the ledger must hold a prefix, gapless as a set.
        """
        entries = list(self)
        problems = [
            f"line {number} is step {entry.step}"
            for number, entry in enumerate(entries, start=1)
            if entry.step != number
        ]
        uses = Counter(uid for entry in entries for uid in entry.retired)
        problems += [f"prompt {uid} appears {count} times" for uid, count in uses.items() if count != 1]
        if expected is not None:
            due = {uid for uid, _ in zip(expected, range(len(uses)), strict=False)}
            problems += [f"prompt {uid} is missing" for uid in sorted(due - uses.keys())]
            problems += [f"prompt {uid} is not due yet" for uid in sorted(uses.keys() - due)]
        return problems

    def _lines(self) -> Iterator[tuple[bytes, Entry | None]]:
        """Yield each line and its entry; None for a last line that was cut short."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                yield line, _parse(line)
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise UserError(
                        f"{self.path}:{number}: not a ledger line ({error}); restore the file or choose another run.dir"
                    ) from None
                yield line, None

    def _split_at(self, keep: Callable[[Entry], bool]) -> int:
        lines = list(self._lines())
        kept = b"".join(line for line, entry in lines if entry and keep(entry))
        aside = [line if line.endswith(b"\n") else line + b"\n" for line, entry in lines if not (entry and keep(entry))]
        if not aside:
            return 0
        before = self.rolled_back.read_bytes() if self.rolled_back.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        if not before.endswith(b"".join(aside)):  # else a kill came between the two writes
            write_atomic(self.rolled_back, before + b"".join(aside))
        write_atomic(self.path, kept)
        return len(aside)


def _parse(line: bytes) -> Entry:
    if not line.endswith(b"\n"):
        raise ValueError("the line is cut short")
    fields = json.loads(line)
    return Entry(**fields | {"prompts": tuple(fields["prompts"]), "rollouts": tuple(fields["rollouts"])})
