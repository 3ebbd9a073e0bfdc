"""Which runs of the demo's world are made: cells and seeds, fixed before any of the test seeds has run.

Nothing here is chosen by looking at a result of SEEDS; whatever is tried out is tried on TRIAL_SEEDS.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.load import dotted, load
from configs.schema import Recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "quickstart.yaml"
SEEDS = tuple(range(1001, 1021))
TRIAL_SEEDS = (1, 2, 3, 4, 5)
CONTROL_SEEDS = 5  # of a control's cell, the first of SEEDS
SHIPPED = 0  # seed of the shipped world
BETAS = (0.005, 0.02, 0.08, 0.3)  # KL coefficients
BIASES = (0.0, 0.08, 0.16)  # utility of five more words to the annotators
DEMO = (0.02, 0.08)  # the recipe's own
ANSWERS = 448  # of each version, for what gold truly was: as many to each prompt on which nothing was chosen
SURE = 2.0  # standard errors of a difference that counts as a rise or fall of gold
KEPT_CHECKPOINTS = 1_000  # all: gold of every evaluated version is measured afterwards
REWARD_IS_GOLD = 'reward.components=[{name: gold, function: "trainers.gold:gold"}]'


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting of the recipe, run on several seeds."""

    name: str
    seeds: int
    about: str
    overrides: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None  # of the world that is built, see trainers.world_build.Options
    shipped: bool = False  # all seeds in the shipped world; else a world of its own for each: policy, pairs, reward
    beta: float = DEMO[0]
    bias: float = DEMO[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What is done with a run of the first cell from the checkpoint after its alarm."""

    name: str
    factor: float  # of the KL coefficient
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: a cell's or an arm's, on one seed."""

    cell: str
    seed: int
    overrides: tuple[str, ...]  # of the recipe; places are added by `placed`
    world: str  # directory name of its world
    parent: str | None = None  # of an arm: the job that it branches from
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Its name in results, directories and MLflow."""
        return f"{self.cell}/{self.seed}"


ARMS = (
    Arm(name="action-continue", factor=1, about="goes on as it was: the paired continuation"),
    Arm(name="action-raise-4", factor=4, about="KL coefficient times 4"),
    Arm(name="action-raise-16", factor=16, about="KL coefficient times 16"),
)


def cells() -> tuple[Cell, ...]:
    """Return all cells but the arms, each once: the grid's middle is the first five seeds of `worlds`."""
    grid = [
        Cell(
            name=f"beta-{beta:g}-bias-{bias:g}",
            seeds=CONTROL_SEEDS,
            about=f"KL coefficient {beta:g}, length bias {bias:g}",
            overrides=(f"algorithm.kl.coefficient={beta:g}",),
            options={"length_bias": bias},
            beta=beta,
            bias=bias,
        )
        for beta in BETAS
        for bias in BIASES
        if (beta, bias) != DEMO
    ]
    return (
        Cell(name="demo", seeds=len(SEEDS), about="the demo, its one world, other run seeds", shipped=True),
        Cell(name="worlds", seeds=len(SEEDS), about="the demo, for each seed a policy, pairs and reward model anew"),
        Cell(name="gold", seeds=CONTROL_SEEDS, about="the reward is gold itself", overrides=(REWARD_IS_GOLD,)),
        Cell(
            name="pairs-x10",
            seeds=CONTROL_SEEDS,
            about="10 times the preference pairs",
            options={"pairs": 20_000},
        ),
        *grid,
    )


def jobs(seeds: Sequence[int] = SEEDS) -> tuple[Job, ...]:
    """Return all jobs in the order in which they are run: what is asked first comes first.

    The grid and the arms take turns, seed by seed, so that whatever the time allows is complete for its seeds.
    """
    whole = [job for cell in cells()[:4] for job in of_cell(cell, seeds)]
    arms = [
        replace(job, cell=arm.name, parent=job.name, factor=arm.factor)
        for job in of_cell(cells()[0], seeds)
        for arm in ARMS
    ]
    grid = list(zip(*(of_cell(cell, seeds) for cell in cells()[4:]), strict=True))
    turn = math.ceil(len(arms) / len(ARMS) / len(grid)) * len(ARMS)
    rest = [job for number, row in enumerate(grid) for job in (*row, *arms[number * turn : (number + 1) * turn])]
    return (*whole, *rest)


def of_cell(cell: Cell, seeds: Sequence[int]) -> list[Job]:
    """Return the jobs of a cell on the first of `seeds`."""
    found = []
    for seed in seeds[: cell.seeds]:
        options = dict(cell.options or {})
        if options.get("length_bias") == DEMO[1]:
            del options["length_bias"]  # the default: the same world as without
        named = [f"{name}-{value:g}" for name, value in options.items()]
        overrides = [f"run.prepare_options.{name}={value:g}" for name, value in options.items()]
        of_world = SHIPPED if cell.shipped else seed
        found.append(
            Job(
                cell=cell.name,
                seed=seed,
                world="-".join([str(of_world), *named]),
                overrides=(f"sft.seed={of_world}", f"reward_models.helpdesk.seed={of_world}", *overrides)
                + cell.overrides,
            )
        )
    return found


def placed(directory: Path, recipe: Path = RECIPE) -> list[str]:
    """Return the overrides that move everything which the recipe builds beside model.path to `directory`."""
    loaded = load(recipe)
    root = Path(loaded.model.path).parent
    return [
        f"{dotted(key)}={directory / Path(value).relative_to(root)}"
        for key, value in leaves(loaded.model_dump(mode="json"))
        if isinstance(value, str) and root in Path(value).parents
    ]


def leaves(value: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield (key, value) of everything in a tree that holds nothing itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield key, value
        return
    for name, child in inner:
        yield from leaves(child, (*key, name))


def overrides(job: Job, out: Path, directory: Path) -> list[str]:
    """Return all overrides of one run below `out`, which is absolute; `directory` is its run directory."""
    every = load(RECIPE).evaluation.every
    return [
        *placed(out / "worlds" / job.world),
        f"run.name={job.name.replace('/', '-')}",
        f"run.dir={directory}",
        f"run.seed={job.seed}",
        f"run.checkpoint_every={every}",
        f"run.keep_checkpoints={KEPT_CHECKPOINTS}",
        f"tracking.uri=sqlite:///{out / 'mlflow.db'}",
        "tracking.experiment=demo-seeds",
        "tracking.system_metrics=false",
        *job.overrides,
    ]


def recipe_of(job: Job, out: Path, directory: Path) -> Recipe:
    """Return the recipe that the job's command line gives."""
    return load(RECIPE, overrides(job, out, directory))
