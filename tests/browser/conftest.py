"""A browser for these tests; where there is none they are skipped, and say so."""

import browser as driver
import pytest

# their colours on a canvas are compared with these
from mar_mini.viz.figures import KNOWN, MASKED, PREDICTED

COLOURS = [MASKED, PREDICTED, KNOWN]


def pytest_collection_modifyitems(items):
    if driver.chromium() is None:
        reason = "no chromium on this machine; install it (Debian: apt-get install chromium)"
        for item in items:
            if "browser" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")  # no longer: while it runs, no other event loop can
def chromium():
    with driver.browser() as started:
        yield started


# the middle of each cell's upper left eighth: beside numbers, on the frame of a predicted token
SEEN = """
(canvas, [rows, columns]) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const hex = (x) => x.toString(16).padStart(2, "0").toUpperCase();
  const seen = [];
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const left = Math.floor((x + 0.035) * canvas.width / columns) + 1;
    const top = Math.floor((y + 0.5) * canvas.height / rows);
    const at = 4 * (top * canvas.width + left);
    seen.push("#" + hex(pixels.data[at]) + hex(pixels.data[at + 1]) + hex(pixels.data[at + 2]));
  }
  return seen;
}
"""


def seen_states(canvas, rows, columns):
    """What a canvas shows of each token: 0, 1, 2 by its colour, None for a picture's."""
    colours = canvas.evaluate(SEEN, [rows, columns])
    return [COLOURS.index(colour) if colour in COLOURS else None for colour in colours]
