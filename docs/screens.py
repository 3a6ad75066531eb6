#!/usr/bin/env python3
"""Draw two pages of explore.py as a browser shows them: PNG files beside this one.

    make screens

It needs a Chromium that is there, and the networks that `make demo` trains.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, sync_playwright

DOCS = Path(__file__).resolve().parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def serving(runs: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Serve the notebook as `make explore` does; yield the process and the page's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ["run", "--no-check", "--headless", "--host", "127.0.0.1", "--port", str(port)]
    notebook = [str(DOCS.parent / "src/explore.py"), "--", "--runs", str(runs)]
    command = [sys.executable, "-m", "marimo", "-q", *run, *notebook]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=DOCS.parent)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browsing() -> Iterator[Browser]:
    """Start the browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(page: Page, address: str, seconds: float = 60) -> None:
    """Open the notebook, once it is served, and wait for its first table."""
    end = time.monotonic() + seconds
    while True:
        try:
            page.goto(address)
            break
        except Error:  # refused, for the server is not ready
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    page.get_by_role("table").first.wait_for(timeout=1000 * seconds)


def main() -> int:
    """Draw the formula with a mask that leaks, and the Transformer without a head."""
    if not CHROMIUM:
        print(f"screens.py: none of {', '.join(NAMES)} is there", file=sys.stderr)
        return 1
    with serving(DOCS.parent / "runs") as (_, address), browsing() as browser:
        page = browser.new_page(viewport={"width": 1150, "height": 1300})
        open_page(page, address)
        page.get_by_label("Mask").select_option("causal, added as 1 and 0")
        page.get_by_text("The future leaks").wait_for()
        page.screenshot(path=DOCS / "explore-formula.png")
        page.get_by_label("Page", exact=True).select_option("Transformer")
        page.get_by_role("table", name="200 unseen dates").wait_for()
        head = "decoder layer 2, cross attention, head 1"
        page.get_by_label("Head switched off").select_option(head)
        page.get_by_text("Reading 200 dates").wait_for()
        page.get_by_role("table", name="200 unseen dates").wait_for()
        page.set_viewport_size({"width": 1150, "height": 1560})
        page.wait_for_timeout(2000)  # the tables of the network before are gray until then
        page.screenshot(path=DOCS / "explore-transformer.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
