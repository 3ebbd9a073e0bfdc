"""Where the actors run: one placement group, one bundle per actor process."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.calls import answer
from configs.errors import UserError
from configs.schema import Recipe, Resources
from configs.seats import seats
from trainers.types import InfraError

log = logging.getLogger("headroom")


class Placement:
    """A reserved placement group; `options` puts an actor on its seat."""

    def __init__(self, recipe: Recipe) -> None:
        self._seats = seats(recipe)
        self._group: PlacementGroup = placement_group([_bundle(seat.resources) for seat in self._seats], "PACK")
        self._deadline_s = recipe.ray.placement_s

    async def ready(self) -> None:
        """Wait for the bundles. Raises UserError with what was asked and what there is."""
        try:
            await asyncio.wait_for(_resolve(self._group.ready()), self._deadline_s)
        except TimeoutError:
            asked = {kind: math.fsum(b.get(kind, 0) for b in self._group.bundle_specs) for kind in ("CPU", "GPU")}
            there = ray.cluster_resources()
            remove_placement_group(self._group)
            raise UserError(
                f"no place for the actors: they ask for {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs, the cluster "
                f"has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; lower *.resources or replicas, or add nodes"
            ) from None

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that hold bundles, in the order of the seats. Call it when ready."""
        bundles: Mapping[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return list(dict.fromkeys(node for _, node in sorted(bundles.items())))

    def options(self, name: str) -> dict[str, Any]:
        """Return the Ray options of the actor on seat `name`."""
        index = next(i for i, seat in enumerate(self._seats) if seat.name == name)
        resources = self._seats[index].resources
        return {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
        }


def _bundle(resources: Resources) -> dict[str, float]:
    # Ray refuses an empty bundle; a seat without CPUs or GPUs still needs a place.
    return {"CPU": max(resources.cpus, 0.01)} | ({"GPU": resources.gpus} if resources.gpus else {})


async def _resolve(reference: Any) -> Any:
    return await reference


async def all_ready(starting: Mapping[str, Awaitable[Any]], deadline_s: float, every_s: float = 15) -> None:
    """Wait for the actors to come up, saying which are still missing. Raises InfraError after the deadline."""
    tasks = {asyncio.ensure_future(answer(start, f"starting {name}")): name for name, start in starting.items()}
    waited = 0.0
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, timeout=every_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if pending:
            waited += every_s
            missing = ", ".join(sorted(tasks[task] for task in pending))
            if waited >= deadline_s:
                raise InfraError(f"not up after {waited:.0f} s: {missing}; see the actors' logs")
            log.info("waiting for %s (%.0f of %.0f s)", missing, waited, deadline_s)
