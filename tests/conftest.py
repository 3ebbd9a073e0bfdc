"""What no test may leave to the next."""

import os
from collections.abc import Iterator

import pytest

from tests.journals import TRACKERS

os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # of a server: seven processes that nothing here needs


@pytest.fixture(autouse=True)
def _no_tracker_goes_on() -> Iterator[None]:
    """End the trackers of a test's journals: their threads would send, and log, during later tests."""
    yield
    while TRACKERS:
        TRACKERS.pop().finish(deadline_s=0)
