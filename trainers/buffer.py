"""The buffer between generation and learning; its slots are what bounds staleness.

(S + 1) · B slots are given out in admission order. A slot is held until the weights trained from its
group are loaded, and groups leave in admission order, so while version v is trained no rollout holds
a token older than v - S: whatever was admitted when older weights served has been taken before.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import UserError
from trainers.types import Discarded, Group, Prompt

FREE_DISCARDS = 8  # so that one bad prompt at the start does not end a run
FREE_REFILLS = 10  # batches of uninformative groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """One batch of groups, and the discarded prompts that stood before its last one."""

    groups: tuple[Group, ...]
    discarded: tuple[Discarded, ...]

    @property
    def retired(self) -> int:
        """How far the data position moves when this take has been trained on."""
        return len(self.groups) + len(self.discarded)


class Buffer:
    """Admission-ordered groups under (staleness + 1) · batch slots.

    `wanted` is how many groups the run still needs; beyond it nothing is admitted, so a run ends
    without generating what nobody trains on. `discard_budget` is the share of admitted prompts that
    may be discarded, `refill_budget` the share whose groups may be replaced as uninformative.
    """

    def __init__(
        self, *, batch: int, staleness: int, wanted: int, discard_budget: float = 1.0, refill_budget: float = 1.0
    ) -> None:
        self.batch = batch
        self.slots = (staleness + 1) * batch
        self._wanted = wanted  # groups still to be taken
        self._held = 0  # slots given out: admitted, finished or in training
        self._line: list[int] = []  # admitted tickets, oldest first
        self._done: dict[int, Group | Discarded] = {}
        self._tickets = 0  # given out so far
        self._discards = 0
        self._discard_budget = discard_budget
        self._replaced = 0
        self._refill_budget = refill_budget
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """Wait for a free slot and return its ticket; tickets count up in admission order."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._held < self.slots and self._pending() < self._wanted)
            self._held += 1
            ticket = self._tickets
            self._tickets += 1
            self._line.append(ticket)
            return ticket

    async def put(self, ticket: int, group: Group) -> None:
        """Hand in the group of a ticket. Raises KeyError for a ticket that is not open."""
        await self._finish(ticket, group)

    async def discard(self, ticket: int, prompt: Prompt, reason: str) -> None:
        """Give up a ticket's prompt; its slot is free at once. Raises UserError past the budget."""
        await self._finish(ticket, Discarded(prompt=prompt, reason=reason))
        self._discards += 1
        if self._discards > max(FREE_DISCARDS, self._discard_budget * self._tickets):
            raise UserError(
                f"{self._discards} of {self._tickets} prompts were discarded, more than loop.discard_budget="
                f"{self._discard_budget} allows; correct the cause or allow more; the last: {prompt.uid}: {reason}"
            )

    async def replace(self, ticket: int, prompt: Prompt) -> None:
        """Give up a ticket whose group has nothing to train on; its slot is free at once.

        Raises UserError past the budget, but not before FREE_REFILLS batches were replaced: a start may be poor.
        """
        await self._finish(ticket, Discarded(prompt=prompt, reason="all its rewards are equal", uninformative=True))
        self._replaced += 1
        if self._replaced > max(FREE_REFILLS * self.batch, self._refill_budget * self._tickets):
            raise UserError(
                f"{self._replaced} of {self._tickets} groups had equal rewards, more than algorithm.refill_budget="
                f"{self._refill_budget} allows; give other prompts or another reward, raise sampling.n, or set "
                "algorithm.informative_groups=false"
            )

    async def take(self) -> Take:
        """Wait for the `batch` oldest admitted groups that were not discarded."""
        async with self._changed:
            await self._changed.wait_for(self._ready)
            groups: list[Group] = []
            discarded: list[Discarded] = []
            while len(groups) < self.batch:
                result = self._done.pop(self._line.pop(0))
                if isinstance(result, Discarded):
                    discarded.append(result)
                else:
                    groups.append(result)
            self._wanted -= len(groups)
            self._changed.notify_all()
            return Take(groups=tuple(groups), discarded=tuple(discarded))

    async def release(self, groups: Sequence[Group]) -> None:
        """Free the slots of a batch whose weights are loaded."""
        async with self._changed:
            self._held -= len(groups)
            self._changed.notify_all()

    @property
    def held(self) -> int:
        """Slots given out."""
        return self._held

    def _pending(self) -> int:
        """Admitted tickets that may still become a trained group."""
        return sum(not isinstance(self._done.get(ticket), Discarded) for ticket in self._line)

    def _ready(self) -> bool:
        usable = 0
        for ticket in self._line:
            if ticket not in self._done:
                return False  # an older ticket is unfinished: nothing younger may overtake it
            usable += not isinstance(self._done[ticket], Discarded)
            if usable == self.batch:
                return True
        return False

    async def _finish(self, ticket: int, result: Group | Discarded) -> None:
        async with self._changed:
            if ticket not in self._line or ticket in self._done:
                raise KeyError(f"ticket {ticket} is not open")
            self._done[ticket] = result
            self._held -= isinstance(result, Discarded)
            self._changed.notify_all()
