"""Awaiting what a Ray actor answers, with a deadline, and its errors as ours."""

import asyncio
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from configs.errors import UserError
from trainers.types import InfraError


async def call(reference: Any, what: str, deadline_s: float) -> Any:
    """Await a remote call and raise its own error, or InfraError when the actor or the deadline failed."""
    try:
        return await asyncio.wait_for(answer(reference, what), deadline_s)
    except TimeoutError:
        raise InfraError(f"{what}: no answer after {deadline_s:g} s") from None


async def answer(reference: Any, what: str) -> Any:
    """Await a remote call without a deadline; errors as in `call`."""
    try:
        return await reference
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except RayError as error:  # a dead actor or node, a lost object, no memory
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise _from_constructor(what, str(error)) from error
        raise InfraError(f"{what}: {str(error).splitlines()[0]}") from error


def _from_constructor(what: str, text: str) -> Exception:
    """Classify by its text what an actor's constructor raised: Ray keeps nothing else of it."""
    last = text.strip().splitlines()[-1]
    mine = f"{UserError.__module__}.{UserError.__name__}: "
    return UserError(last.removeprefix(mine)) if last.startswith(mine) else InfraError(f"{what}: {last}")
