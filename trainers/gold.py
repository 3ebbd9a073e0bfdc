"""What a user of the help desk would want. Evaluation and the simulated annotators see it; nothing that learns does."""

from collections.abc import Mapping
from typing import Any

from trainers.world import COURTESIES, PROBLEMS, STEPS, sentences

FLOOR = -1.5


def gold(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Score an answer: 1 for all four steps of the prompt's topic and nothing that is in the way.

    Different steps of the topic / 4; less 0.1 for every other sentence that is no courtesy (a step of another topic,
    words that make no sentence); less 0.03 (n - 1)^2 for n > 1 courtesies and repeated steps; not below -1.5.
    Raises ValueError if the prompt is of no known topic.
    """
    wanted = STEPS[row["topic"] if "topic" in row else topic_of(prompt)]
    given = sentences(completion)
    on_topic = [sentence for sentence in given if sentence in wanted]
    distinct = len(set(on_topic))
    courtesies = sum(sentence in COURTESIES for sentence in given)
    off_topic = len(given) - len(on_topic) - courtesies
    padding = max(0, courtesies + len(on_topic) - distinct - 1)
    return max(FLOOR, distinct / len(wanted) - 0.1 * off_topic - 0.03 * padding**2)


def topic_of(prompt: str) -> str:
    """Return the topic of a prompt of the grammar, found by its wording."""
    for topic, problems in PROBLEMS.items():
        for problem in problems:
            before, after = problem.split("{item}")
            if before in prompt and after in prompt.split(before, 1)[1]:
                return topic
    raise ValueError(f"no topic of the help desk in prompt {prompt[:80]!r}")
