"""One rank of the policy's learner."""

import hashlib
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs import schema
from trainers import targets
from trainers.engine import Process, random_state
from trainers.losses import behaviour_weights, clipped_surrogate, kl_estimate, token_weights
from trainers.microbatch import MicroBatch
from trainers.models import completion_logprobs, load_policy
from trainers.trainee import Trainee
from trainers.types import Batch, Floats, Ints, StepStats


@dataclass(slots=True, kw_only=True)
class _Trained:
    """What one step collects on this rank; sums over tokens that were trained on."""

    old: Tensor  # (B, T) log-probs before the step; rows of other ranks are 0 until gathered
    seen: Tensor  # (B,) 1 where this rank has filled `old`
    sums: dict[str, float] = field(
        default_factory=lambda: {"loss": 0.0, "tokens": 0.0, "entropy": 0.0, "clipped": 0.0, "weight": 0.0}
    )
    grad_norms: list[float] = field(default_factory=list)


class Learner:
    """The policy and its optimizer on one rank. Every method but `rng_hash` is a collective: all ranks call it alike.

    Raises RuntimeError if the other ranks do not appear.
    """

    def __init__(
        self,
        recipe: schema.Recipe,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        total_steps: int | None = None,
    ) -> None:
        self.algorithm, self.temperature = recipe.algorithm, recipe.sampling.temperature
        policy = load_policy(recipe.model.path, recipe.model.dtype)
        process = Process(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port)
        self.trainee = Trainee(policy, recipe.model.path, recipe.learner, recipe, process, total_steps)
        self.engine, self.kl = self.trainee.engine, self.trainee.kl

    def step(self, batch: Batch, values: Floats | None = None) -> StepStats:
        """Train on `batch` once, all its epochs and minibatches included.

        values (B, T) of the critic, for algorithms that have one. Every rank is given the whole batch.
        """
        advantages = targets.advantages(batch, self.algorithm, self.kl.value, values).advantages
        rate = self.engine.learning_rate
        trained = self._old_logprobs(batch) if self.trainee.updates > 1 else None
        several_updates = trained is not None
        trained = trained or _Trained(old=torch.zeros(batch.mask.shape), seen=torch.zeros(len(batch.uids)))
        for rows in self.trainee.minibatches(batch):
            self._update(batch, rows, advantages, trained, several_updates)
        return self._stats(batch, trained, several_updates, rate)

    def _update(
        self, batch: Batch, rows: list[int], advantages: Tensor, trained: _Trained, several_updates: bool
    ) -> None:
        """Take one optimizer step on `rows`."""
        weights = torch.zeros(batch.mask.shape)
        weights[rows] = token_weights(torch.tensor(batch.mask[rows]), self.algorithm.aggregate)

        def loss_fn(micro: MicroBatch) -> Tensor:
            rows = list(micro.rows)
            logprobs, entropy = self._forward(batch, micro)
            old = trained.old[rows].to(logprobs.device) if several_updates else logprobs.detach()
            mask = torch.tensor(batch.mask[rows], device=logprobs.device)
            loss, clipped, weight = self._token_losses(batch, rows, logprobs, old, mask, advantages[rows])
            total = (loss * weights[rows].to(loss.device)).sum() * micro.counts
            if micro.counts:
                trained.old[rows], trained.seen[rows] = old.cpu(), 1
                counted = {
                    "loss": total,
                    "tokens": mask,
                    "entropy": entropy,
                    "clipped": clipped & mask,
                    "weight": weight,
                }
                for name, value in counted.items():
                    trained.sums[name] += float(value.detach().sum())
            return total

        trained.grad_norms.append(self.engine.step(self.trainee.plan(batch, rows), loss_fn))

    def _token_losses(
        self, batch: Batch, rows: list[int], logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, whether clipped, and importance weight of each token, all (b, T)."""
        config, device = self.algorithm, logprobs.device
        loss, clipped = clipped_surrogate(
            logprobs, old, advantages.to(device), clip_low=config.clip_low, clip_high=config.clip_high
        )
        if config.kl.where == "loss" and self.kl.value > 0:
            if batch.reference_logprobs is None:
                raise ValueError("a KL term in the loss needs reference log-probs, and the batch has none")
            reference = torch.tensor(batch.reference_logprobs[rows], device=device)
            loss = loss + self.kl.value * kl_estimate(logprobs, reference, config.kl.estimator)
        weight = mask.float()
        if config.behaviour_cap is not None:
            # Of the KL term too: its expectation is over the policy's tokens, and these are another's.
            behaviour = torch.tensor(batch.behaviour_logprobs[rows], device=device)
            weight = behaviour_weights(old, behaviour, mask, cap=config.behaviour_cap)
        return loss * weight, clipped, weight

    def _forward(self, batch: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        inputs = self.trainee.inputs(batch, micro)
        logprobs, entropy = self.engine.model(inputs, temperature=self.temperature)
        return logprobs, entropy

    def _old_logprobs(self, batch: Batch) -> _Trained:
        """Compute the log-probs of the whole batch before any update, each rank its share."""
        old = torch.zeros(batch.mask.shape)
        rows = list(range(len(batch.uids)))
        with torch.no_grad():
            for micro in self.trainee.plan(batch, rows):
                logprobs, _ = self._forward(batch, micro)
                if micro.counts:
                    old[list(micro.rows)] = logprobs.cpu()
        return _Trained(old=self.engine.all_sum(old), seen=torch.ones(len(rows)))

    def _stats(self, batch: Batch, trained: _Trained, several_updates: bool, rate: float) -> StepStats:
        names = list(trained.sums)
        sums = self.engine.all_sum(torch.tensor([trained.sums[name] for name in names], dtype=torch.float64))
        total = dict(zip(names, sums.tolist(), strict=True))
        old = trained.old if several_updates else self.engine.all_sum(trained.old)
        updates, tokens = len(trained.grad_norms), max(total["tokens"], 1.0)
        metrics = {
            "loss/policy": total["loss"] / updates,
            "kl/coefficient": self.kl.value,
            "policy/entropy": total["entropy"] / tokens,
            "policy/clip_fraction": total["clipped"] / tokens,
            "policy/grad_norm": sum(trained.grad_norms) / updates,
            "policy/learning_rate": rate,
            "rollout/importance_weight_mean": total["weight"] / tokens,
        } | _gaps(batch, old)
        self.kl.observe(batch)
        return StepStats(
            loss=metrics["loss/policy"],
            grad_norm=metrics["policy/grad_norm"],
            metrics=metrics,
            rng_hash=self.rng_hash(),
        )

    def raise_kl(self, factor: float, version: int, since: int) -> bool:
        """Raise the strength of the KL term from the next step on, see `targets.KLCoefficient.raise_by`."""
        return self.kl.raise_by(factor, version=version, since=since)

    def rng_hash(self) -> str:
        """Return a sha256 over every generator this rank draws from."""
        state = random_state() | {"minibatches": self.trainee.generator.bit_generator.state}
        return hashlib.sha256(
            pickle.dumps({k: v.numpy() if isinstance(v, Tensor) else v for k, v in state.items()})
        ).hexdigest()

    def state_dict_for_publish(self) -> dict[str, Tensor]:
        """Return the weights under their HF names on the CPU of rank 0, tied ones once; {} on other ranks."""
        return self.engine.state_dict()

    def probe_logprobs(self, token_ids: Ints) -> Floats:
        """Return the untempered log-probs (L - 1,) of tokens 1 … L - 1 of a text, each given those before it."""
        return completion_logprobs(self.engine.model, [token_ids[:1]], [token_ids[1:]], 1.0, len(token_ids))[0]

    def sampled_logprobs(self, prompt_ids: Ints, token_ids: Ints) -> Floats:
        """Return the log-probs (T,) of a completion at the sampling temperature, as its engine should have them."""
        budget = len(prompt_ids) + len(token_ids)
        return completion_logprobs(self.engine.model, [prompt_ids], [token_ids], self.temperature, budget)[0]

    def save(self, directory: Path) -> None:
        """Write everything `load` needs to go on bit-equal."""
        self.trainee.save(directory)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, on as many ranks. Raises FileNotFoundError if there is nothing."""
        self.trainee.load(directory)

    def export(self, directory: Path) -> None:
        """Write the policy in HF format, with its tokenizer."""
        self.trainee.export(directory)


def _gaps(batch: Batch, old: Tensor) -> dict[str, float]:
    """Compare the learner's log-probs `old` (B, T) before the step with those of the reference and of the engine."""
    mask = torch.tensor(batch.mask)
    versions = torch.tensor(batch.token_versions)
    here = torch.where(mask, versions, versions.max() + 1).amin(1, keepdim=True)
    mixed = (torch.where(mask, versions, here) != here).any(1, keepdim=True) & mask
    fresh = ~mixed & (versions == batch.version) & mask
    gap = (old - torch.tensor(batch.behaviour_logprobs)).abs()
    found = {
        "rollout/behaviour_gap": targets.masked_mean(gap, fresh),
        "rollout/mixed_gap": targets.masked_mean(gap, mixed),
    }
    if batch.reference_logprobs is not None:
        k3 = kl_estimate(old, torch.tensor(batch.reference_logprobs), "k3")
        found["kl/reference"] = targets.masked_mean(k3, mask)
    return {name: value for name, value in found.items() if value is not None}
