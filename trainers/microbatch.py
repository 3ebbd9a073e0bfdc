"""How the rollouts of a minibatch are dealt to ranks and packed into micro-batches: pure, alike on every rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.types import Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Rollouts that go through the model together: in one row behind the prompt that they share, or in a row each."""

    rows: tuple[int, ...]
    length: int  # tokens of the row, or of all rows padded
    shared: bool = True  # in one row


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rollouts that go through the model together."""

    rows: tuple[int, ...]  # those of the first bundle first
    bundles: tuple[int, ...]  # rollouts in each
    counts: bool = True  # false: only keeps this rank in step with the others; its loss has weight 0


def bundle(
    rows: Sequence[int],
    prompt_ids: Sequence[Ints],
    lengths: Sequence[int],
    token_budget: int,
    ranks: int = 1,
    *,
    width: int | None = None,
) -> list[Bundle]:
    """Put rollouts of the same prompt into bundles.

    prompt_ids[row] (P,) and lengths[row], its completion's tokens. width: hidden size of a model that can read
    bundles; None: one rollout each.
    """
    if width is None:
        return [Bundle(rows=(row,), length=len(prompt_ids[row]) + lengths[row]) for row in rows]
    families: dict[bytes, list[int]] = {}
    for row in rows:
        families.setdefault(np.asarray(prompt_ids[row], np.int64).tobytes(), []).append(row)
    # Each rank is to have several, or one long bundle would make the others wait.
    most = token_budget if ranks == 1 else sum(len(prompt_ids[row]) + lengths[row] for row in rows) // (4 * ranks)
    bundles = []
    for family in families.values():
        prompt = len(prompt_ids[family[0]])
        completion = sum(lengths[row] for row in family) / len(family)
        limit = min(most, token_budget, prompt + best_branches(prompt, completion, width) * completion)
        bundles += _split(family, prompt, lengths, limit)
    return bundles


def together(rows: tuple[int, ...], prompt_ids: Sequence[Ints], lengths: Sequence[int], *, shared: bool) -> Bundle:
    """Return a bundle of rollouts of one prompt whose losses depend on each other, whatever it costs.

    As `bundle` takes them; shared: in one row, which only some models can read.
    """
    prompt, completions = len(prompt_ids[rows[0]]), [lengths[row] for row in rows]
    length = prompt + sum(completions) if shared else len(rows) * (prompt + max(completions))
    return Bundle(rows=rows, length=length, shared=shared)


def _split(family: Sequence[int], prompt: int, lengths: Sequence[int], limit: float) -> list[Bundle]:
    parts: list[list[int]] = []
    room = 0.0
    for row in family:
        if not parts or lengths[row] > room:
            parts.append([])
            room = limit - prompt
        parts[-1].append(row)
        room -= lengths[row]
    return [Bundle(rows=tuple(part), length=prompt + sum(lengths[row] for row in part)) for part in parts]


def best_branches(prompt: int, completion: float, width: int) -> float:
    """Return how many completions of a prompt, all lengths in tokens, cost least per completion in one bundle.

    A layer of hidden size h costs 24 h^2 per token and, behind a mask, 4 h per pair of tokens, so m completions of
    length T behind a prompt of length P cost (6 h L + L^2) / m each, L = P + m T, in units of 4 h: least at
    m = sqrt(P (6 h + P)) / T. Prompts of length 1 are not worth sharing.
    """
    return math.sqrt(prompt * (6 * width + prompt)) / max(completion, 1)


def deal(items: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Split `items` over `ranks` so that each gets about the same number and tokens: longest first, there and back.

    `lengths[item]` in tokens. The shards are disjoint and cover `items`.
    """
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for place, item in enumerate(_longest_first(items, lengths)):
        lap, seat = divmod(place, ranks)
        shards[seat if lap % 2 == 0 else ranks - 1 - seat].append(item)
    return shards


def pack(
    items: Sequence[int], lengths: Sequence[int], token_budget: int, *, fewest: bool = True
) -> list[tuple[int, ...]]:
    """Group `items` of like length so that each group's padded size stays within `token_budget`, longest first.

    As few groups as can be, with the least padding; or, unless `fewest`, one more wherever that saves padding of more
    than a 32nd of the budget: weights and gradients pass through memory once for each group. An item longer than the
    budget is a group of its own. Exact, by dynamic programming over the places where the sorted items are cut.
    """
    order = _longest_first(items, lengths)
    another = 1 + sum(lengths[item] for item in items) * len(order) if fewest else token_budget // 32
    costs, starts = [0], [0]  # of the first 0, 1, 2, ... items: least cost, and where their last group starts
    for stop in range(1, len(order) + 1):
        best, chosen = math.inf, stop
        for start in range(stop - 1, -1, -1):
            padded = lengths[order[start]] * (stop - start)
            if padded > token_budget and stop - start > 1:
                break
            if costs[start] + padded <= best:
                best, chosen = costs[start] + padded, start
        costs.append(int(best) + another)
        starts.append(chosen)
    groups: list[tuple[int, ...]] = []
    stop = len(order)
    while stop:
        groups.append(tuple(order[starts[stop] : stop]))
        stop = starts[stop]
    return groups[::-1]


def plan(bundles: Sequence[Bundle], token_budget: int, ranks: int = 1) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank, equally many on all: with ZeRO every forward is a collective.

    For the same reason there are as few as can be if there are several ranks.
    """
    lengths = [one.length for one in bundles]
    shards = deal(range(len(bundles)), lengths, ranks)
    packed = [pack(shard, lengths, token_budget, fewest=ranks > 1) for shard in shards]
    number = max(map(len, packed))
    shortest = min(bundles, key=lambda one: one.length)
    filler = _micro_batch([shortest], counts=False)
    return [
        [_micro_batch([bundles[i] for i in group]) for group in groups] + [filler] * (number - len(groups))
        for groups in packed
    ]


def _micro_batch(bundles: Sequence[Bundle], *, counts: bool = True) -> MicroBatch:
    return MicroBatch(
        rows=tuple(row for one in bundles for row in one.rows),
        bundles=tuple(size for one in bundles for size in ([len(one.rows)] if one.shared else [1] * len(one.rows))),
        counts=counts,
    )


def _longest_first(items: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(items, key=lambda item: (-lengths[item], item))
