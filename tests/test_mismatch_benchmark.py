"""The truths that benchmarks.instrument simulates are what their names say; a fast part of it keeps its goals."""

import numpy as np
import pytest

from benchmarks.instrument import ALPHA, WITHIN, cells, measure
from trainers.mismatch import scan
from trainers.mismatch.alarm import margin_by_look


@pytest.mark.parametrize("points", [10, 20])
def test_nulls_never_fall_and_falls_have_the_drop_of_their_name(points: int) -> None:
    found = list(cells(points))
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        if cell.peak is None:
            assert np.all(np.diff(cell.truth) >= 0)
        else:
            assert np.argmax(cell.truth) <= cell.peak and cell.truth[cell.peak] == cell.truth.max()
            fall = cell.truth[cell.peak] - cell.truth[cell.peak + WITHIN]
            assert fall == pytest.approx(float(cell.name.rpartition(" ")[2]))


def test_a_fast_part_of_the_table() -> None:
    points = 10
    bound = scan.boundary(scan.null_maxima(np.eye(points), 4_000, 0), ALPHA, points)
    none, default = (margin_by_look(np.eye(points), margin) for margin in (0.0, None))
    by_name = {cell.name: cell for cell in cells(points)}
    for name in ("null flat", "null slow rise", "null plateau", "null two-stage rise"):
        assert measure(by_name[name], bound, none, 2_000, [0, 1]) <= 0.05
    for name in ("null SE understated 1.25", "null AR(1) 0.6"):
        assert measure(by_name[name], bound, default, 2_000, [0, 2]) <= 0.1
    assert measure(by_name["cliff middle drop 6"], bound, none, 2_000, [0, 3]) >= 0.95
