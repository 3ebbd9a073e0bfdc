"""The spool: nothing lost, nothing twice, whatever the server does."""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from trainers.spool import Outages, Record, RejectedError, Spool, UnavailableError, read, read_metrics, surviving


class Store:
    """A server in memory: a set of records, as MLflow's metric table is, that may be away or fussy."""

    def __init__(self, name: str = "store", away: bool = False) -> None:
        self.name = name
        self.away = away
        self.kept: list[Record] = []
        self.asked = threading.Event()

    def open(self) -> str:
        if self.away:
            self.asked.set()
            raise UnavailableError("is not reachable")
        return self.name

    def send(self, records: Sequence[Record]) -> None:
        self.open()
        if any(record["value"] < 0 for record in records):
            raise RejectedError("negative")
        self.kept += records


@pytest.fixture
def spools(tmp_path: Path) -> Iterator[Callable[[Store], Spool]]:
    opened: list[Spool] = []

    def open_spool(store: Store) -> Spool:
        opened.append(Spool(tmp_path / "metrics.jsonl", store, Outages("store")))
        return opened[-1]

    yield open_spool
    for spool in opened:
        spool.close(0)


def records(*values: int) -> list[Record]:
    return [{"kind": "metric", "key": "a", "value": value, "step": value, "timestamp": value} for value in values]


def test_records_wait_for_the_server_and_go_once(
    spools: Callable[[Store], Spool], caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(away=True)
    spool = spools(store)
    spool.append(records(*range(1200)))
    assert store.asked.wait(5)
    store.away = False
    assert spool.drain(10) and spool.close(0) == 0
    assert store.kept == records(*range(1200))
    assert [("not reachable" in m, "again" in m) for m in caplog.messages] == [(True, False), (False, True)]


def test_a_reopened_spool_continues_and_a_new_receiver_gets_all(spools: Callable[[Store], Spool]) -> None:
    store = Store()
    first = spools(store)
    first.append(records(1, 2))
    assert first.close(5) == 0
    store.away = True
    second = spools(store)
    second.append(records(3))
    assert second.close(0) == 1
    store.away = False
    third = spools(store)
    third.append(records(4))
    assert third.close(5) == 0 and store.kept == records(1, 2, 3, 4)
    other = Store("other")
    fourth = spools(other)
    fourth.append(records(5))
    assert fourth.close(5) == 0 and other.kept == records(1, 2, 3, 4, 5)


def test_a_torn_record_is_cut_and_time_never_runs_backwards(tmp_path: Path, spools: Callable[[Store], Spool]) -> None:
    path, late = tmp_path / "metrics.jsonl", 9_999_999_999_999
    path.write_text(f'{{"kind": "metric", "key": "a", "value": 1, "step": 1, "timestamp": {late}}}\n{{"kind": "met')
    store = Store()
    spool = spools(store)
    assert spool.now() == late + 1
    spool.append(records(2))
    assert spool.close(5) == 0
    assert [record["value"] for record in read(path)] == [1, 2] == [record["value"] for record in store.kept]


def test_a_refused_record_is_set_aside_and_holds_up_no_other(
    tmp_path: Path, spools: Callable[[Store], Spool], caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    with caplog.at_level(logging.WARNING):
        spool = spools(store)
        spool.append(records(1, -2, 3))
        assert spool.close(5) == 0
    assert store.kept == records(1, 3)
    assert list(read(tmp_path / "metrics.rejected.jsonl")) == records(-2)
    assert "negative" in caplog.text


@pytest.mark.parametrize("goes_away", [True, False])
def test_a_delivery_that_ends_after_the_spool_and_its_directory_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, goes_away: bool
) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Slow(Store):
        def send(self, records: Sequence[Record]) -> None:
            asked.set()
            assert answer.wait(30)
            if goes_away:
                raise UnavailableError("is not reachable")

    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    (tmp_path / "run").mkdir()
    spool = Spool(tmp_path / "run" / "metrics.jsonl", Slow(), Outages("store"))
    spool.append(records(1))
    assert asked.wait(30) and spool.close(0) == 1
    shutil.rmtree(tmp_path / "run")
    answer.set()
    spool._thread.join(30)
    assert not spool._thread.is_alive() and not raised and not caplog.messages


def test_rolled_back_points_are_dropped_and_repeated_ones_replaced(tmp_path: Path) -> None:
    starts = [(0, 0), (2, 10)]  # the second incarnation takes up at version 2, at time 10
    points = [(1, 1, 1.0), (2, 2, 2.0), (3, 3, 3.0), (4, 4, 4.0), (3, 11, 30.0), (2, 12, 20.0)]
    assert surviving(points, starts) == [(1, 1.0), (2, 20.0), (3, 30.0)]
    lines = [("run/incarnation", s, t, float(i)) for i, (s, t) in enumerate(starts)] + [("a", *p) for p in points]
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            '{"kind": "metric", "key": "%s", "step": %d, "timestamp": %d, "value": %s}\n' % line  # noqa: UP031
            for line in sorted(lines, key=lambda line: line[2])
        )
    )
    assert read_metrics(path)["a"] == [(1, 1.0), (2, 20.0), (3, 30.0)]
