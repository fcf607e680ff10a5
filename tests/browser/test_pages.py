"""The widgets in JupyterLab and on their page: every control, pressed as a reader would."""

import re
import time
from pathlib import Path

import browser as driver
import jupytext
import nbformat
import pytest
from browser import drag
from conftest import seen_states

# one browser and one server for all
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages")]
REPO = Path(__file__).resolve().parents[2]
CELLS = """\
# %%
from mar_mini.viz import GenerationTheatre, Inpainter, MaskOrderExplorer
explorer = MaskOrderExplorer()
explorer

# %%
theatre = GenerationTheatre(label=7, seed=1)
theatre

# %%
inpainter = Inpainter()
inpainter
"""
READY = """
() => {
  const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
  return kernel?.connectionStatus === "connected" && kernel?.status === "idle";
}
"""
RUN = """
async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code });
  let text = "";
  future.onIOPub = ({ content }) => {
    text += content.text ?? (content.traceback ?? []).join("\\n");
  };
  await future.done;
  return text;
}
"""


class Lab:
    """A notebook that was opened and run in JupyterLab."""

    def __init__(self, page, faults):
        self.page, self.faults = page, faults

    def open(self, url, name, canvases):
        self.page.goto(url.replace("/lab?", f"/lab/tree/{name}?reset&"))
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.evaluate(
            """async () => {
              const panel = jupyterapp.shell.currentWidget;
              await Promise.all([panel.context.ready, panel.revealed]);
              jupyterapp.commands.execute("notebook:run-all-cells");  // ends when all cells have
            }"""
        )
        self.page.wait_for_function(
            "(count) => document.querySelectorAll('.mar-grid').length === count",
            arg=canvases,
            timeout=180_000,
        )
        self.page.wait_for_function(READY, timeout=180_000)

    def python(self, expression):
        """The value of an expression in the kernel."""
        text = self.page.evaluate(RUN, f"print(repr({expression}))")
        return eval(text, {"nan": float("nan")})

    def grid(self, number):
        return self.page.locator(".mar-grid").nth(number)

    def widget(self, number):
        return self.page.locator(".jp-OutputArea-output:has(.mar-grid)").nth(number)

    def select(self, number, label, option):
        self.widget(number).get_by_label(label, exact=True).select_option(option)

    def until(self, expression, seconds=30.0):
        end = time.monotonic() + seconds
        while not self.python(expression):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.05)

    def settle(self):
        """Until what Python has said is drawn."""
        self.python("1")
        self.page.wait_for_timeout(300)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    notebook = jupytext.reads(CELLS, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    jupytext.write(notebook, folder / "widgets.ipynb")
    chapter = nbformat.read(REPO / "notebooks" / "06_masking.ipynb", as_version=4)
    uses = [i for i, cell in enumerate(chapter.cells) if "drawn = explorer.order" in cell.source]
    chapter.cells = chapter.cells[: uses[0] + 1]  # tests/test_chapters.py runs it to its end
    nbformat.write(chapter, folder / "06_masking.ipynb")
    with driver.lab(folder) as url:
        yield url


@pytest.fixture(scope="module")
def lab(chromium, server):
    page, faults = driver.new_page(chromium, width=1300, height=2300)
    opened = Lab(page, faults)
    opened.open(server, "widgets.ipynb", canvases=3)
    yield opened
    page.close()


@pytest.fixture(autouse=True)
def without_faults(lab):
    yield
    assert lab.faults == []


def test_the_explorer_shows_what_python_holds(lab):
    page, grid, explorer = lab.page, lab.grid(0), lab.widget(0)
    for order, step in [("spiral", 5), ("halton", 11), ("random", 16)]:
        lab.select(0, "order", order)
        explorer.get_by_role("slider", name="Step").fill(str(step))
        lab.settle()
        mask, states = lab.python("(explorer.mask[0].tolist(), explorer.canvas.states())")
        seen = seen_states(grid, 8, 8)
        assert [state == 0 for state in seen] == mask and seen == states
    lab.select(0, "tokens per step", "linear")
    lab.settle()
    assert lab.python("explorer.tokens_per_step") == [4] * 16
    grid.focus()
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    lab.until("explorer.canvas.step >= 2")
    page.keyboard.press("Space")


def test_a_drawn_order_is_a_permutation(lab):
    lab.select(0, "order", "drawn by hand")
    lab.settle()
    cells = [(7, 7), (0, 7), (0, 3), (4, 3)]
    drag(lab.page, lab.grid(0), cells, 8, 8)
    lab.settle()
    order = lab.python("explorer.order[0].tolist()")
    assert sorted(order) == list(range(64))
    assert order[:8] == [63, 62, 61, 60, 59, 58, 57, 56] and order[8:16] == [
        48,
        40,
        32,
        24,
        25,
        26,
        27,
        28,
    ]
    lab.page.get_by_role("button", name="Clear the drawing").click()
    lab.settle()
    assert lab.python("explorer.order[0].tolist()") == list(range(64))


def test_a_generation_fills_the_canvas_and_the_kernel_goes_on_listening(lab, record_property):
    grid, theatre = lab.grid(1), lab.widget(1)
    begun = time.perf_counter()
    theatre.get_by_role("button", name="Generate", exact=True).click()
    lab.page.wait_for_function(
        "() => document.querySelectorAll('.mar-grid')[1].dataset.step !== '0'", polling=10
    )
    first = time.perf_counter() - begun
    assert lab.python("1 + 1") == 2
    lab.until("not theatre._generation.running")
    seconds = time.perf_counter() - begun
    record_property("first_frame", first)
    print(f"first frame after {first:.2f} s, all after {seconds:.2f} s")
    lab.settle()
    assert lab.python("len(theatre.frames)") == 16 and lab.python("theatre.canvas.message") == ""
    assert seen_states(grid, 4, 4) == [
        1 if state == 1 else None for state in lab.python("theatre.canvas.states()")
    ]
    theatre.get_by_role("slider", name="Step").fill("6")
    lab.settle()
    seen, states = seen_states(grid, 4, 4), lab.python("theatre.canvas.states()")
    assert [state or None for state in seen] == [1 if s == 1 else None for s in states]
    assert [state == 0 for state in seen] == [s == 0 for s in states]
    code = theatre.locator("code").text_content()
    same = f"bool(({code} == theatre.frames[-1].images()).all())"
    assert lab.python(
        f"(__import__('builtins').exec('import torch; from mar_mini import "
        f"load_pretrained', globals()), {same})[1]"
    )


def test_stop_ends_a_running_generation(lab):
    theatre = lab.widget(1)
    lab.python("setattr(theatre._sampling_steps, 'value', 250)")
    theatre.get_by_role("button", name="Generate", exact=True).click()
    lab.until("len(theatre.frames) > 0 and theatre._generation.running")
    theatre.get_by_role("button", name="Stop", exact=True).click()
    lab.until("not theatre._generation.running")
    count = lab.python("len(theatre.frames)")
    assert 0 < count < 16
    alert = theatre.get_by_role("alert")
    alert.wait_for()
    assert alert.text_content() == f"stopped after step {count} of 16"
    lab.python("setattr(theatre._sampling_steps, 'value', 50)")


def test_painting_changes_the_tokens_under_the_brush_and_no_other(lab):
    grid, inpainter = lab.grid(2), lab.widget(2)
    drag(lab.page, grid, [(1, 1), (2, 1), (2, 2)], 4, 4)
    lab.settle()
    assert [i for i, x in enumerate(lab.python("inpainter.canvas.mask")) if x] == [5, 6, 10]
    assert [state == 0 for state in seen_states(grid, 4, 4)] == [i in (5, 6, 10) for i in range(16)]
    inpainter.get_by_role("button", name="Fill the hole").click()
    lab.until("not inpainter._generation.running and len(inpainter.frames) == 3")
    changed = "(inpainter.frames[-1].tokens[0] != inpainter.tokens[0]).any(1)"
    assert lab.python(f"{changed}.nonzero().flatten().tolist()") == [5, 6, 10]
    inpainter.get_by_role("button", name="Go on from this").click()
    lab.settle()
    assert lab.python("inpainter.canvas.mask") == [False] * 16
    assert seen_states(grid, 4, 4) == [None] * 16


def test_every_control_can_be_pressed(lab):
    for number in range(3):
        widget = lab.widget(number)
        for select in widget.locator("select").all():
            for option in select.locator("option").all_text_contents():
                select.select_option(option)
        for slider in widget.locator(".widget-slider [role=slider], .noUi-handle").all():
            slider.press("ArrowRight")
        for button in widget.get_by_role("button").all():
            if button.is_enabled() and "Upload" not in (button.text_content() or ""):
                button.click()
        lab.until("not (theatre._generation.running or inpainter._generation.running)", 60)
    lab.settle()
    messages = lab.python("[w.canvas.message for w in (explorer, theatre, inpainter)]")
    allowed = r"|stopped after step \d+ of \d+|nothing is painted yet.*"
    assert all(re.fullmatch(allowed, message) for message in messages)


def test_a_wrong_input_is_answered_in_the_widget(lab):
    lab.python("setattr(inpainter.canvas, 'mask', [False] * 16)")
    lab.widget(2).get_by_role("button", name="Fill the hole").click()
    alert = lab.widget(2).get_by_role("alert")
    alert.wait_for()
    assert "nothing is painted yet" in alert.text_content()


def test_closing_a_widget_ends_its_generation(lab):
    lab.python("(theatre.start(), theatre.close())")
    assert not lab.python("theatre._generation.running")
    assert lab.page.locator(".mar-grid").count() == 2


def test_a_chapter_goes_on_with_what_its_widget_holds(chromium, server):
    page, faults = driver.new_page(chromium, height=9000)
    chapter = Lab(page, faults)
    chapter.open(server, "06_masking.ipynb", canvases=1)
    chapter.until("'drawn' in globals()", 120)
    states = chapter.python("explorer.canvas.states()")
    assert seen_states(chapter.grid(0), 4, 4) == states
    assert chapter.python("bool((drawn == explorer.order).all())")  # what the model painted in
    assert page.locator(".jp-RenderedText[data-mime-type*=error]").count() == 0
    assert faults == []
    page.close()


def test_the_page_needs_no_code_no_other_host_and_a_token(chromium):
    with driver.app(port=8871) as url:
        page, faults = driver.new_page(chromium, height=2000)
        refused = page.request.get(url.split("?")[0], max_redirects=0)
        assert refused.status in (302, 403)
        page.goto(url)
        page.wait_for_function(
            "() => document.querySelectorAll('.mar-grid').length === 3", timeout=90_000
        )
        assert page.locator(".jp-CodeCell .jp-InputArea:visible").count() == 0
        page.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_function(
            "() => document.querySelectorAll('.mar-grid')[1].dataset.step === '16'", timeout=60_000
        )
        states = seen_states(page.locator(".mar-grid").nth(1), 4, 4)
        assert sorted(states, key=str) == [1] + [None] * 15
        assert faults == []
        page.close()
