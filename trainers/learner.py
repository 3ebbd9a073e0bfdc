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
from trainers.importance import effective_share
from trainers.losses import kl_of_stale
from trainers.microbatch import MicroBatch
from trainers.models import completion_logprobs, load_policy
from trainers.objective import token_losses
from trainers.targets import Targets
from trainers.trainee import Trainee
from trainers.types import Batch, Floats, Ints, StepStats

SUMS = ("loss", "tokens", "entropy", "clipped", "weight", "weight_squared", "truncated", "masked")


@dataclass(slots=True, kw_only=True)
class _Trained:
    """What one step collects on this rank; sums over tokens that were trained on."""

    proximal: Tensor  # (B, T) the learner's log-probs before the step; rows of other ranks are 0 until gathered
    seen: Tensor  # (B,) 1 where this rank has filled `proximal`
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
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
        towards = self.trainee.targets(batch, values)
        rate = self.engine.learning_rate
        recompute = self.trainee.updates > 1 and self.algorithm.proximal == "recompute"
        trained = self._recomputed(batch, towards) if recompute else self._nothing(batch)
        for units in self.trainee.minibatches(towards.units):
            self._update(batch, units, towards, trained, recompute)
        # An algorithm may choose fewer rollouts than there are minibatches; the schedule counts on every update.
        self.engine.skip(self.trainee.updates - len(trained.grad_norms))
        return self._stats(batch, trained, recompute, rate)

    def _update(
        self, batch: Batch, units: list[tuple[int, ...]], towards: Targets, trained: _Trained, recomputed: bool
    ) -> None:
        """Take one optimizer step on `units`."""
        weights = self.trainee.weights(batch, units)
        first = not trained.grad_norms

        def loss_fn(micro: MicroBatch) -> Tensor:
            rows = list(micro.rows)
            logprobs, entropy = self._forward(batch, micro)
            proximal = trained.proximal[rows].to(logprobs.device) if recomputed else logprobs.detach()
            loss, counted = token_losses(batch, rows, towards, self.algorithm, self.kl.value, logprobs, proximal)
            if self.algorithm.entropy_bonus:
                loss = loss - self.algorithm.entropy_bonus * entropy
            total = (loss * weights[rows].to(loss.device)).sum() * micro.counts
            if micro.counts:
                if first:
                    trained.proximal[rows], trained.seen[rows] = proximal.cpu(), 1
                for name, value in {**counted, "loss": total, "entropy": entropy}.items():
                    trained.sums[name] += float(value.detach().sum())
            return total

        trained.grad_norms.append(self.trainee.update(batch, units, loss_fn))

    def _forward(self, batch: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        inputs = self.trainee.inputs(batch, micro)
        options = {"entropy_gradient": True} if self.algorithm.entropy_bonus else {}
        logprobs, entropy = self.engine.model(inputs, temperature=self.temperature, **options)
        return logprobs, entropy

    def _nothing(self, batch: Batch) -> _Trained:
        return _Trained(proximal=torch.zeros(batch.mask.shape), seen=torch.zeros(len(batch.uids)))

    def _recomputed(self, batch: Batch, towards: Targets) -> _Trained:
        """Compute the log-probs of what is trained on before any update, each rank its share."""
        found = self._nothing(batch)
        with torch.no_grad():
            for micro in self.trainee.plan(batch, towards.units) if towards.units else ():
                logprobs, _ = self._forward(batch, micro)
                if micro.counts:
                    found.proximal[list(micro.rows)], found.seen[list(micro.rows)] = logprobs.cpu(), 1
        return _Trained(proximal=self.engine.all_sum(found.proximal), seen=self.engine.all_sum(found.seen))

    def _stats(self, batch: Batch, trained: _Trained, gathered: bool, rate: float) -> StepStats:
        sums = self.engine.all_sum(torch.tensor([trained.sums[name] for name in SUMS], dtype=torch.float64))
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        proximal, seen = trained.proximal, trained.seen
        if not gathered:
            proximal, seen = self.engine.all_sum(proximal), self.engine.all_sum(seen)
        # No update: the algorithm chose nothing to train on.
        updates, tokens = max(len(trained.grad_norms), 1), max(total["tokens"], 1.0)
        metrics = {
            "loss/policy": total["loss"] / updates,
            "kl/coefficient": self.kl.value,
            "policy/entropy": total["entropy"] / tokens,
            "policy/clip_fraction": total["clipped"] / tokens,
            "policy/grad_norm": sum(trained.grad_norms) / updates,
            "policy/learning_rate": rate,
            "rollout/importance_weight_mean": total["weight"] / tokens,
            "rollout/importance_effective_share": effective_share(total["weight"], total["weight_squared"], tokens),
            "rollout/importance_truncated_share": total["truncated"] / tokens,
            "rollout/importance_masked_share": total["masked"] / tokens,
        } | _gaps(batch, proximal, seen > 0)
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


def _gaps(batch: Batch, proximal: Tensor, seen: Tensor) -> dict[str, float]:
    """Compare the learner's log-probs (B, T) before the step with those of the reference and of the engine.

    seen: the rows (B,) of which the learner has computed them; elsewhere the engine's stand in against the reference.
    """
    behaviour, every = torch.tensor(batch.behaviour_logprobs), torch.tensor(batch.mask)
    if not bool(every.any()):
        return {}
    mask = every & seen[:, None]
    versions = torch.tensor(batch.token_versions)
    here = torch.where(every, versions, versions.max() + 1).amin(1, keepdim=True)
    mixed = (torch.where(every, versions, here) != here).any(1, keepdim=True) & mask
    fresh = ~mixed & (versions == batch.version) & mask
    gap = (proximal - behaviour).abs()
    found = {
        "rollout/behaviour_gap": targets.masked_mean(gap, fresh),
        "rollout/mixed_gap": targets.masked_mean(gap, mixed),
    }
    if batch.reference_logprobs is not None:
        policy = torch.where(mask, proximal, behaviour)
        kl = kl_of_stale(policy, torch.tensor(batch.reference_logprobs), behaviour)
        found["kl/reference"] = targets.masked_mean(kl, every)
    return {name: value for name, value in found.items() if value is not None}
