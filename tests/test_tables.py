"""Tables as other programs write them: in any spelling, in any unit, of any length."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_watch import GOLD, answers, csv
from trainers.sources import read


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "spelt",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: re.sub(r"[^,\n]+", r'"\g<0>"', text),
        lambda text: re.sub(r"^(\d+),", r"\1.0,", text, flags=re.M),
    ],
    ids=["byte order mark", "lines of Windows", "lines of old Macs", "quoted", "versions as floats"],
)
def test_a_table_is_read_as_other_programs_write_it(spelt: Callable[[str], str], here: Path) -> None:
    (here / "plain.csv").write_text(csv())
    (here / "spelt.csv").write_bytes(spelt(csv()).encode())
    plain, other = read("plain.csv").series, read("spelt.csv").series
    for one, same in zip((plain.reward, plain.primary), (other.reward, other.primary), strict=True):
        assert one.versions.tolist() == same.versions.tolist() and one.mean.tolist() == same.mean.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit", [1e-90, 1e90])
def test_the_unit_does_not_matter(unit: float, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.csv").write_text(csv())
    rows = [f"{10 * i},{i / 10 * unit},{i / 50 * unit},{GOLD[i] * unit},{0.05 * unit}" for i in range(10)]
    (here / "scaled.csv").write_text("\n".join(["version,reward,kl,gold,gold_se", *rows, ""]))
    plain, scaled = answers(["run.csv"], capsys), answers(["scaled.csv"], capsys)
    for field_ in ("state", "since_version", "chosen_version"):
        assert scaled[field_] == plain[field_]
    assert scaled["minimum_detectable_drop"] == pytest.approx(unit * plain["minimum_detectable_drop"])


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"{i},{i / 1e5},{GOLD[i // 10_000]},0.05" if i % 10_000 == 0 else f"{i},{i / 1e5},," for i in range(100_000)
    ]
    (here / "run.csv").write_text("\n".join(["step,reward,gold,gold_se", *rows, ""]))
    found = answers(["run.csv"], capsys)
    assert found["state"] == "parted" and found["evaluated_versions"] == list(range(0, 100_000, 10_000))
