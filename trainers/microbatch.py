"""How the rollouts of a minibatch are dealt to ranks and packed into micro-batches: pure, alike on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows that go through the model together."""

    rows: tuple[int, ...]
    counts: bool = True  # false: only keeps this rank in step with the others; its loss has weight 0


def deal(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Split `rows` over `ranks` so that each gets about the same number and tokens: longest first, there and back.

    `lengths[row]` in tokens. The shards are disjoint and cover `rows`.
    """
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for place, row in enumerate(_longest_first(rows, lengths)):
        lap, seat = divmod(place, ranks)
        shards[seat if lap % 2 == 0 else ranks - 1 - seat].append(row)
    return shards


def pack(rows: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[tuple[int, ...]]:
    """Group `rows` of like length so that each group's padded size stays within `token_budget`, longest first.

    A row longer than the budget is a group of its own.
    """
    groups: list[list[int]] = []
    for row in _longest_first(rows, lengths):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [tuple(group) for group in groups]


def plan(rows: Sequence[int], lengths: Sequence[int], token_budget: int, ranks: int) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank, equally many on all: with ZeRO every forward is a collective."""
    packed = [pack(shard, lengths, token_budget) for shard in deal(rows, lengths, ranks)]
    number = max(map(len, packed))
    filler = MicroBatch(rows=(min(rows, key=lambda row: lengths[row]),), counts=False)
    return [[MicroBatch(rows=group) for group in groups] + [filler] * (number - len(groups)) for groups in packed]


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))
