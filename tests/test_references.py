"""A reference that follows the policy: when, from which file after a resume, and what is kept."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.reference import ReferenceActor
from cluster.references import References
from configs.errors import UserError
from configs.schema import Reference
from tests.ranks import random_batch, recipe, tiny_policy
from trainers.learner import Learner
from trainers.types import Group, Message, Prompt, Rollout


class Seen:
    """What was written and read."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def export(self, path: str) -> None:
        Path(path).mkdir()

    async def load(self, path: str) -> None:
        assert Path(path).is_dir(), "complete before it is read"
        self.loaded.append(Path(path).name)


def follow(references: References, versions: range) -> Seen:
    seen = Seen()
    for version in versions:
        asyncio.run(references.follow(version, seen.export, seen.load))
    return seen


def kept(references: References) -> list[int]:
    return sorted(int(path.name[-6:]) for path in references.root.iterdir())


def test_every_so_many_versions_the_policy_takes_its_place(tmp_path: Path) -> None:
    references = References(root=tmp_path / "references", every=3, checkpoint_every=2, keep_checkpoints=1)
    assert references.at(0) is None
    seen = follow(references, range(1, 11))
    assert seen.loaded == ["version-000003", "version-000006", "version-000009"]


@pytest.mark.parametrize(("checkpoint_every", "keep"), [(2, 1), (2, 2), (5, 2), (7, 3)])
def test_each_kept_checkpoint_finds_the_reference_of_its_time(tmp_path: Path, checkpoint_every: int, keep: int) -> None:
    for end in range(1, 24):
        root = tmp_path / str(end)
        references = References(root=root, every=3, checkpoint_every=checkpoint_every, keep_checkpoints=keep)
        follow(references, range(1, end + 1))
        if not root.exists():
            continue
        newest = (end - 1) // checkpoint_every * checkpoint_every  # a kill may come before that of `end` is written
        for version in range(newest, max(newest - keep * checkpoint_every, 0), -checkpoint_every):
            expected = version // 3 * 3
            found = [one for one in kept(references) if one <= version]
            assert found[-1:] == ([expected] if expected else []), (end, version)
    assert len(kept(references)) <= (keep + 1) * checkpoint_every / 3 + 2, "older ones are deleted"


def test_a_resume_forgets_what_it_rolled_back(tmp_path: Path) -> None:
    references = References(root=tmp_path / "references", every=2, checkpoint_every=5, keep_checkpoints=2)
    follow(references, range(1, 9))
    assert references.at(5) == tmp_path / "references" / "version-000004" and kept(references) == [2, 4]
    assert follow(references, range(6, 9)).loaded == ["version-000006", "version-000008"]
    (tmp_path / "references" / "version-000008").rmdir()
    with pytest.raises(UserError, match="reference of version 9 is gone"):
        references.at(9)


def test_the_actor_measures_from_what_it_was_told_to_load(tmp_path: Path) -> None:
    path = tiny_policy(tmp_path / "start")
    learner, batch = Learner(recipe(path)), random_batch()
    learner.step(batch)
    learner.export(tmp_path / "later")
    ids = batch.completion_ids[0][batch.mask[0]]
    rollout = Rollout(
        uid="s0",
        seed=0,
        token_ids=ids,
        logprobs=np.zeros(len(ids), np.float32),
        spans=(),
        finish_reason="stop",
        text="",
    )
    prompt = Prompt(
        uid="p", position=0, messages=(Message(role="user", content=""),), token_ids=np.asarray(batch.prompt_ids[0])
    )

    async def measured() -> list[np.ndarray]:
        actor = ReferenceActor(path, Reference(), "float32", 1.0)
        group = Group(prompt=prompt, rollouts=(rollout,))
        before = (await actor.score(group))[0]["reference_logprobs"]
        await actor.load(str(tmp_path / "later"))
        return [before, (await actor.score(group))[0]["reference_logprobs"]]

    before, after = asyncio.run(measured())
    np.testing.assert_allclose(after, learner.sampled_logprobs(prompt.token_ids, ids), atol=1e-4)
    assert np.abs(after - before).max() > 1e-3
