"""A network under training on one rank: what the policy's and the critic's learners have in common."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs import schema
from trainers import targets
from trainers.engine import Process, TrainEngine
from trainers.layout import Sequences, tree_width
from trainers.losses import token_weights
from trainers.microbatch import MicroBatch
from trainers.models import export
from trainers.targets import Targets
from trainers.types import Batch, Floats


class Trainee:
    """A network, its optimizer, and the state that decides which batches it sees how.

    Raises RuntimeError if the other ranks do not appear.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        config: schema.Engine,
        recipe: schema.Recipe,
        process: Process,
        total_steps: int | None = None,
    ) -> None:
        self.path, self.algorithm, self.token_budget = path, recipe.algorithm, config.token_budget
        self.fixed_length = self.algorithm.fixed_length or recipe.sampling.max_tokens
        self.updates = self.algorithm.epochs * self.algorithm.minibatches  # of one step
        self.engine = TrainEngine(
            model,
            config,
            dtype=recipe.model.dtype,
            total_steps=(total_steps or recipe.run.steps) * self.updates,
            seed=recipe.run.seed,
            process=process,
        )
        self.width = tree_width(self.engine.hf) if config.share_prompts else None
        self.generator = np.random.default_rng(recipe.run.seed)
        self.kl = targets.KLCoefficient(config=self.algorithm.kl, value=self.algorithm.kl.coefficient)
        self.shaping = targets.RewardShaping(config=self.algorithm, max_tokens=recipe.sampling.max_tokens)

    def targets(self, batch: Batch, values: Floats | None) -> Targets:
        """Return what this step trains towards, once a step: the rewards' running scale takes the batch in."""
        self.shaping.observe(batch)
        return targets.targets(batch, self.algorithm, self.kl.value, self.shaping, values)

    def minibatches(self, units: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Yield the rollouts of each optimizer step, in the units that stay together."""
        return targets.minibatches(units, self.algorithm.epochs, self.algorithm.minibatches, self.generator)

    def plan(self, batch: Batch, units: Sequence[tuple[int, ...]]) -> list[MicroBatch]:
        """Return this rank's micro-batches for the rollouts of `units`."""
        ranks = self.engine.world_size
        return targets.plan(batch, units, self.token_budget, ranks, width=self.width)[self.engine.rank]

    def weights(self, batch: Batch, units: Sequence[tuple[int, ...]]) -> Tensor:
        """Return with what each token's loss (B, T) counts in a minibatch of `units`, 0 elsewhere."""
        rows = [row for unit in units for row in unit]
        weights = torch.zeros(batch.mask.shape)
        weights[rows] = token_weights(
            torch.tensor(batch.mask[rows]), self.algorithm.aggregate, fixed_length=self.fixed_length
        )
        return weights

    def update(self, batch: Batch, units: Sequence[tuple[int, ...]], loss_fn: Callable[[MicroBatch], Tensor]) -> float:
        """Take one optimizer step on `units`; return the gradient norm before clipping.

        Raises FloatingPointError, on all ranks, if the gradient is not finite: no weights of this step may be used.
        """
        norm = self.engine.step(self.plan(batch, units), loss_fn)
        if math.isnan(norm):
            raise FloatingPointError(
                "the gradient is not finite, and nothing of this step is published; resume the run"
            )
        return norm

    def inputs(self, batch: Batch, micro: MicroBatch) -> Sequences:
        """Return a micro-batch as the network takes it, on its device."""
        return targets.inputs(batch, micro, self.engine.device)

    def save(self, directory: Path) -> None:
        """Write everything `load` needs to go on bit-equal."""
        kl = {"kl_coefficient": self.kl.value, "kl_raised": self.kl.raised, "kl_raised_at": self.kl.raised_at}
        rewards = {"rewards": (self.shaping.count, self.shaping.mean, self.shaping.squares)}
        self.engine.save(Path(directory), {**kl, **rewards, "generator": self.generator.bit_generator.state})

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, on as many ranks. Raises FileNotFoundError if there is nothing."""
        extra = self.engine.load(Path(directory))
        self.kl.value = float(extra["kl_coefficient"])
        self.kl.raised, self.kl.raised_at = extra.get("kl_raised", 1.0), extra.get("kl_raised_at")  # older ones: never
        self.shaping.count, self.shaping.mean, self.shaping.squares = extra.get("rewards", (0, 0.0, 0.0))
        self.generator.bit_generator.state = extra["generator"]

    def export(self, directory: Path) -> None:
        """Write the network in HF format, with its tokenizer."""
        state = self.engine.state_dict()
        if self.engine.rank == 0:
            export(self.engine.hf, state, directory, self.path)
