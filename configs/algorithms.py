"""What is known of each algorithm before torch is imported, and which combinations are refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

KLPlace = Literal["loss", "reward", "pairs", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmFacts:
    """What an algorithm needs, what it sets, and where it leads."""

    name: str
    needs_critic: bool = False
    needs_group: bool = False
    """Compares the rollouts of one prompt, so sampling.n must be at least 2."""
    needs_greedy: bool = False
    """Compares with the greedy completion of the prompt, which is sampled and scored besides."""
    chooses: bool = False
    """Trains on rollouts that it chooses by their rewards, not on all: terms that need all have no place."""
    kl_where: KLPlace
    """Usual place of the KL term."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of section `algorithm` whose default is another one here."""
    fixed_point: str
    """The policy at which the expected gradient is zero, with the usual KL term of coefficient β."""
    paper: str


OPTIMUM = "π* ∝ π₀·exp(r/β) over whole completions"
TOKENWISE = "π(a|s) ∝ π₀(a|s)·exp(E[A|s,a]/β) at every token, A the advantage of its rollout under this policy"
NONE = "none inside the simplex: without a KL term the expected gradient leads to the best completions alone"
PAIRS = {"aggregate": "sequence", "normalise": "none", "off_policy": {"weight": "none"}}

FACTS: dict[str, AlgorithmFacts] = {
    facts.name: facts
    for facts in (
        AlgorithmFacts(
            name="grpo",
            needs_group=True,
            kl_where="loss",
            fixed_point=TOKENWISE,
            paper="Shao et al. 2024, DeepSeekMath, arXiv:2402.03300",
        ),
        AlgorithmFacts(
            name="dr_grpo",
            needs_group=True,
            kl_where="loss",
            options={"normalise": "none", "aggregate": "fixed"},
            fixed_point=TOKENWISE + ": E[r|s,a]·(n-1)/n, whose mean holds the rollout itself",
            paper="Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783",
        ),
        AlgorithmFacts(
            name="rloo",
            needs_group=True,
            kl_where="reward",
            options={"normalise": "none"},
            fixed_point=OPTIMUM,
            paper="Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740; Kool et al. 2019",
        ),
        AlgorithmFacts(
            name="reinforce_pp",
            kl_where="reward",
            options={"normalise": "batch"},
            fixed_point=OPTIMUM + ", for gamma = 1",
            paper="Hu et al. 2025, REINFORCE++, arXiv:2501.03262",
        ),
        AlgorithmFacts(
            name="reinforce_pp_baseline",
            needs_group=True,
            kl_where="loss",
            options={"normalise": "batch"},
            fixed_point=TOKENWISE + ", in standard deviations of the batch",
            paper="Hu et al. 2025, REINFORCE++, arXiv:2501.03262",
        ),
        AlgorithmFacts(
            name="remax",
            needs_greedy=True,
            kl_where="reward",
            options={"normalise": "none"},
            fixed_point=OPTIMUM,
            paper="Li et al. 2023, ReMax, arXiv:2310.10505",
        ),
        AlgorithmFacts(
            name="ppo",
            needs_critic=True,
            kl_where="reward",
            options={"normalise": "batch"},
            fixed_point=OPTIMUM + ", for gamma = 1 and an exact critic (or lam = 1)",
            paper="Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155",
        ),
        AlgorithmFacts(
            name="dapo",
            needs_group=True,
            kl_where="none",
            options={"clip_high": 0.28, "informative_groups": True, "overlong": {}},
            fixed_point=NONE,
            paper="Yu et al. 2025, DAPO, arXiv:2503.14476",
        ),
        AlgorithmFacts(
            name="gspo",
            needs_group=True,
            kl_where="loss",
            options={
                "ratio": "sequence",
                "aggregate": "sequence",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
                "off_policy": {"level": "geometric"},
            },
            fixed_point=TOKENWISE + ", for equal lengths",
            paper="Zheng et al. 2025, Group Sequence Policy Optimization, arXiv:2507.18071",
        ),
        AlgorithmFacts(
            name="cispo",
            needs_group=True,
            kl_where="none",
            options={"clip_low": 1.0, "clip_high": 4.0},
            fixed_point=NONE,
            paper="MiniMax 2025, MiniMax-M1, arXiv:2506.13585",
        ),
        AlgorithmFacts(
            name="rft",
            needs_group=True,
            chooses=True,
            kl_where="none",
            options={"normalise": "none", "off_policy": {"weight": "none"}},
            fixed_point=NONE + "; with the KL in the reward, steps that shrink lead towards π* ∝ π₀·exp(r/β), but the "
            "gradient does not vanish there: whoever is best by a hair is imitated",
            paper="Anthony et al. 2017, Expert Iteration, arXiv:1705.08439; Dong et al. 2023, RAFT, arXiv:2304.06767",
        ),
        AlgorithmFacts(
            name="online_dpo",
            needs_group=True,
            chooses=True,
            kl_where="pairs",
            options=PAIRS,
            fixed_point=OPTIMUM
            + ", with the labels σ(r₁ - r₂); none with hard labels, which no finite reward explains",
            paper="Guo et al. 2024, OAIF, arXiv:2402.04792; Rafailov et al. 2023, DPO, arXiv:2305.18290",
        ),
        AlgorithmFacts(
            name="online_ipo",
            needs_group=True,
            chooses=True,
            kl_where="pairs",
            options=PAIRS,
            fixed_point="π(y) ∝ π₀(y)·exp(E[p(y ≻ y')]/β), y' from π, for n = 2; p as the labels say",
            paper="Calandriello et al. 2024, Online IPO, arXiv:2403.08635; Azar et al. 2023, IPO, arXiv:2310.12036",
        ),
    )
}


def check(
    algorithm_name: str,
    kl_where: str,
    kl_estimator: str,
    n: int,
    *,
    kl_coefficient: float = 1,
    normalise: str = "none",
    entropy_bonus: float = 0,
) -> str | None:
    """Return in one line why this combination is refused and what to do, or None if it is fine."""
    facts = FACTS.get(algorithm_name)
    if facts is None:
        near = get_close_matches(algorithm_name.lower(), FACTS, n=2, cutoff=0.7)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        return f"algorithm.name: unknown algorithm {algorithm_name!r}; {hint}choose one of {', '.join(FACTS)}"
    if facts.needs_group and n < 2:
        return f"sampling.n: {algorithm_name} compares the completions of one prompt, but n = {n}; set sampling.n >= 2"
    if normalise == "group" and (facts.chooses or not facts.needs_group):
        return f"algorithm.normalise: {algorithm_name} has no advantages of a group; set normalise to batch or none"
    if (kl_where == "pairs") != (facts.kl_where == "pairs"):
        only = "knows no other place" if facts.kl_where == "pairs" else "compares no pairs"
        return f"algorithm.kl.where: {kl_where}, but {algorithm_name} {only}; set algorithm.kl.where={facts.kl_where}"
    if kl_where == "pairs" and kl_coefficient == 0:
        return f"algorithm.kl.coefficient: {algorithm_name} divides by it; set it above 0, for example to 0.1"
    if facts.chooses and (kl_where == "loss" or entropy_bonus):
        what, hint = ("algorithm.kl.where: loss", "algorithm.kl.where=reward")
        if kl_where != "loss":
            what, hint = ("algorithm.entropy_bonus", "algorithm.entropy_bonus=0")
        return f"{what}: an expectation over all rollouts, and {algorithm_name} trains on chosen ones only; set {hint}"
    if kl_where == "loss" and kl_estimator == "k1":
        return (
            "algorithm.kl: k1 in the loss has zero mean gradient, so it would not hold the policy; "
            "set algorithm.kl.estimator=k2, or algorithm.kl.where=reward"
        )
    if kl_where == "reward" and kl_estimator != "k1":
        return (
            f"algorithm.kl: {kl_estimator} in the reward does not give the gradient of reward - KL; "
            "set algorithm.kl.estimator=k1, or algorithm.kl.where=loss"
        )
    return None


def check_action(action: str, kl_where: str, kl_coefficient: float) -> str | None:
    """Return in one line why the alarm cannot do this and what to do, or None if it can."""
    if action != "raise_kl" or (kl_where != "none" and kl_coefficient > 0):
        return None
    key = "algorithm.kl.where=none" if kl_where == "none" else "algorithm.kl.coefficient=0"
    hint = "set algorithm.kl.where=loss" if kl_where == "none" else "set algorithm.kl.coefficient above 0"
    return f"alarm.action: raise_kl multiplies the KL coefficient, and {key} leaves nothing to multiply; {hint}"
