"""One live line on a terminal, a plain log line elsewhere."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping

from trainers.mismatch import State

log = logging.getLogger("headroom")
PLAIN_EVERY_S = 10.0


class Progress:
    """Shows step, reward, the primary evaluation, KL, staleness, tokens/s and the time left."""

    def __init__(self, *, first: int, steps: int, primary: str | None) -> None:
        self._first = first
        self._steps = steps
        self._primary = primary
        self._began = time.monotonic()
        self._shown = -math.inf
        self._live = sys.stderr.isatty()

    def show(
        self, version: int, metrics: Mapping[str, float], evaluation: float | None, state: State | None = None
    ) -> None:
        """Show where the run stands after the step that produced `version`; `state` as the instrument names it."""
        now = time.monotonic()
        if not self._live and now - self._shown < PLAIN_EVERY_S and version not in (self._first + 1, self._steps):
            return
        self._shown = now
        left = (now - self._began) / max(version - self._first, 1) * (self._steps - version)
        line = f"step {version}/{self._steps}  reward {metrics['reward/mean']:+.3f}"
        if self._primary:
            line += f"  {self._primary} {'  …   ' if evaluation is None else format(evaluation, '+.3f')}"
        if state is not None:
            line += f"  {state}"
        if "kl/reference" in metrics:
            line += f"  KL {metrics['kl/reference']:.4f}"
        line += f"  stale {metrics['rollout/staleness_max']:.0f}  {metrics['throughput/tokens_per_s']:.0f} tok/s"
        line += f"  ETA {int(left) // 60}:{int(left) % 60:02d}"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + line[:width].ljust(width))
            sys.stderr.flush()
        else:
            log.info(line)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live:
            sys.stderr.write("\n")
