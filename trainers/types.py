"""The messages that cross between the actors, and the ports the loop sees them through.

Arrays are numpy, so that Ray hands them over without a copy. Shapes: P prompt tokens, T completion
tokens, B rollouts of a batch, N prompts of an evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


class InfraError(Exception):
    """A process, node or deadline failed: the same request may succeed elsewhere."""


class DataError(Exception):
    """This prompt cannot be used (say why): it is counted and discarded, the run goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    n: int  # completions per prompt
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    stop: tuple[str, ...] = ()
    greedy: bool = False  # sample the greedy completion besides
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of vLLM's SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, at a fixed place in the data order of the whole run."""

    uid: str  # unique in a run: "e0-p17"
    position: int  # place in the admission order, counted over epochs
    messages: tuple[Message, ...]  # what a reward model renders again with its own chat template
    token_ids: Ints  # (P,) what the policy is given
    row: Mapping[str, Any] = field(default_factory=dict)  # its dataset row, for reward functions


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Completion tokens [start, stop) were sampled from policy `version`."""

    start: int
    stop: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion with everything that was recorded while it was sampled and scored."""

    uid: str  # "e0-p17-s3"
    seed: int
    token_ids: Ints  # (T,) never re-tokenised
    logprobs: Floats  # (T,) of the distribution really sampled from
    spans: tuple[VersionSpan, ...]  # cover [0, T) in order
    finish_reason: Literal["stop", "length"]
    text: str  # decoded without special tokens
    rewards: Mapping[str, float] = field(default_factory=dict)  # raw score by component
    reward: float = float("nan")  # weighted sum; NaN until scored
    reference_logprobs: Floats | None = None  # (T,) None: no KL term needs them
    greedy: bool = False  # sampled at temperature 0, for comparison: never trained on

    @property
    def oldest_version(self) -> int:
        """The smallest policy version that any token was sampled from."""
        return min(span.version for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def sampled(self) -> tuple[Rollout, ...]:
        """Those that are trained on."""
        return tuple(rollout for rollout in self.rollouts if not rollout.greedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one learner step is trained on: B rollouts, right-padded to the longest completion T."""

    version: int  # of the policy being trained; staleness counts from here
    uids: tuple[str, ...]  # (B,) rollout uids
    prompt_ids: tuple[Ints, ...]  # (B,) arrays of (P_i,)
    completion_ids: Ints  # (B, T)
    mask: Mask  # (B, T) true on completion tokens
    behaviour_logprobs: Floats  # (B, T)
    reference_logprobs: Floats | None  # (B, T)
    token_versions: Ints  # (B, T) policy version each token was sampled from
    rewards: Floats  # (B,)
    groups: Ints  # (B,) rollouts of one prompt share a number, 0 … G-1
    greedy_rewards: Floats | None = None  # (B,) of the prompt's greedy completion; None: none were sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What the learner says about one step."""

    loss: float
    grad_norm: float
    metrics: Mapping[str, float]  # by the names of docs/metrics.md
    rng_hash: str  # of the learner's random state after the step


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A published policy version and where its tensors can be had."""

    version: int
    hash: str  # sha256 over the tensors, hex; "" where the transport never gathers them
    handle: Any  # the transport's own: an object reference, a path


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One task's result on one policy version; later statistics pair the per-prompt scores."""

    version: int
    task: str
    prompt_uids: tuple[str, ...]  # (N,)
    scores: Mapping[str, Floats]  # metric -> (N,) mean over the prompt's samples
    samples: tuple[Mapping[str, Any], ...]  # prompt, completion and scores of every sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Discarded:
    """A prompt that will not be trained on, and why."""

    prompt: Prompt
    reason: str
    uninformative: bool = False  # usable, but its group has nothing to train on


class Generator(Protocol):
    """Samples groups from the newest loaded policy version."""

    async def generate(self, prompt: Prompt) -> Group:
        """Sample one group. Raises DataError if this prompt cannot be answered."""

    async def load(self, weights: Weights) -> None:
        """Return when every serving replica samples from `weights`."""


class Scorer(Protocol):
    """Adds what it knows to each rollout: rewards, or reference log-probs."""

    async def score(self, group: Group) -> Sequence[Mapping[str, Any]]:
        """Return per rollout the fields of `Rollout` to set. Raises DataError naming component and sample."""


class Learner(Protocol):
    """Holds the policy's optimizer (and the critic's, where the algorithm has one)."""

    async def step(self, batch: Batch) -> StepStats:
        """Train on `batch` once, all its epochs and minibatches included."""

    async def publish(self) -> Weights:
        """Advance the policy version and make its weights available."""


class Evaluator(Protocol):
    """Evaluates pinned policy versions."""

    async def evaluate(self, weights: Weights) -> Sequence[Evaluation]:
        """Run every task that is due at this version."""
