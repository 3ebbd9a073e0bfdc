"""System metrics of the nodes that hold actors; the driver watches its own in `trainers.tracking`."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.calls import call
from trainers.tracking import SYSTEM_METRICS_S, NodeMonitor, Tracker
from trainers.types import InfraError

log = logging.getLogger("headroom")
DEADLINE_S = 600.0  # of one sample; the first waits for imports beside actors that start


async def watch_nodes(nodes: Sequence[str], tracker: Tracker) -> None:
    """Log `system/node-<i>/…` of every node but the driver's, and which machine that is, until cancelled."""
    others = [node for node in nodes if node != ray.get_runtime_context().get_node_id()]
    machines = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in ray.nodes()}
    names = {f"node-{i}": node for i, node in enumerate(others, start=1)}
    tracker.log_tags({f"system.{name}": machines[node] for name, node in names.items()})
    await asyncio.gather(*(_watch(name, _monitor(node), tracker) for name, node in names.items()))


def _monitor(node: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(NodeMonitor).options(num_cpus=0, scheduling_strategy=there).remote()


async def _watch(name: str, monitor: Any, tracker: Tracker) -> None:
    while True:
        await asyncio.sleep(SYSTEM_METRICS_S)
        try:
            sample = await call(monitor.sample.remote(), f"system metrics of {name}", DEADLINE_S)
        except InfraError as error:
            log.warning("%s; it is not watched any more", error)
            return
        tracker.log_node(name, sample)
