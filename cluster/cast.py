"""The actors of one run: created on their seats, started in the order in which they can be, closed at the end."""

import asyncio
import dataclasses
import importlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.engine import EngineOptions, EngineStats, sampling_of
from actors.evaluator import EvaluatorActor
from actors.generator import Generator
from actors.learner import CriticRank, LearnerRank
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.weight_sync import NcclGroup, choose_transport
from cluster.group import Clocks, EvaluatorGroup, GeneratorGroup, LearnerGroup, ScorerGroup, call
from cluster.placement import Placement, all_ready
from cluster.references import References
from cluster.replicas import Replicas
from configs.schema import GeneratorConfig, Recipe, Resources
from trainers.algorithms import ALGORITHMS
from trainers.data import PromptStream, load_rows, load_tokenizer
from trainers.types import Sampling

log = logging.getLogger("headroom")
STARTUP_S = 900.0
STEP_S = 3600.0
CLOSE_S = 30.0
PROBE_TOKENS = 32  # long enough to involve attention, short enough to cost nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Everything that `trainers.online.run` talks to, and the prompts."""

    learner: LearnerGroup
    generator: GeneratorGroup
    scorers: Sequence[ScorerGroup]
    evaluator: EvaluatorGroup
    clocks: Clocks
    prompts: PromptStream
    company: "Company"

    @property
    def engines(self) -> Sequence[Any]:
        """The actors that run vLLM now."""
        return [*self.company.of("generator").values(), *self.company.of("evaluator").values()]

    async def gauges(self) -> dict[str, float]:
        """Return what the actors say about their last step."""
        return {**self.generator.gauges(), **await self.clocks.read()}

    async def engine_stats(self) -> dict[str, EngineStats]:
        """Return what each generator's engine counted since its start, without one that is dead or being replaced."""
        actors = self.company.of("generator")
        calls = (call(actor.stats.remote(), f"counts of {name}", CLOSE_S) for name, actor in actors.items())
        found = await asyncio.gather(*calls, return_exceptions=True)
        return {name: stats for name, stats in zip(actors, found, strict=True) if isinstance(stats, EngineStats)}

    async def close(self) -> None:
        """End the engines' own processes, which Ray does not know."""
        self.generator.close()
        closing = (call(engine.close.remote(), "closing an engine", CLOSE_S) for engine in self.engines)
        await asyncio.gather(*closing, return_exceptions=True)


class Company:
    """Creates actors on their seats and remembers them by seat name."""

    def __init__(self, placement: Placement) -> None:
        self.actors: dict[str, Any] = {}
        self._placement = placement

    def hire(self, cls: type, name: str, *args: Any, concurrency: int | None = None, **kwargs: Any) -> Any:
        """Create one actor; it starts as soon as its process is up."""
        options = self._placement.options(name) | ({"max_concurrency": concurrency} if concurrency else {})
        self.actors[name] = ray.remote(cls).options(**options).remote(*args, **kwargs)
        return self.actors[name]

    def dismiss(self, name: str) -> None:
        """End the actor of a seat, if there is one; vLLM's processes end with it."""
        if actor := self.actors.pop(name, None):
            ray.kill(actor)

    def of(self, role: str) -> dict[str, Any]:
        """Return the actors of one role, by name."""
        return {name: actor for name, actor in self.actors.items() if name.rpartition("-")[0] == role}


async def start_cast(recipe: Recipe, placement: Placement, version: int) -> Cast:
    """Start every actor. The engines come up, in processes of their own, while `run.prepare` makes what others need."""
    prepare = preparation(recipe)
    company = Company(placement)
    engines = hire_engines(recipe, company)
    prepare()  # in this thread: a signal interrupts no other, and at its end Python waits for every other
    references = references_of(recipe)
    hire_networks(recipe, company, references and references.at(version))
    prompts = load_prompts(recipe)
    scorers = company.of("reward") | company.of("reference")
    starts = {name: actor.ready.remote() for name, actor in scorers.items()}
    starts |= await rendezvous(company.of("learner")) | await rendezvous(company.of("critic"))
    await all_ready(starts | engines, STARTUP_S)

    transport = choose_transport(
        recipe.generator.transport,
        learner_gpus=recipe.learner.resources.gpus,
        generator_gpus=recipe.generator.resources.gpus,
    )
    ranks, replicas = list(company.of("learner").values()), company.of("generator")
    if transport == "nccl":
        await connect_nccl(ranks[0], list(replicas.values()), recipe.generator)
    learner = LearnerGroup(
        ranks,
        list(company.of("critic").values()),
        version=version,
        transport=transport,
        deadline_s=STEP_S,
        published=refresh(references, ranks, company.actors.get("reference-0")),
    )
    generator = GeneratorGroup(
        Replicas(
            replicas,
            lambda name: replace_generator(recipe, company, name),
            deadline_s=recipe.generator.deadline_s,
            retries=recipe.generator.retries,
            # An nccl group stays as it was joined: no broadcast gets past a dead member.
            max_restarts=0 if transport == "nccl" else recipe.generator.max_restarts,
        ),
        training_sampling(recipe),
        probe=dataclasses.replace(prompts[0], token_ids=prompts[0].token_ids[:PROBE_TOKENS]),
        learner=learner,
    )
    evaluator = EvaluatorGroup(
        company.actors.get("evaluator-0"),
        steps=recipe.run.steps,
        every=recipe.evaluation.every,
        deadline_s=recipe.evaluation.deadline_s,
    )
    return Cast(
        learner=learner,
        generator=generator,
        evaluator=evaluator,
        prompts=prompts,
        scorers=scorer_groups(recipe, company),
        clocks=Clocks(company.actors),
        company=company,
    )


def scorer_groups(recipe: Recipe, company: Company) -> list[ScorerGroup]:
    """Return what scores each group: the replicas of the rewards, and the reference where there is one."""
    return [
        ScorerGroup(role, list(company.of(role).values()), deadline_s=recipe.generator.deadline_s)
        for role in ("reward", "reference")
        if company.of(role)
    ]


def hire_engines(recipe: Recipe, company: Company) -> dict[str, Any]:
    """Create what runs vLLM and return the calls that start it; it needs no weights yet, only tokenizer and config."""
    for i in range(recipe.generator.replicas):
        hire_generator(recipe, company, f"generator-{i}")
    if recipe.evaluation.tasks:
        company.hire(EvaluatorActor, "evaluator-0", recipe, run_path(recipe), concurrency=4)
    return {name: actor.start.remote() for name, actor in company.actors.items()}


def hire_generator(recipe: Recipe, company: Company, name: str) -> Any:
    """Create one generator replica."""
    options = engine_options(recipe, recipe.generator, run_path(recipe))
    return company.hire(Generator, name, options, training_sampling(recipe), concurrency=1000)


def training_sampling(recipe: Recipe) -> Sampling:
    """Return how the rollouts are drawn, with the greedy completion where the algorithm compares with it."""
    return sampling_of(recipe.sampling, greedy=ALGORITHMS[recipe.algorithm.name].needs_greedy)


async def replace_generator(recipe: Recipe, company: Company, name: str) -> Any:
    """Put a new generator on the seat of a dead one and start its engine. Raises InfraError if it does not come up."""
    company.dismiss(name)
    actor = hire_generator(recipe, company, name)
    del company.actors[name]  # until it answers
    try:
        await all_ready({name: actor.start.remote()}, recipe.generator.startup_s)
    except BaseException:
        ray.kill(actor)
        raise
    company.actors[name] = actor
    return actor


def references_of(recipe: Recipe) -> References | None:
    """Return the references of a run whose reference follows the policy."""
    if recipe.reference.refresh_every is None:
        return None
    return References(
        root=Path(run_path(recipe)) / "references",
        every=recipe.reference.refresh_every,
        checkpoint_every=recipe.run.checkpoint_every,
        keep_checkpoints=recipe.run.keep_checkpoints,
    )


def refresh(
    references: References | None, ranks: Sequence[Any], reference: Any | None
) -> Callable[[int], Awaitable[None]] | None:
    """Return what makes a published version the reference, where there is one that follows."""
    if references is None or reference is None:
        return None

    async def export(path: str) -> None:
        await asyncio.gather(*(call(rank.export.remote(path), "exporting the reference", STEP_S) for rank in ranks))

    async def load(path: str) -> None:
        await call(reference.load.remote(path), "loading the reference", STARTUP_S)

    return lambda version: references.follow(version, export, load)


def hire_networks(recipe: Recipe, company: Company, reference: Path | None) -> None:
    """Create what loads weights from disk: learner, critic, reward and reference; `reference`: where it went on to."""
    for i in range(recipe.reward.replicas):
        company.hire(
            RewardActor, f"reward-{i}", recipe.reward, threads=threads_of(recipe.reward.resources), concurrency=100
        )
    if recipe.algorithm.kl.where != "none":
        company.hire(
            ReferenceActor,
            "reference-0",
            str(reference or recipe.reference.path or recipe.model.path),
            recipe.reference,
            dtype=recipe.model.dtype,
            temperature=recipe.sampling.temperature,
            threads=threads_of(recipe.reference.resources),
            concurrency=100,
        )
    for i in range(recipe.learner.ranks):
        company.hire(LearnerRank, f"learner-{i}", recipe, i, recipe.learner.ranks)
    if ALGORITHMS[recipe.algorithm.name].needs_critic:
        for i in range(recipe.critic.ranks):
            company.hire(CriticRank, f"critic-{i}", recipe, i, recipe.critic.ranks)


def load_prompts(recipe: Recipe) -> PromptStream:
    """Load and render the prompts of the run, and say how many are too long."""
    room = min(recipe.data.max_prompt_tokens, recipe.model.max_length - recipe.sampling.max_tokens)
    tokenizer = load_tokenizer(recipe.model.path)
    prompts = PromptStream(load_rows(recipe.data), tokenizer, recipe.data, room, recipe.run.seed)
    if prompts.too_long:
        log.warning("%d prompts are longer than %d tokens and left out", prompts.too_long, room)
    return prompts


def threads_of(resources: Resources) -> int | None:
    """Return the torch threads of an actor on CPUs, or None to leave them on a GPU machine."""
    return None if resources.gpus else max(1, round(resources.cpus))


def preparation(recipe: Recipe) -> Callable[[], None]:
    """Return what makes the recipe's missing inputs; its quick part, which the engines start from, is done here."""
    if recipe.run.prepare is None:
        return lambda: None
    module, function = recipe.run.prepare.split(":")
    builder = importlib.import_module(module)
    if hasattr(builder, "skeleton"):
        builder.skeleton(recipe)
    return lambda: getattr(builder, function)(recipe)


async def rendezvous(ranks: Mapping[str, Any]) -> dict[str, Any]:
    """Start the ranks of one torch.distributed group where its rank 0 runs."""
    if not ranks:
        return {}
    first = next(iter(ranks.values()))
    address, port = await call(first.rendezvous.remote(), "starting the learner", STARTUP_S)
    return {name: rank.start.remote(address, port) for name, rank in ranks.items()}


async def connect_nccl(learner: Any, replicas: Sequence[Any], config: GeneratorConfig) -> None:
    """Join the learner's first rank and all vLLM workers into one transfer group. Written, not run yet."""
    workers = int(config.engine.get("tensor_parallel_size", 1)) * int(config.engine.get("pipeline_parallel_size", 1))
    address, port = await call(learner.rendezvous.remote(), "nccl rendezvous", STARTUP_S)
    group = NcclGroup(master_address=address, master_port=port, world_size=1 + workers * len(replicas))
    joins = [replica.join.remote(group, 1 + i * workers) for i, replica in enumerate(replicas)]
    await asyncio.gather(*(call(c, "nccl rendezvous", STARTUP_S) for c in (learner.connect.remote(group), *joins)))


def run_path(recipe: Recipe) -> str:
    """Return the absolute run directory: it salts seeds and names the shared-memory files."""
    return Path(recipe.run.dir.format(name=recipe.run.name)).resolve().as_posix()


def engine_options(recipe: Recipe, config: GeneratorConfig, run: str) -> EngineOptions:
    """Return how a generator's vLLM engine is started. Weights are pushed before the first request."""
    return EngineOptions(
        model_path=recipe.model.path,
        run=run,
        dtype=recipe.model.dtype,
        max_length=recipe.model.max_length,
        update=config.update,
        deadline_s=config.deadline_s,
        kv_cache_gb=config.kv_cache_gb,
        threads=threads_of(config.resources),
        engine=config.engine,
    )
