"""Take the pictures of `neg view` in docs/pictures: what a browser shows of the demo's run.

Run it from the repository, where Chromium is installed and `make demo` has been run: `python -m tests.take_pictures`.
"""

import sys
import tempfile
from pathlib import Path

from tests.build_documents import DOCS

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own modules know each other by their plain names

from browser import Page, browser
from views import serving

_WIDTH = 860


def take_pictures(runs: Path, folder: Path) -> None:
    """Picture a run's page with a list of neurons open, and below it a neuron and a row that it moves."""
    with tempfile.TemporaryDirectory() as profile, serving(runs) as server, browser(Path(profile)) as page:
        page.window(_WIDTH)
        page.send("Emulation.setScrollbarsHidden", hidden=True)
        page.open(f"{server.address}/?token={server.token}")
        page.follow("[...document.querySelectorAll('td a')].find(one => one.textContent === 'runs/demo')")
        best = "[...document.querySelectorAll('details')].find(one => one.textContent.includes('mini/linguistic'))"
        page.value(f"{best}.open = true")
        _picture(page, f"{best}.closest('section')", folder / "view-neurons.png", 440)
        page.follow(f"{best}.querySelector('a')")
        shown = (
            "[...document.querySelectorAll('section')].find(one => one.textContent.includes('mini/linguistic, test'))"
        )
        _picture(page, shown, folder / "view-neuron.png", 620)
        page.follow("[...document.querySelectorAll('td a')].find(one => one.textContent.includes('linguistic'))")
        _picture(page, "document.body", folder / "view-row.png", 900)


def _picture(page: Page, element: str, file: Path, height: int) -> None:
    """Picture a window of that height with an element at its top."""
    page.window(_WIDTH, height)
    page.value(f"{element}.scrollIntoView()")
    page.picture(file, whole=False)


if __name__ == "__main__":
    take_pictures(Path("runs"), DOCS / "pictures")
