"""What a supervised training reached, and what decides it."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from configs.schema import Offline
from trainers.objectives import Rows

RESULT = "result.json"
Kind = Literal["sft", "reward", "dpo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a supervised training reached on the prompts it did not see; also its `result.json`."""

    kind: str  # sft, reward or dpo
    loss: float  # held-out: nats per token (sft), nats per pair or ranking (others); NaN without held-out rows
    loss_before: float  # of the start weights
    accuracy: float | None  # reward, dpo: share of held-out pairs in the annotators' order, mean over rows
    accuracy_low: float | None  # Wilson interval, 95 %; if anything too wide where a row has several pairs
    accuracy_high: float | None
    rows: int  # trained on
    holdout_rows: int
    steps: int
    seconds: float  # of the last launch
    config_hash: str  # of configuration, start weights and rows: equal hashes are not trained again


def load_result(output: str | Path, config_hash: str) -> Result | None:
    """Return the result at `output` if it came from the same configuration, start weights and rows."""
    path = Path(output) / RESULT
    if not path.exists():
        return None
    try:
        result = Result(**json.loads(path.read_text()))
    except (ValueError, TypeError):  # cut off, another program's, or of the demo's random start
        return None
    if not result.holdout_rows:  # null in the file
        result = replace(result, loss=math.nan, loss_before=math.nan)
    return result if result.config_hash == config_hash else None


def foreign(path: Path, kind: Kind) -> str | None:
    """Return in words what a `result.json` is if no training of this `kind` wrote it, None if one did.

    {} is none's: the demo writes it beside random weights that such a training is still to replace.
    """
    try:
        told = json.loads(path.read_text())
    except ValueError:
        told = None
    if told == {}:
        return None
    known = isinstance(told, dict) and told.get("kind") in get_args(Kind)
    if not known or not re.fullmatch("[0-9a-f]{64}", str(told.get("config_hash"))):
        return f"a {path.name} that no training of Headroom wrote"
    return None if told["kind"] == kind else f"what headroom {told['kind']} has trained"


def training_hash(kind: str, config: Offline, base: str, rows: Rows, margins: Sequence[float] | None = None) -> str:
    """Return a sha256 of everything that decides the trained weights."""
    places: Any = {"output": True, "checkpoint_every": True, "engine": {"resources", "threads", "share_prompts"}}
    digest = hashlib.sha256(f"{kind}\n{config.model_dump_json(exclude=places)}\n".encode())
    files = sorted(
        p for p in Path(base).glob("*") if p.suffix in (".safetensors", ".bin", ".json") and p.name != RESULT
    )
    if not files:
        digest.update(base.encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    for texts in rows:
        digest.update(len(texts).to_bytes(4, "little"))
        for ids in texts:
            digest.update(len(ids).to_bytes(4, "little") + np.asarray(ids, np.int32).tobytes())
    digest.update(np.asarray(() if margins is None else margins, np.float64).tobytes())
    return digest.hexdigest()


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default. Wilson 1927.

    successes may be a sum of shares in [0, 1]: their variance is at most that of yes and no, so it is wide enough then.
    """
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return centre - half, centre + half
