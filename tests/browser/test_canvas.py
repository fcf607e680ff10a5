"""canvas.js alone, against a fake model in a blank page."""

import time
from pathlib import Path

import anywidget
import browser as driver
import pytest
from browser import drag
from conftest import seen_states

from mar_mini import masking
from mar_mini.viz import canvas as canvas_module
from mar_mini.viz.canvas import TokenCanvas, turns_of

# one browser for all
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("canvas")]
SCRIPT = Path(canvas_module.__file__).with_suffix(".js").read_text()
MODEL = """
class Model {
  constructor(state) { this.state = state; this.callbacks = {}; this.sent = []; this.saved = []; }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (JSON.stringify(this.state[name]) === JSON.stringify(value)) return;
    this.state[name] = value;
    this.saved.push(name);
    this.emit(`change:${name}`);
  }
  save_changes() {}
  send(content) { this.sent.push(content); }
  on(name, callback) { (this.callbacks[name] ??= []).push(callback); }
  off(name, callback) {
    this.callbacks[name] = (this.callbacks[name] ?? []).filter((one) => one !== callback);
  }
  emit(name, ...values) { for (const one of [...(this.callbacks[name] ?? [])]) one(...values); }
}
"""


@pytest.fixture
def blank(chromium):
    page, faults = driver.new_page(chromium)
    page.set_content("<div id='here' style='width: 600px'></div>")
    page.add_script_tag(content=MODEL)
    page.add_script_tag(content=SCRIPT.replace("export default { render };", ""))

    def show(state: TokenCanvas):
        inherited = set(anywidget.AnyWidget().trait_names(sync=True)) | {"_esm", "_css"}
        names = set(state.trait_names(sync=True)) - inherited
        values = {name: getattr(state, name) for name in names}
        page.evaluate(
            """(values) => {
              window.model = new Model(values);
              window.cleanup = render({ model, el: document.getElementById("here") });
            }""",
            values,
        )
        frame(page)
        return page.locator(".mar-grid")

    yield page, show
    assert faults == []
    page.close()


def frame(page):
    """Until what was asked for is drawn."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def model(page, name):
    return page.evaluate("(name) => model.get(name)", name)


def played(order="halton", rows=6, columns=8, num_iter=12, **values):
    places = masking.make_order(order, rows, columns, 1)[0].tolist()
    counts = masking.tokens_per_step(rows * columns, num_iter)
    turns = turns_of(places, counts, rows * columns)
    return TokenCanvas(rows=rows, columns=columns, turns=turns, steps=num_iter, **values)


def test_each_step_has_the_colours_of_its_states(blank):
    page, show = blank
    state = played()
    grid = show(state)
    for step in (*range(13), 5):
        page.evaluate("(step) => model.set('step', step)", step)
        frame(page)
        assert seen_states(grid, 6, 8) == state.states(step)
        counts = [state.states(step).count(kind) for kind in (2, 1, 0)]
        text = "{} known, {} predicted now, {} masked".format(*counts)
        assert page.locator(".mar-status").text_content() == f"step {step} of 12: {text}"
        assert text in grid.get_attribute("aria-label")


def test_given_tokens_are_known_from_the_start(blank):
    page, show = blank
    state = TokenCanvas(rows=4, columns=4, turns=[-1] * 8 + [0] * 4 + [1] * 4, steps=2)
    grid = show(state)
    assert seen_states(grid, 4, 4) == [2] * 8 + [0] * 8 == state.states(0)


def test_keys_and_buttons_move_through_time(blank):
    page, show = blank
    grid = show(played(step=4))
    grid.focus()
    for key, step in [
        ("ArrowRight", 5),
        ("ArrowDown", 6),
        ("ArrowLeft", 5),
        ("End", 12),
        ("ArrowRight", 12),
        ("Home", 0),
        ("ArrowUp", 0),
    ]:
        page.keyboard.press(key)
        assert model(page, "step") == step
    for label, step in [
        ("One step on", 1),
        ("One step on", 2),
        ("One step back", 1),
        ("To the beginning", 0),
    ]:
        page.get_by_role("button", name=label).click()
        assert model(page, "step") == step
    page.get_by_role("slider", name="Step").fill("7")
    assert model(page, "step") == 7
    box = page.locator(".mar-bars").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2.5 / 12, box["y"] + 5)
    assert model(page, "step") == 3


def test_playing_goes_to_the_end_and_begins_anew(blank):
    page, show = blank
    grid = show(played(step=9, speed=30.0))
    grid.focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play").wait_for()
    assert model(page, "step") == 12
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").click()
    assert model(page, "step") < 12


@pytest.mark.parametrize("side, wanted", [(16, 60), (32, 30)])
def test_frames_a_second_while_playing(blank, side, wanted, record_property):
    page, show = blank
    grid = show(played("random", side, side, 64, speed=12.0))
    page.get_by_role("button", name="Play").click()
    drawn, begun = int(grid.get_attribute("data-drawn")), time.perf_counter()
    time.sleep(2)
    rate = (int(grid.get_attribute("data-drawn")) - drawn) / (time.perf_counter() - begun)
    record_property("frames_per_second", rate)
    print(f"{side}x{side}: {rate:.1f} frames a second")
    assert rate > 0.75 * wanted  # the browser shares two cores with what else the tests run


def test_an_order_is_drawn_with_the_mouse_and_the_keys(blank):
    page, show = blank
    grid = show(TokenCanvas(rows=4, columns=6, mode="draw"))
    drag(page, grid, [(0, 0), (5, 0), (5, 2), (2, 2), (5, 2)], 4, 6)
    assert model(page, "drawn") == [0, 1, 2, 3, 4, 5, 11, 17, 16, 15, 14]
    assert page.locator(".mar-status").text_content() == "11 of 24 tokens drawn"
    frame(page)
    seen = seen_states(grid, 4, 6)
    assert seen[14] == 1 and [seen[place] for place in (0, 5, 15)] == [2, 2, 2] and seen[20] == 0
    grid.focus()
    page.keyboard.press("Backspace")
    for key in ("ArrowDown", "ArrowDown", "Space"):  # the first arrow shows the cursor
        page.keyboard.press(key)
    assert model(page, "drawn") == [0, 1, 2, 3, 4, 5, 11, 17, 16, 15, 6]


def test_tokens_are_painted_and_erased(blank):
    page, show = blank
    grid = show(TokenCanvas(rows=4, columns=4, mode="paint", brush=2, mask=[False] * 16))
    drag(page, grid, [(0, 0), (1, 0)], 4, 4)
    assert [i for i, x in enumerate(model(page, "mask")) if x] == [0, 1, 2, 4, 5, 6]
    frame(page)
    assert seen_states(grid, 4, 4) == [0, 0, 0, 2, 0, 0, 0] + [2] * 9
    page.evaluate("() => { model.set('erase', true); model.set('brush', 1); }")
    drag(page, grid, [(1, 0), (1, 1)], 4, 4)
    assert [i for i, x in enumerate(model(page, "mask")) if x] == [0, 2, 4, 6]
    grid.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert [i for i, x in enumerate(model(page, "mask")) if x] == [0, 1, 2, 4, 6]


def test_known_tokens_uncover_the_picture(blank):
    page, show = blank
    grid = show(played("raster", 4, 4, 16, step=8))
    page.evaluate(
        """() => {
          const rgb = new Uint8Array(3 * 64).map((_, i) => [200, 30, 90][i % 3]);
          model.emit("msg:custom", { kind: "picture", step: 3, width: 8, height: 8 }, [rgb]);
        }"""
    )
    frame(page)
    assert seen_states(grid, 4, 4) == [None] * 7 + [1] + [0] * 8
    page.evaluate("() => model.set('step', 2)")  # before the picture
    frame(page)
    assert seen_states(grid, 4, 4) == [2, 1] + [0] * 14


def test_a_message_is_shown_as_an_alert(blank):
    page, show = blank
    show(played(message="rows is 3; expected 4 to 32"))
    assert page.get_by_role("alert").text_content() == "rows is 3; expected 4 to 32"
    page.evaluate("() => model.set('message', '')")
    assert page.locator(".mar-message").is_hidden()


def test_a_page_that_comes_later_asks_for_the_pictures_and_goes_quietly(blank):
    page, show = blank
    grid = show(played())
    assert page.evaluate("() => model.sent") == [{"kind": "hello"}]
    page.get_by_role("button", name="Play").click()
    page.evaluate("() => cleanup()")
    drawn = grid.get_attribute("data-drawn")
    page.evaluate("() => model.set('step', 3)")
    frame(page)
    assert grid.get_attribute("data-drawn") == drawn
