"""One rank of the critic's learner."""

from pathlib import Path

import torch
from torch import Tensor

from configs import schema
from trainers.engine import Process
from trainers.losses import clipped_value_loss
from trainers.microbatch import MicroBatch
from trainers.models import ValueModel, load_sequence_classifier
from trainers.trainee import Trainee
from trainers.types import Batch, Floats


class Critic:
    """The value model and its optimizer on one rank. Every method is a collective: all ranks call it alike."""

    def __init__(
        self,
        recipe: schema.Recipe,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        total_steps: int | None = None,
    ) -> None:
        self.algorithm = recipe.algorithm
        path = recipe.critic.path or recipe.model.path
        model = ValueModel(load_sequence_classifier(path, recipe.model.dtype))
        process = Process(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port)
        self.trainee = Trainee(model, path, recipe.critic, recipe, process, total_steps)
        self.engine, self.kl = self.trainee.engine, self.trainee.kl

    def values(self, batch: Batch) -> Floats:
        """Return the values (B, T) of the states before each completion token, 0 outside the mask, on all ranks."""
        values = torch.zeros(batch.mask.shape)
        units = [(row,) for row in range(len(batch.uids))]
        with torch.no_grad():
            for micro in self.trainee.plan(batch, units):
                predicted = self._forward(batch, micro)
                if micro.counts:
                    values[list(micro.rows)] = predicted.cpu()
        gathered: Floats = self.engine.all_sum(values).numpy()
        return gathered

    def step(self, batch: Batch, values: Floats) -> dict[str, float]:
        """Fit the returns that follow from `batch` and its `values` (B, T); return metrics by their documented names.

        Raises ValueError if the algorithm has no critic.
        """
        towards = self.trainee.targets(batch, values)
        returns = towards.outputs.returns
        if returns is None:
            raise ValueError(f"algorithm {self.algorithm.name} gives no returns to fit a critic to")
        old, losses, norms = torch.tensor(values), [], []
        for units in self.trainee.minibatches(towards.units):
            loss, norm = self._update(batch, units, old, returns)
            losses.append(loss)
            norms.append(norm)
        self.kl.observe(batch)
        mask = torch.tensor(batch.mask)
        metrics = {
            "loss/value": float(self.engine.all_sum(torch.tensor(losses, dtype=torch.float64)).mean()),
            "value/grad_norm": sum(norms) / len(norms),
        }
        if not bool(mask.any()):
            return metrics
        unexplained = (returns - old)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-8)
        return metrics | {
            "value/mean": float(old[mask].mean()),
            "value/explained_variance": 1 - float(unexplained),
        }

    def _update(self, batch: Batch, units: list[tuple[int, ...]], old: Tensor, returns: Tensor) -> tuple[float, float]:
        """Take one optimizer step on `units`; return this rank's share of the loss, and the gradient norm."""
        weights = self.trainee.weights(batch, units)
        shares: list[float] = []

        def loss_fn(micro: MicroBatch) -> Tensor:
            rows = list(micro.rows)
            values = self._forward(batch, micro)
            here = [tensor[rows].to(values.device) for tensor in (old, returns, weights)]
            loss = clipped_value_loss(values, here[0], here[1], clip=self.algorithm.value_clip)
            total = (loss * here[2]).sum() * micro.counts
            shares.append(float(total.detach()))
            return total

        norm = self.trainee.update(batch, units, loss_fn)
        return sum(shares), norm

    def _forward(self, batch: Batch, micro: MicroBatch) -> Tensor:
        predicted: Tensor = self.engine.model(self.trainee.inputs(batch, micro))
        return predicted

    def raise_kl(self, factor: float, version: int, since: int) -> bool:
        """Do as the policy's learner does: the returns hold the same KL term."""
        return self.kl.raise_by(factor, version=version, since=since)

    def save(self, directory: Path) -> None:
        """Write everything `load` needs to go on bit-equal."""
        self.trainee.save(directory)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, on as many ranks. Raises FileNotFoundError if there is nothing."""
        self.trainee.load(directory)

    def export(self, directory: Path) -> None:
        """Write the value model in HF format, with its tokenizer."""
        self.trainee.export(directory)
