"""What no test may leave to the next."""

from collections.abc import Iterator

import pytest

from tests.journals import TRACKERS


@pytest.fixture(autouse=True)
def _no_tracker_goes_on() -> Iterator[None]:
    """End the trackers of a test's journals: their threads would send, and log, during later tests."""
    yield
    while TRACKERS:
        TRACKERS.pop().finish(deadline_s=0)
