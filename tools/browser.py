"""A real browser for tests and screenshots: a Chromium of the system, driven by Playwright."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
RUN_JUPYTER = (
    "import sys; from pathlib import Path; from mar_mini.course.chapters import run_jupyter; "
    "sys.exit(run_jupyter(sys.argv[1:], Path.cwd()))"
)
# told apart from faults of ours: what other people's pages say of themselves in a console
KNOWN_MESSAGES = (
    "of shared singleton module",  # Voila's JupyterLab is older than the one installed
    "No satisfying version",
    "Comm not found for comm id",  # JupyterLab asks for widgets of before while cells make new ones
    "Failed to load resource",  # noted with its address instead
    "willReadFrequently",  # advice that concerns the tests, which read colours back
)


def chromium() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


def new_page(browser, width: int = 1280, height: int = 1000, scheme: str = "light"):
    """A page, and the list in which its faults gather: console errors, requests to other hosts."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    faults: list[str] = []

    def on_console(message):
        ours = not any(known in message.text for known in KNOWN_MESSAGES)
        if message.type in ("error", "warning") and ours:
            faults.append(f"{message.type}: {message.text}")

    def on_request(request):
        if not re.match(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:", request.url):
            faults.append(f"request to {request.url}")

    def on_response(response):
        if response.status >= 400:
            faults.append(f"{response.status}: {response.url}")

    page.on("console", on_console)
    page.on("response", on_response)
    page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
    page.on("request", on_request)
    return page, faults


@contextmanager
def served(*command: str, folder: Path, seconds: float = 90, **variables: str) -> Iterator[str]:
    """Run `python COMMAND` in a folder until it prints an address with a token; yields that.

    variables  of its environment

    Raises RuntimeError with what it printed if it does not.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield address(process, log, seconds)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def address(process: subprocess.Popen, log, seconds: float) -> str:
    """Wait for the address that a server prints."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        log.seek(0)
        found = re.search(r"http://(127\.0\.0\.1|localhost):\d+/\S*token=\w+", log.read())
        if found:
            return found[0]
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"no address within {seconds:.0f} s; it printed: {log.read()[-2000:]}")


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """JupyterLab on a folder, with the course's settings; yields its address.

    It knows nothing of what was open when, and leaves nothing in the user's settings.
    """
    with (
        tempfile.TemporaryDirectory() as fresh,
        served(
            "-c",
            RUN_JUPYTER,
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--port=0",
            "--expose-app-in-browser",
            "--notebook-dir",
            str(folder),
            folder=folder,
            JUPYTER_CONFIG_DIR=fresh,
            JUPYTERLAB_WORKSPACES_DIR=fresh,
            JUPYTERLAB_SETTINGS_DIR=fresh,
        ) as url,
    ):
        yield url


@contextmanager
def app(theme: str = "light", port: int = 8866) -> Iterator[str]:
    """The page of the widgets; yields its address."""
    command = ("-m", "mar_mini", "app", "--theme", theme, "--port", str(port), "--", "--no-browser")
    with served(*command, folder=Path.cwd()) as url:
        yield url


def drag(page, canvas, cells: list[tuple[int, int]], rows: int, columns: int) -> None:
    """Draw with the mouse through the middles of these (x, y) cells of a canvas."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    width, height = box["width"] / columns, box["height"] / rows
    first, *rest = [(box["x"] + (x + 0.5) * width, box["y"] + (y + 0.5) * height) for x, y in cells]
    page.mouse.move(*first)
    page.mouse.down()
    for place in rest:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
