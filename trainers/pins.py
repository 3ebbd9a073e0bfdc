"""Versions kept as HF models: those due for evaluation, and after it only the best."""

import shutil
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

PREFIX = "version-"


class Pins:
    """The models below one directory: complete or absent, deleted once evaluated and beaten."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, version: int) -> Path:
        """Return where the HF model of `version` lies, or would."""
        return self.root / f"{PREFIX}{version:06d}"

    def versions(self) -> list[int]:
        """Return the versions that are kept, oldest first."""
        return sorted(int(path.name.removeprefix(PREFIX)) for path in self.root.glob(f"{PREFIX}[0-9]*"))

    async def keep(self, version: int, export: Callable[[str], Awaitable[None]]) -> None:
        """Export `version` unless it is there already; a kill leaves no half model under its name."""
        path = self.path(version)
        if path.exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.root / f".partial-{path.name}"
        shutil.rmtree(partial, ignore_errors=True)
        await export(str(partial))
        partial.rename(path)

    def forget_after(self, version: int) -> None:
        """Delete versions that a resume rolled back."""
        for later in self.versions():
            if later > version:
                shutil.rmtree(self.path(later))

    def keep_only(self, kept: Collection[int | None]) -> None:
        """Delete every version but these."""
        for version in self.versions():
            if version not in kept:
                shutil.rmtree(self.path(version))


def best_version(scores: Mapping[int, float]) -> int | None:
    """Return the version with the highest mean of the primary evaluation; the earliest of equals."""
    return max(sorted(scores), key=scores.__getitem__, default=None)
