"""Do evaluation prompts stand among the prompts that are trained on? Asked before a run, by words in a row.

After Lambert et al. 2024 (TULU 3, section 3.2: 8-grams, and prompts of which more than half is covered), but with words
for tokens, and a prompt is covered by all training prompts together: never less than by the one that covers most.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from configs.rows import prompt_text
from configs.schema import EvalTask
from trainers.data import load_rows

log = logging.getLogger("headroom")
WORDS = 8
SHOWN = 80  # characters of the example
_WORD = re.compile(r"\w+")
Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What the prompts of one evaluation task share with the training prompts."""

    prompts: int
    found: tuple[int, ...]  # places of the prompts that share an n-gram
    covered: tuple[int, ...]  # of these, the prompts that have more than half of their words in shared n-grams

    @property
    def share(self) -> float:
        """Share of prompts that have an n-gram in common with a training prompt."""
        return len(self.found) / self.prompts if self.prompts else 0.0


def overlaps(training: Iterable[str], tasks: Mapping[str, Sequence[str]], words: int = WORDS) -> dict[str, Overlap]:
    """Compare evaluation prompts by task with training prompts, which are gone through once and not kept.

    Words are compared in lower case, without punctuation. A prompt of fewer than `words` words is one n-gram: it is
    found where a training prompt consists of the same words.
    """
    split = {task: [_words(text) for text in texts] for task, texts in tasks.items()}
    wanted = {gram for texts in split.values() for text in texts for gram in _grams(text, words)}
    shared: set[Gram] = set()
    for text in training:
        shared |= wanted.intersection(_grams(_words(text), words))  # the loop over n-grams is C
    return {task: _overlap(texts, shared, words) for task, texts in split.items()}


def check_overlap(tasks: Sequence[EvalTask], training: Iterable[str]) -> dict[str, Overlap]:
    """Compare all prompts of each task's data with the training prompts, and warn in a line for each task that shares.

    Raises UserError for data that cannot be used.
    """
    texts = {task.name: [prompt_text(row.messages) for row in load_rows(task.data)] for task in tasks}
    found = overlaps(training, texts) if texts else {}
    for task, overlap in found.items():
        if overlap.found:
            log.warning(
                "evaluation task %s: %d of %d prompts (%.1f %%) share %d words in a row with training prompts, "
                "%d of them most of their words; one: %s",
                *(task, len(overlap.found), overlap.prompts, 100 * overlap.share, WORDS, len(overlap.covered)),
                _shown(texts[task][(overlap.covered or overlap.found)[0]]),
            )
    return found


def _overlap(texts: Sequence[Sequence[str]], shared: set[Gram], n: int) -> Overlap:
    covered = {place: _covered(text, shared, n) for place, text in enumerate(texts)}
    return Overlap(
        prompts=len(texts),
        found=tuple(place for place, count in covered.items() if count),
        covered=tuple(place for place, count in covered.items() if 2 * count > len(texts[place])),
    )


def _covered(text: Sequence[str], shared: set[Gram], n: int) -> int:
    """Return how many words of a prompt stand in an n-gram that is shared."""
    reached = count = 0
    for start, gram in enumerate(_grams(text, n)):
        if gram in shared:
            count += start + len(gram) - max(start, reached)
            reached = start + len(gram)
    return count


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], n: int) -> Iterator[Gram]:
    if not words:
        return iter(())
    n = min(n, len(words))
    return zip(*(words[start:] for start in range(n)), strict=False)


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else line[: SHOWN - 1] + "…")
