"""`headroom report`: one run as a page, a text and pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

from cluster.report.figures import Picture
from configs.errors import UserError
from trainers.rundir import write_atomic


def folder_of(name: str) -> Path:
    """Return where a report goes when nobody says where."""
    return Path(f"report-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.')[:80] or 'run'}")


def write(folder: Path, html: str, pictures: Sequence[Picture], name: str = "report") -> Path:
    """Write `<name>.html` and a PNG of each picture into `folder`; return the page's path.

    Each file is complete or absent, the page comes last. Raises UserError if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from None
    for picture in pictures:
        write_atomic(folder / f"{picture.name}.png", picture.png)
    page = folder / f"{name}.html"
    write_atomic(page, html)
    return page
