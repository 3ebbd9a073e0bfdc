"""Generator replicas: which one is asked, and how a dead one is replaced while the run goes on."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.calls import call
from trainers.types import InfraError, Weights

log = logging.getLogger("headroom")
BACK_OFF_S = 1.0
CHECK_S = 60.0  # for a replica that failed to say whether it is alive

Choose = Callable[[Sequence["Replica"]], "Replica"]


@dataclass(slots=True, eq=False)
class Replica:
    """One seat of the generator and the actor that sits on it now."""

    name: str
    actor: Any
    serving: bool = True  # gets requests and loads
    in_flight: int = 0
    deaths: int = 0


class Replicas:
    """Requests go to serving replicas; one that died is replaced and serves again once it has the current weights.

    `rehire(name)` ends the actor of a seat, starts another and returns it. A request that was on a dead replica
    moves to another one, or waits until one serves. The replica that dies once more than `max_restarts` ends the
    run: from then on everything here raises InfraError.
    """

    def __init__(
        self,
        actors: Mapping[str, Any],
        rehire: Callable[[str], Awaitable[Any]],
        *,
        deadline_s: float,
        retries: int,
        max_restarts: int,
    ) -> None:
        self._all = [Replica(name, actor) for name, actor in actors.items()]
        self._rehire = rehire
        self._deadline_s = deadline_s
        self._retries = retries
        self._max_restarts = max_restarts
        self._weights: Weights | None = None  # what every serving replica has, or is being given
        self._changed = asyncio.Condition()
        self._replacing: set[asyncio.Task[None]] = set()
        self._failed: Exception | None = None

    @property
    def restarts(self) -> int:
        """How many replacements were begun."""
        return sum(replica.deaths for replica in self._all)

    async def serving(self) -> list[Replica]:
        """Return the replicas that serve; wait if none does. Raises InfraError if one could not be replaced."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failed or any(replica.serving for replica in self._all))
        if self._failed:
            raise self._failed
        return [replica for replica in self._all if replica.serving]

    async def request(self, method: str, *args: Any, what: str, choose: Choose | None = None, **kwargs: Any) -> Any:
        """Call `method` on the least loaded replica, or on what `choose` takes of those that serve.

        After an InfraError it is tried again elsewhere: at once if the replica died, else `retries` times with
        back-off.
        """
        failed: set[Replica] = set()
        attempt = 0
        while True:
            replica = (choose or least_loaded(failed))(await self.serving())
            actor = replica.actor
            replica.in_flight += 1
            try:
                return await call(getattr(actor, method).remote(*args, **kwargs), what, self._deadline_s)
            except InfraError as error:
                failed.add(replica)
                if await self._gone(replica, actor):
                    continue
                if attempt == self._retries:
                    raise
                attempt += 1
                log.warning("%s; trying again (%d of %d)", error, attempt, self._retries)
                await asyncio.sleep(BACK_OFF_S * 2 ** (attempt - 1))
            finally:
                replica.in_flight -= 1

    async def load(self, weights: Weights, *args: Any) -> None:
        """Return when every serving replica has `weights`, and at least one serves."""
        self._weights = weights
        await asyncio.gather(*(self._load(replica, weights, args) for replica in self._all if replica.serving))
        await self.serving()

    async def probe(self, method: str, *args: Any) -> list[Any]:
        """Return the answers of all serving replicas, of one at least."""
        answers: list[Any] = []
        while not answers:
            asked = [self._probe(replica, method, args) for replica in await self.serving()]
            answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
        return answers

    def close(self) -> None:
        """Give up replacements that are under way."""
        for task in self._replacing:
            task.cancel()

    async def _load(self, replica: Replica, weights: Weights, args: Sequence[Any]) -> None:
        actor = replica.actor
        try:
            await call(actor.load.remote(weights, *args), f"loading version {weights.version}", self._deadline_s)
        except InfraError as error:  # alive or not, without these weights it may not serve
            self._retire(replica, actor, error)

    async def _probe(self, replica: Replica, method: str, args: Sequence[Any]) -> Any:
        actor = replica.actor
        try:
            return await call(getattr(actor, method).remote(*args), "probing the generator", self._deadline_s)
        except InfraError:
            if not await self._gone(replica, actor):
                raise
        return None

    async def _gone(self, replica: Replica, actor: Any) -> bool:
        """Whether `actor`, which failed, is dead; its replacement is under way then."""
        if replica.serving and replica.actor is actor:
            try:
                await call(actor.check.remote(), f"checking {replica.name}", CHECK_S)
                return False
            except InfraError as error:
                self._retire(replica, actor, error)
        return True

    def _retire(self, replica: Replica, actor: Any, why: Exception) -> None:
        if replica.serving and replica.actor is actor:  # else somebody else has seen it
            replica.serving = False
            task = asyncio.create_task(self._replace(replica, why))
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _replace(self, replica: Replica, why: Exception) -> None:
        try:
            while not replica.serving:
                replica.deaths += 1
                if replica.deaths > self._max_restarts:
                    raise InfraError(
                        f"{replica.name} died and generator.max_restarts is {self._max_restarts}; the same command "
                        f"continues from the last checkpoint; the last: {why}"
                    )
                log.warning("%s; replacing %s (%d of %d)", why, replica.name, replica.deaths, self._max_restarts)
                try:
                    replica.actor = await self._rehire(replica.name)
                    await self._catch_up(replica)
                except InfraError as error:
                    why = error
        except Exception as error:  # nobody awaits this task; whoever waits for a replica raises it
            self._failed = error
        async with self._changed:
            self._changed.notify_all()

    async def _catch_up(self, replica: Replica) -> None:
        """Load what the others serve; versions that come meanwhile too."""
        loaded = None
        while self._weights is not None and loaded != self._weights.version:
            weights = self._weights
            await call(replica.actor.load.remote(weights), f"loading version {weights.version}", self._deadline_s)
            loaded = weights.version
        replica.serving = True  # with no await since the comparison, so no load has missed it
        log.info("%s serves again, from version %s", replica.name, loaded)


def least_loaded(avoid: Collection[Replica] = ()) -> Choose:
    """Choose the replica with the fewest requests in flight, of those not to be avoided if there is one."""
    return lambda replicas: min(replicas, key=lambda replica: (replica in avoid, replica.in_flight))
