"""Calls that arrive while a forward pass runs are merged into the next one."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs `function` over the items of all waiting callers at once, in one thread.

    The function returns one result per item; what it raises reaches every caller of that batch.
    """

    def __init__(self, function: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        self._function = function
        self._waiting: list[tuple[Sequence[Item], asyncio.Future[list[Result]]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._drain: asyncio.Task[None] | None = None
        self._started = time.monotonic()
        self.busy_s = 0.0

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return one result per item, in order."""
        answer: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, answer))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._run())
        return await answer

    def times(self) -> dict[str, float]:
        """Seconds since the start, split into computing and waiting for work."""
        return {"busy": self.busy_s, "waiting": time.monotonic() - self._started - self.busy_s}

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            calls, self._waiting = self._waiting, []
            merged = [item for items, _ in calls for item in items]
            begin = time.monotonic()
            try:
                results = list(await loop.run_in_executor(self._thread, self._function, merged))
                if len(results) != len(merged):
                    raise ValueError(f"{len(results)} results for {len(merged)} items")
            except Exception as error:  # it belongs to the callers; the next batch is not its business
                for _, answer in calls:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            finally:
                self.busy_s += time.monotonic() - begin
            for items, answer in calls:
                mine, results = results[: len(items)], results[len(items) :]
                if not answer.done():
                    answer.set_result(mine)
