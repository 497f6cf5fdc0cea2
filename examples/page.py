"""Write a page to share, and a picture of it: `python -m examples.page` (extras: `demo`; Chromium).

The net of `examples/demo.py` is trained for a few seconds, so that there is something to see.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.demo import DigitNet, batches, digits
from fmapkit import capture
from fmapkit.analysis import DeadFilters, Statistics

PAGE = Path("maps.html")
PICTURE = Path("docs/images/page.png")


def main() -> None:
    """Train, write the page, and take its picture where there is a browser."""
    torch.manual_seed(0)
    model = DigitNet()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train, test = digits()
    stats, dead = Statistics(bins="log2"), DeadFilters(after=len(train[0]))
    with capture(model, kinds="activation", analyses=[stats, dead], keep=0):
        for _ in range(3):
            for images, labels in batches(*train, shuffle=True):
                optimiser.zero_grad()
                F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    with capture(model.eval()) as maps, torch.no_grad():
        model(test[0][:1])
    maps.to_html(PAGE, image=test[0][:1], analyses=[stats, dead], title="A net that reads digits")
    print(f"{PAGE}: {PAGE.stat().st_size / 1e6:.2f} MB")
    if "--picture" in sys.argv:
        take_picture()


def take_picture() -> None:
    """Open the page in Chromium, enlarge a filter, and keep what is seen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.goto(PAGE.resolve().as_uri())
        page.fill("#find", "conv*")
        page.wait_for_selector("canvas[data-drawn]")
        page.locator('section[data-name="conv2"]').first.scroll_into_view_if_needed()
        page.mouse.wheel(0, 60)
        canvas = page.locator('section[data-name="conv2"] .scroll > canvas').nth(1)
        canvas.hover(position={"x": 8 * 40 + 20, "y": 20})
        page.wait_for_timeout(500)
        page.screenshot(path=PICTURE)
        browser.close()
    print(PICTURE)


if __name__ == "__main__":
    main()
