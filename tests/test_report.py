"""The report: what is on the page and in the terminal, that it asks for nothing, and that everybody can read it."""

import base64
import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import report
from cluster.__main__ import main
from cluster.report.figures import Picture, pictures
from cluster.report.html import STYLE
from cluster.report.page import page
from cluster.report.text import text
from cluster.report.view import Sample, View, interval, number
from tests.simulated import view
from tests.test_watch import csv, refused
from trainers.mismatch import Series, Settings, find, from_means

VOID = {"meta", "img", "br"}
ASKS = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}
EVIL = "<script>alert('1')</script> & \"quoted\""
PHONE = (390, 844)


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and the text inside each element that has an id."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.by_id: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(source)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        for _, name in self._open:
            if name is not None:
                self.by_id[name] = self.by_id.get(name, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def shown() -> tuple[View, list[Picture]]:
    found = view().findings
    room = replace(found.headroom, answer="interval", low=0.0, high=0.08, estimand="gain within the KL seen")
    of = view(name=EVIL, findings=replace(found, headroom=room))
    return of, pictures(of)


@pytest.fixture(scope="module")
def source(shown: tuple[View, list[Picture]]) -> str:
    return page(*shown)


def test_what_is_to_be_known_first_comes_first(source: str, shown: tuple[View, list[Picture]]) -> None:
    parsed, verdict = Parsed(source), shown[0].verdict
    assert verdict.state == "parted"
    assert f"↑↓ Parted since version {verdict.since_version}" in parsed.by_id["state"]
    assert "At most 5 % of runs" in parsed.by_id["state"]
    take = re.search(r"Take version (\d+)helpdesk/gold \+\d\.\d+ \[\+\d\.\d+,\s\+\d\.\d+\]", parsed.by_id["checkpoint"])
    assert take and "true mean of helpdesk/gold at version" in parsed.by_id["checkpoint"]
    assert re.search(r"\[\+0\.0+, \+0\.080?\]", parsed.by_id["headroom"].replace("\u00a0", " "))
    assert source.index('id="state"') < source.index('id="checkpoint"') < source.index("<figure>")


def test_the_evidence_is_there(source: str, shown: tuple[View, list[Picture]]) -> None:
    parsed = Parsed(source)
    for words in ("minimum detectable drop", "raw best", "Spearman", "rollout/length_mean", "standard error, median",
                  "0123456789ab", "My router is broken.", "algorithm.kl.coefficient"):  # fmt: skip
        assert words in parsed.text, words
    names = [picture.name for picture in shown[1]]
    assert names == ["curves", "distance", "scatter-0", "scatter-1", "windows", "early-warnings"]


def test_nothing_is_asked_for_outside_the_file(source: str) -> None:
    parsed = Parsed(source)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert name not in ASKS or value.startswith("data:image/svg+xml;base64,"), (tag, name)
            assert not name.startswith("on")
    assert "url(" not in STYLE and "@import" not in STYLE
    for image in parsed.all("img"):
        svg = base64.b64decode(image["src"].partition("base64,")[2]).decode()
        assert re.findall(r"href=\"(?!#|data:)", svg) == []
        assert re.findall(r"url\((?!#)", svg) == [] and "<script" not in svg and "@import" not in svg


def test_a_user_s_text_stays_text() -> None:
    nasty = EVIL + "\x00\x1b[31m\ud800"
    sample = Sample(prompt=nasty, completions={0: nasty})
    of = view(name=nasty, samples=(sample,), params={nasty: nasty}, notes=(nasty,), evaluation_hash=nasty)
    made = page(of, [])
    parsed = Parsed(made)
    assert not parsed.all("script") and parsed.text.count(EVIL) >= 6
    assert made.encode() and not re.search(r"[\x00\x1b]", made)


def test_everybody_can_read_it(source: str) -> None:
    parsed = Parsed(source)
    assert parsed.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert len(parsed.all("img")) == 6 and all(len(image["alt"]) > 40 for image in parsed.all("img"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) >= 5
    assert all(header["scope"] in ("col", "row") for header in parsed.all("th"))


def test_text_has_contrast_in_the_light_and_in_the_dark() -> None:
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    for colours in (_colours(light), _colours(dark.partition("}")[0])):
        for front in ("ink", "soft"):
            for back in ("paper", "card"):
                assert _contrast(colours[front], colours[back]) >= 4.5, (front, back)


def _colours(style: str) -> Mapping[str, str]:
    return dict(re.findall(r"--(\w+): #([0-9a-f]{6})", style))


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_the_terminal_says_the_same(shown: tuple[View, list[Picture]], source: str) -> None:
    said, parsed = text(shown[0]), Parsed(source).text.replace("\u00a0", " ")
    for line in re.findall(r"Parted since version \d+|\[[+-][\d.]+, [+-][\d.]+\]", said):
        assert line in parsed
    assert "Take version" in said and "↑↓" in said and "▁" in said


def test_too_little_says_so_and_why() -> None:
    reward = from_means("reward", [0, 1], [0.0, 1.0], None)
    short = Series(reward=reward, evaluations=(from_means("gold", [0, 1], [1.0, 1.1], [0.1, 0.1]),))
    of = View(name="short", findings=find(short, Settings(runs=2_000)))
    for said in (text(of), Parsed(page(of, pictures(of))).text):
        assert "Not enough to say" in said and "2 evaluated versions, 3 are needed" in said
        assert "No version is chosen" in said and "Take version" not in said and "ot identified" in said


def test_every_state_has_words_of_its_own() -> None:
    seen = {}
    for family in ("null slow rise", "kink middle drop 6"):
        of = view(family)
        seen[of.verdict.state] = text(of)
    assert set(seen) == {"aligned", "parted"}
    assert "No fall of helpdesk/gold" in seen["aligned"] and "smallest drop it would find" in seen["aligned"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_a_number_is_rounded_far_inside_its_uncertainty(value: float, spread: float) -> None:
    assert abs(float(number(value, spread)) - value) <= max(spread / 20, 0.5e-8)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((0.4131, 0.3622, 0.464), "+0.413 [+0.362, +0.464]"),
        ((None, 0.0, 0.08), "[+0.000, +0.080]"),
        ((None, None, 0.08), "at most +0.080"),
        ((None, 0.02, None), "at least +0.020"),
        ((None, None, None), "not identified"),
        ((0.5, None, None), "+0.5000 (no interval)"),
    ],
)
def test_an_interval_says_what_is_known(ends: tuple[float | None, float | None, float | None], said: str) -> None:
    assert interval(*ends) == said


def test_files_are_written_whole(shown: tuple[View, list[Picture]], source: str, tmp_path: Path) -> None:
    made = report.write(tmp_path / "a" / "b", source, shown[1])
    assert made.read_text(encoding="utf-8") == source
    assert {path.name for path in made.parent.iterdir()} == {"report.html", *(f"{one.name}.png" for one in shown[1])}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.parent.glob("*.png"))


def test_a_table_is_reported_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my run.csv").write_text(csv())
    assert main(["report", "my run.csv"]) == 0
    printed = capsys.readouterr().out
    assert "Parted since version" in printed and "Take version" in printed
    assert printed.endswith("report-my-run/report.html\n")
    parsed = Parsed(Path("report-my-run/report.html").read_text(encoding="utf-8"))
    assert (
        "Take version" in parsed.by_id["checkpoint"]
        and "interval of the true mean of gold" in parsed.by_id["checkpoint"]
    )
    assert "highest reward" in parsed.text and "up to version 135" in parsed.by_id["headroom"]
    assert main(["report", "my run.csv", "--text", "--version-budget", "200"]) == 0
    assert "up to version 200" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.csv").write_text(csv())
    Path("file").touch()
    refused(["report", "nowhere.csv"], ["nowhere.csv", "no such file or run directory"], capsys)
    refused(["report", "run.csv", "--eval", "golb"], ["--eval", "golb", "gold"], capsys)
    refused(["report", "run.csv", "--evel", "gold"], ["--evel", "--eval"], capsys)
    refused(["report", "run.csv", "other.csv"], ["unexpected 'other.csv'"], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run.csv", "file"}
    assert main(["report", "run.csv", "--output", "file/below"]) == 2
    assert "--output file/below: Not a directory" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    yield found


@pytest.mark.slow
def test_a_phone_shows_it_without_scrolling_sideways(chromium: str, source: str, tmp_path: Path) -> None:
    width, height = PHONE
    measure = """
    frame.onload = () => { const w = frame.contentWindow, d = frame.contentDocument;
      const bottom = (id) => d.getElementById(id).getBoundingClientRect().bottom;
      document.title = JSON.stringify({ wide: d.documentElement.scrollWidth, state: bottom('state'),
        checkpoint: bottom('checkpoint'), images: [...d.images].map(i => i.complete && i.naturalWidth > 0),
        asked: w.performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')) }); }
    frame.srcdoc = source.textContent;
    """
    # A window cannot be as narrow as a phone; a frame can.
    frame = f'<iframe id="frame" style="width:{width}px;height:{height}px;border:0"></iframe>'
    wrapped = (
        f'<meta charset="utf-8">{frame}<pre id="source" hidden>{html.escape(source)}</pre><script>{measure}</script>'
    )
    (tmp_path / "wrapper.html").write_text(f"<!DOCTYPE html><html><body>{wrapped}</body></html>", encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "wrapper.html")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert found["wide"] <= width and found["asked"] == []
    assert found["state"] < found["checkpoint"] <= height
    assert found["images"] == [True] * 6
