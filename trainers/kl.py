"""The adaptive KL coefficient."""


def adapt(coefficient: float, observed: float, target: float, horizon: int, samples: int) -> float:
    """Return the next KL coefficient, moved in proportion to how far the observed KL is from its target.

    observed and target in the same unit (nats per rollout), target > 0; `samples` rollouts were seen since the last
    change, and the largest change over `horizon` rollouts is about 20 %. A coefficient of 0 stays 0. Ziegler et al.
    2019, where samples / horizon is the constant K = 0.1.
    """
    error = min(max(observed / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(samples / horizon, 1))
