"""Pictures of the widgets for the documentation: docs/widgets-light.png and docs/widgets-dark.png.

    python tools/make_screenshots.py

Opens the page of `make app` in a Chromium, draws an order by hand, generates, and fills a hole.
"""

import io
from pathlib import Path

import browser as driver
from PIL import Image

from mar_mini.files import write_atomically

DOCS = Path(__file__).resolve().parents[1] / "docs"
SPIRAL = [(0, 0), (7, 0), (7, 7), (0, 7), (0, 2), (5, 2), (5, 5), (2, 5), (2, 4)]
HOLE = [(2, 0), (3, 0), (3, 1), (2, 1)]


def take(theme: str, path: Path) -> None:
    """Use the page as a visitor would, and keep what it looks like then."""
    with driver.app(theme) as url, driver.browser() as browser:
        page, _ = driver.new_page(browser, width=1080, height=2010)
        page.goto(url)
        page.wait_for_function(
            "() => document.querySelectorAll('.mar-grid').length === 3", timeout=90_000
        )
        page.get_by_label("order", exact=True).first.select_option("drawn by hand")
        page.wait_for_timeout(500)
        driver.drag(page, page.locator(".mar-grid").nth(0), SPIRAL, 8, 8)
        page.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_function(
            "() => document.querySelectorAll('.mar-grid')[1].dataset.step > 9", timeout=60_000
        )
        page.get_by_role("button", name="Stop", exact=True).first.click()
        driver.drag(page, page.locator(".mar-grid").nth(2), HOLE, 4, 4)
        page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: small.save(temporary, format="png", optimize=True))


if __name__ == "__main__":
    for theme in ("light", "dark"):
        take(theme, DOCS / f"widgets-{theme}.png")
