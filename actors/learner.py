"""The learner's Ray actors: one process per rank of the policy, or of the critic.

The classes are plain; the launcher makes actors of them with `ray.remote(LearnerRank).options(...)`. All ranks of a
group must get the same calls in the same order, since most of them are collectives.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch

from actors.weight_sync import NcclGroup, NcclSender, pack, tensor_list
from configs.schema import Engine, Recipe
from trainers.critic import Critic
from trainers.engine import free_port
from trainers.learner import Learner
from trainers.types import Batch, Floats, Ints, StepStats, Weights


class _Rank:
    """What the ranks of policy and critic have in common: a place in a group, and a clock."""

    def __init__(self, recipe: Recipe, config: Engine, rank: int, world_size: int) -> None:
        self.recipe, self.rank, self.world_size = recipe, rank, world_size
        torch.set_num_threads(config.threads or max(1, int(config.resources.cpus)))
        self._busy = 0.0
        self._since = time.monotonic()

    def rendezvous(self) -> tuple[str, int]:
        """Return address and free port of this node; that of rank 0 is where the group meets."""
        return ray.util.get_node_ip_address(), free_port()

    def times(self) -> dict[str, float]:
        """Return the seconds spent busy and waiting since the start."""
        return {"busy": self._busy, "waiting": time.monotonic() - self._since - self._busy}

    @contextmanager
    def _working(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._busy += time.monotonic() - start


class LearnerRank(_Rank):
    """One rank of the policy's learner; call `start` on all ranks together before anything else."""

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, recipe.learner, rank, world_size)

    def start(self, master_addr: str, master_port: int) -> None:
        """Load the policy and join the group."""
        self.learner = Learner(self.recipe, self.rank, self.world_size, master_addr, master_port)

    def step(self, batch: Batch, values: Floats | None = None) -> StepStats:
        """Train on `batch` once."""
        with self._working():
            return self.learner.step(batch, values)

    def publish(self, version: int) -> Weights | None:
        """Put the weights into Ray's object store (rank 0 answers; the others help to gather)."""
        with self._working():
            state = self.learner.state_dict_for_publish()
            if self.rank:
                return None
            buffer, digest = pack(state)
            return Weights(version=version, hash=digest, handle=ray.put(buffer))

    def connect(self, group: NcclGroup) -> None:
        """Enter the nccl group of the generators (rank 0). Written, not run yet."""
        self._sender = NcclSender(group)
        self._sender.connect()

    def announce(self, version: int) -> Weights | None:
        """Gather the weights for an nccl broadcast and tell what will be sent. Written, not run yet."""
        with self._working():
            self._state = {name: tensor.cuda() for name, tensor in self.learner.state_dict_for_publish().items()}
            return None if self.rank else Weights(version=version, hash="", handle=tensor_list(self._state.items()))

    def send(self) -> None:
        """Broadcast what `announce` gathered; the generators' `load` must run at the same time."""
        with self._working():
            self._sender.send(self._state.items())

    def probe_logprobs(self, token_ids: Ints) -> Floats:
        """Return untempered log-probs (L - 1,) of a text of L tokens."""
        return self.learner.probe_logprobs(token_ids)

    def sampled_logprobs(self, prompt_ids: Ints, token_ids: Ints) -> Floats:
        """Return the log-probs (T,) of a completion at the sampling temperature."""
        return self.learner.sampled_logprobs(prompt_ids, token_ids)

    def save(self, directory: Path) -> None:
        """Write the training state."""
        with self._working():
            self.learner.save(directory)

    def load(self, directory: Path) -> None:
        """Restore the training state."""
        self.learner.load(directory)

    def export(self, directory: Path) -> None:
        """Write the policy in HF format."""
        with self._working():
            self.learner.export(directory)

    def raise_kl(self, factor: float, version: int, since: int) -> bool:
        """Raise the strength of the KL term, if it was not at or after version `since`; return whether."""
        return self.learner.raise_kl(factor, version, since)

    def rng_hash(self) -> str:
        """Return the hash of the random state."""
        return self.learner.rng_hash()


class CriticRank(_Rank):
    """One rank of the critic; call `start` on all ranks together before anything else."""

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, recipe.critic, rank, world_size)

    def start(self, master_addr: str, master_port: int) -> None:
        """Load the value model and join the group."""
        self.critic = Critic(self.recipe, self.rank, self.world_size, master_addr, master_port)

    def values(self, batch: Batch) -> Floats:
        """Return the values (B, T) of the states before each completion token."""
        with self._working():
            return self.critic.values(batch)

    def step(self, batch: Batch, values: Floats) -> dict[str, float]:
        """Fit the returns; return metrics."""
        with self._working():
            return self.critic.step(batch, values)

    def raise_kl(self, factor: float, version: int, since: int) -> bool:
        """Raise the strength of the KL term as the policy's ranks do."""
        return self.critic.raise_kl(factor, version, since)

    def save(self, directory: Path) -> None:
        """Write the training state."""
        with self._working():
            self.critic.save(directory)

    def load(self, directory: Path) -> None:
        """Restore the training state."""
        self.critic.load(directory)
