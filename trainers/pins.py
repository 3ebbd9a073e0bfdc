"""Versions kept as HF models: those due for evaluation, and after it only the best."""

import shutil
from collections.abc import Awaitable, Callable, Mapping
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

    def keep_only(self, best: int | None, pending: set[int]) -> None:
        """Delete what is neither the best nor still to be evaluated."""
        for version in self.versions():
            if version != best and version not in pending:
                shutil.rmtree(self.path(version))


def best_version(scores: Mapping[int, float]) -> int | None:
    """Return the version with the highest mean of the primary evaluation; the earliest of equals."""
    return max(sorted(scores), key=scores.__getitem__, default=None)
