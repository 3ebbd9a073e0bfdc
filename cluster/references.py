"""A reference that follows the policy: every so many versions the policy of that version takes its place."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from trainers.pins import Pins


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """The policies that have been the reference, below `root`, complete or absent.

    A resume from an older checkpoint needs the one of then, so those are kept that any kept checkpoint may ask for.
    """

    root: Path
    every: int  # versions
    checkpoint_every: int
    keep_checkpoints: int

    def at(self, version: int) -> Path | None:
        """Return the reference while `version` is trained; None: the recipe's. Forgets what a resume rolled back.

        Raises UserError if it is gone.
        """
        pins = Pins(self.root)
        pins.forget_after(version)
        due = version // self.every * self.every
        if due and not pins.path(due).is_dir():
            raise UserError(f"{pins.path(due)}: the reference of version {version} is gone; put it back, or start anew")
        return pins.path(due) if due else None

    async def follow(
        self, version: int, export: Callable[[str], Awaitable[None]], load: Callable[[str], Awaitable[None]]
    ) -> None:
        """After `version` was published: make it the reference if it is due. `export` writes it, `load` reads it."""
        if version % self.every:
            return
        pins = Pins(self.root)
        await pins.keep(version, export)
        await load(str(pins.path(version)))
        # The checkpoint of `version` itself is still to be written.
        oldest = ((version - 1) // self.checkpoint_every - self.keep_checkpoints + 1) * self.checkpoint_every
        needed = [one for one in pins.versions() if one <= oldest][-1:]
        pins.keep_only([*needed, *(one for one in pins.versions() if one > oldest)])
