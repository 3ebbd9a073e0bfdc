"""What is known of each algorithm before torch is imported, and which combinations are refused."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmFacts:
    """What an algorithm needs, and where it leads."""

    name: str
    needs_critic: bool
    needs_group: bool
    """Compares the rollouts of one prompt, so sampling.n must be at least 2."""
    kl_where: Literal["loss", "reward", "none"]
    """Usual place of the KL term."""
    kl_estimator: Literal["k1", "k2", "k3"]
    fixed_point: str
    """The policy at which the expected gradient is zero, with the usual KL term of coefficient β."""
    paper: str


FACTS: dict[str, AlgorithmFacts] = {
    facts.name: facts
    for facts in (
        AlgorithmFacts(
            name="grpo",
            needs_critic=False,
            needs_group=True,
            kl_where="loss",
            kl_estimator="k2",
            fixed_point="π(a|s) ∝ π₀(a|s)·exp(E[r|s,a]/(β·std)) at every token, for large n; std of the group, "
            "1 if not divided by it; with one-token completions and std 1 this is π* ∝ π₀·exp(r/β)",
            paper="Shao et al. 2024, DeepSeekMath, arXiv:2402.03300",
        ),
        AlgorithmFacts(
            name="ppo",
            needs_critic=True,
            needs_group=False,
            kl_where="reward",
            kl_estimator="k1",
            fixed_point="π* ∝ π₀·exp(r/β) over whole completions, for gamma = 1 and an exact critic (or lam = 1)",
            paper="Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155",
        ),
    )
}


def check(algorithm_name: str, kl_where: str, kl_estimator: str, n: int) -> str | None:
    """Return in one line why this combination is refused and what to do, or None if it is fine."""
    facts = FACTS.get(algorithm_name)
    if facts is None:
        near = get_close_matches(algorithm_name.lower(), FACTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(FACTS)}"
        return f"algorithm.name: unknown algorithm {algorithm_name!r}; {hint}"
    if facts.needs_group and n < 2:
        return f"sampling.n: {algorithm_name} compares the completions of one prompt, but n = {n}; set sampling.n >= 2"
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
