"""HTML by the standard library's element tree, which escapes every text and attribute."""

import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

Content = ET.Element | str

# Okabe & Ito's colours stand for nothing alone: shapes, arrows and words say the same. Text contrast is above 4.5:1.
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f5f6f8; --ink: #1b1f24; --soft: #555d68; --line: #c9ced6;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1e2229; --ink: #e8eaed; --soft: #a9b1bb;
  --line: #444c57; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1rem; font-weight: 600; margin: 0 0 .75rem; color: var(--soft); }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.card { background: var(--card); border-left: .4rem solid var(--mark); border-radius: .4rem; padding: .75rem 1rem; }
.aligned { border-color: #0072b2; } .flattening { border-color: #e69f00; }
.parted, .decayed, .broken { border-color: #d55e00; } .unknown { border-color: var(--line); }
.label { color: var(--soft); font-size: .875rem; }
.big { font-size: 1.6rem; font-weight: 700; line-height: 1.2; }
.value { font-size: 1.15rem; font-weight: 600; }
.figures { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; margin: .25rem 0 .5rem; }
caption { text-align: left; padding: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
thead th { color: var(--soft); font-weight: 600; }
tr.chosen { background: var(--card); }
@media (max-width: 40rem) {
  table, caption, tbody, tr, th, td { display: block; } thead { position: absolute; clip-path: inset(50%); height: 1px;
    overflow: hidden; }
  tr { padding: .4rem .5rem .4rem 0; border-bottom: 1px solid var(--line); } tr.chosen { padding-left: .5rem; }
  th, td { border: 0; padding: .05rem 0; } td:empty { display: none; }
  td::before { content: attr(data-title) ": "; color: var(--soft); }
}
.text { white-space: pre-wrap; background: var(--card); border-radius: .4rem; padding: .5rem .75rem; }
ul { padding-left: 1.2rem; }
"""


def element(tag: str, *content: Content | Iterable[Content], **attributes: str) -> ET.Element:
    """Build `<tag>`; attribute `class_` is `class`, `aria_label` is `aria-label`."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    out = ET.Element(tag, {names[name]: _printable(value) for name, value in attributes.items()})
    for part in content:
        for child in [part] if isinstance(part, str | ET.Element) else part:
            _append(out, child)
    return out


def _append(parent: ET.Element, child: Content) -> None:
    if isinstance(child, ET.Element):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + _printable(child)
    else:
        parent.text = (parent.text or "") + _printable(child)


def _printable(text: str) -> str:
    """Replace what no HTML file may hold: control characters and lone surrogates."""
    kept = (c if c in "\n\t" or (ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000) else "\ufffd" for c in text)
    return "".join(kept)


def unbroken(text: str) -> str:
    """Keep each interval and each time on one line."""
    return re.sub(r"(\[\S+,) (\S+\])|(\d) (h|min)\b", lambda found: found[0].replace(" ", "\u00a0"), text)


def table(
    caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]], *, chosen: int | None = None
) -> ET.Element:
    """Build a table with a caption and headers of columns and rows; row `chosen` stands out.

    On a phone a row becomes a block with a line a cell; the roles say that it is a table there too.
    """
    head = element("tr", [element("th", title, scope="col", role="columnheader") for title in titles], role="row")
    body = []
    for place, (first, *rest) in enumerate(rows):
        cells = [element("th", first, scope="row", role="rowheader")]
        named = zip(titles[1:], rest, strict=True)
        cells += [element("td", unbroken(cell), role="cell", data_title=title) for title, cell in named]
        body.append(element("tr", cells, role="row", class_="chosen" if place == chosen else "row"))
    parts = [element("thead", head, role="rowgroup"), element("tbody", body, role="rowgroup")]
    whole = element("table", element("caption", caption), parts, role="table")
    # What scrolls must be reachable by keyboard and have a name.
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def document(title: str, *content: Content | Iterable[Content]) -> str:
    """Return a whole HTML file that asks for nothing outside itself."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    page = element("html", head, element("body", element("main", *content)), lang="en")
    return "<!DOCTYPE html>\n" + ET.tostring(page, encoding="unicode", method="html") + "\n"
