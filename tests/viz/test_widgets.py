"""The widgets without a browser: what they compute, refuse, and leave as it was."""

import io
import threading
import time
from datetime import datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from mar_mini import load_pretrained, masking
from mar_mini.viz import GenerationTheatre, Inpainter, MaskOrderExplorer
from mar_mini.viz.app import write_page
from mar_mini.viz.canvas import TokenCanvas, turns_of
from mar_mini.viz.figures import KNOWN, MASKED, PREDICTED


@pytest.fixture(scope="module")
def digits():
    return load_pretrained("digits")


def diagonal(height, width, batch_size, generator=None):
    place = torch.arange(height * width)
    return (place // width + place % width).argsort(stable=True).expand(batch_size, -1)


# ---------------------------------------------------------------------- the canvas
@pytest.mark.parametrize("schedule", masking.SCHEDULES)
def test_the_canvas_shows_the_masks_of_the_order(schedule):
    explorer = MaskOrderExplorer("spiral", rows=5, columns=7, num_iter=9, schedule=schedule)
    counts = masking.tokens_per_step(35, 9, schedule)
    before = torch.ones(1, 35, dtype=torch.bool)
    for step in range(10):
        explorer.canvas.step = step
        mask = masking.mask_by_order(masking.make_order("spiral", 5, 7, 1), 35 - sum(counts[:step]))
        assert (explorer.mask == mask).all()
        states = torch.where(mask, 0, torch.where(before & ~mask, 1, 2))
        assert explorer.canvas.states() == states[0].tolist()
        before = mask


def test_the_still_picture_has_the_colours_of_the_states():
    explorer = MaskOrderExplorer("halton", rows=6, columns=4, num_iter=6)
    still, colours = explorer.canvas.still(), (MASKED, PREDICTED, KNOWN)
    cell = still.width // 4
    for place, state in enumerate(explorer.canvas.states()):
        y, x = divmod(place, 4)
        seen = still.getpixel((x * cell + cell // 2, y * cell + cell // 2))
        assert seen == ImageColor.getrgb(colours[state])


def test_a_picture_shows_through_what_is_known():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    explorer = MaskOrderExplorer("raster", rows=4, columns=4, num_iter=16, image=image)
    still = explorer.canvas.still()  # eight of sixteen steps: the upper half is known
    cell = still.width // 4
    seen = torch.tensor(still.getpixel((cell // 8, cell // 8)))
    assert (seen - (image[:, 0, 0] * 255).round()).abs().max() <= 1
    assert still.getpixel((cell // 8, 2 * cell + cell // 8)) == ImageColor.getrgb(MASKED)


def test_where_no_javascript_runs_there_is_a_picture_with_a_text(digits):
    for widget in (MaskOrderExplorer(), GenerationTheatre(digits).run()):
        data, metadata = widget._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert Image.open(io.BytesIO(data["image/png"])).width > 200
        assert metadata["image/png"]["alt"] == data["text/plain"]
        assert "tokens known" in data["text/plain"]


def test_a_course_is_saved_as_gif(tmp_path, digits):
    path = GenerationTheatre(digits, 3).run().save(tmp_path / "new" / "order.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 17
    with pytest.raises(ValueError, match="ends in .gif"):
        MaskOrderExplorer().save(tmp_path / "order.mp4")
    with pytest.raises(ValueError, match="nothing to save yet"):
        TokenCanvas(rows=4, columns=4).save(tmp_path / "none.gif")


def test_turns_of_a_part_leave_the_rest_known():
    assert turns_of([3, 0, 1], [1, 2], 4) == [1, 1, -1, 0]


# ---------------------------------------------------------------------- the explorer
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 80), max_size=90))
def test_whatever_is_drawn_is_a_permutation(drawn):
    explorer = EXPLORER
    explorer.canvas.drawn = drawn
    masking.check_order(explorer.order, 8, 8, 1)
    begun = list(dict.fromkeys(place for place in drawn if 0 <= place < 64))
    assert explorer.order[0, : len(begun)].tolist() == begun
    assert sum(explorer.tokens_per_step) == 64


EXPLORER = MaskOrderExplorer()
EXPLORER._choice.value = "drawn by hand"


def test_a_function_of_ones_own_is_played_and_offered():
    explorer = MaskOrderExplorer(diagonal, rows=4, columns=5)
    assert explorer._choice.value == "diagonal (yours)"
    assert (explorer.order == diagonal(4, 5, 1)).all()
    explorer._rows.value = 6
    assert explorer.order.shape == (1, 30) and len(explorer.canvas.turns) == 30


def test_the_grid_never_asks_for_more_steps_than_tokens():
    explorer = MaskOrderExplorer(rows=8, columns=8, num_iter=64)
    explorer._rows.value = 4
    assert explorer._num_iter.max == explorer._num_iter.value == 32
    assert explorer.canvas.message == "" and explorer.canvas.step <= explorer.canvas.steps == 32


def test_an_order_that_is_none_is_answered_in_the_widget():
    def broken(height, width, batch_size, generator=None):
        if height > 4:
            return torch.zeros(batch_size, height * width, dtype=torch.int64)
        return diagonal(height, width, batch_size)

    explorer = MaskOrderExplorer(broken, rows=4, columns=4, num_iter=4)
    explorer._rows.value = 5
    assert "not a permutation" in explorer.canvas.message
    explorer._choice.value = "raster"
    assert explorer.canvas.message == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"order": "zigzag"}, "unknown order 'zigzag'"),
        ({"rows": 3}, "rows is 3; expected 4 to 32"),
        ({"columns": 64}, "columns is 64; expected 4 to 32"),
        ({"num_iter": 65}, "num_iter is 65; expected 1 to 64"),
        ({"schedule": "square"}, "unknown schedule 'square'"),
        ({"order": lambda h, w, b, g=None: torch.zeros(b, h * w)}, "expected int64"),
    ],
)
def test_an_explorer_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        MaskOrderExplorer(**arguments)


# ---------------------------------------------------------------------- the theatre
@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", diagonal, diagonal(4, 4, 1).contiguous()])
def test_the_line_of_python_repeats_what_is_shown(digits, order):
    theatre = GenerationTheatre(digits, 5, seed=3, order=order)
    theatre._cfg.value, theatre._temperature.value, theatre._num_iter.value = 2.5, 0.8, 7
    theatre.run()
    assert theatre.canvas.message == "" and len(theatre.frames) == 7
    again = eval(theatre.code, {"pipeline": digits, "torch": torch, "diagonal": diagonal})
    assert (theatre.frames[-1].images() == again).all()
    by_name = GenerationTheatre("digits").run()
    assert by_name.code.startswith('load_pretrained("digits").generate([0], ')


def test_the_canvas_follows_the_frames(digits):
    theatre = GenerationTheatre(digits, 1).run()
    assert theatre.canvas.step == theatre.canvas.steps == 16
    for frame in theatre.frames:
        states = theatre.canvas.states(frame.step + 1)
        assert [state == 0 for state in states] == frame.mask[0].tolist()
        assert [state == 1 for state in states] == frame.predicted[0].tolist()
    assert sorted(theatre.canvas.pictures) == list(range(1, 17))


def slow(pipeline, seconds=0.05):
    """A pipeline whose steps take their time."""

    def sample(*arguments, **settings):
        for frame in pipeline.sample(*arguments, **settings):
            time.sleep(seconds)
            yield frame

    made = type(pipeline)(**{**vars(pipeline)})
    made.sample = sample
    return made


def test_stop_takes_effect_within_one_step(digits):
    theatre = GenerationTheatre(slow(digits))
    theatre.start()
    while len(theatre.frames) < 2:
        time.sleep(0.005)
    begun = time.perf_counter()
    theatre._stop.click()
    assert time.perf_counter() - begun < 0.5
    count = len(theatre.frames)
    assert count < 5 and not theatre._generation.running
    assert theatre.canvas.message == f"stopped after step {count} of 16"
    assert theatre._stop.disabled and not theatre._start.disabled
    time.sleep(0.15)
    assert len(theatre.frames) == count


def test_a_new_generation_ends_the_one_before(digits):
    theatre = GenerationTheatre(slow(digits, 0.01))
    theatre.start()
    theatre._label.value = 4
    theatre.run()
    assert len(theatre.frames) == 16 and theatre.canvas.message == ""
    assert ".generate([4]" in theatre.code


def test_closing_the_widget_ends_its_thread(digits):
    theatre = GenerationTheatre(slow(digits))
    theatre.start()
    assert any(thread.name == "generation" for thread in threading.enumerate())
    theatre.close()
    assert not any(thread.name == "generation" for thread in threading.enumerate())


def test_looking_back_is_not_disturbed_by_the_next_frame(digits):
    theatre = GenerationTheatre(slow(digits))
    theatre.start()
    while len(theatre.frames) < 4:
        time.sleep(0.005)
    theatre.canvas.step = 1
    theatre._generation.wait()
    assert theatre.canvas.step == 1 and len(theatre.frames) == 16


def test_a_generation_that_fails_says_so_in_the_widget(digits, monkeypatch):
    theatre = GenerationTheatre(digits)
    monkeypatch.setattr(digits.mar.diffloss, "sample", lambda *_, **__: 1 / 0)
    theatre.run()
    assert "division by zero" in theatre.canvas.message and not theatre._start.disabled


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"label": 10}, "label is 10; expected 0 to 9"),
        ({"order": "zigzag"}, "unknown order 'zigzag'"),
        ({"order": torch.zeros(1, 16, dtype=torch.int64)}, "not a permutation"),
    ],
)
def test_a_theatre_that_cannot_be_is_refused(digits, arguments, words):
    with pytest.raises(ValueError, match=words):
        GenerationTheatre(digits, **arguments)


# ---------------------------------------------------------------------- the inpainter
@pytest.fixture
def inpainter():
    return Inpainter("cifar10")


HOLE = [5, 6, 9, 10]


def paint(inpainter, places):
    inpainter.canvas.mask = [place in places for place in range(16)]


def test_known_tokens_stay_to_the_bit_and_the_hole_is_new(inpainter):
    paint(inpainter, HOLE)
    inpainter.run()
    assert inpainter.canvas.message == "" and len(inpainter.frames) == 4
    hole, tokens = inpainter.mask[0], inpainter.frames[-1].tokens[0]
    assert hole.nonzero().flatten().tolist() == HOLE
    assert (tokens[~hole] == inpainter.tokens[0, ~hole]).all()
    assert (tokens[hole] != inpainter.tokens[0, hole]).any(1).all()


def test_pixels_outside_the_hole_are_pasted_or_decoded(inpainter):
    paint(inpainter, HOLE)
    inpainter.run()
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[8:24, 8:24] = False
    assert (inpainter.result[:, outside] == inpainter.image[:, outside]).all()
    inpainter._paste.value = False
    decoded = inpainter.result[:, outside]
    assert 0 < (decoded - inpainter.image[:, outside]).abs().mean() < 0.05


def test_the_hole_is_undone_inverted_cleared_and_widened(inpainter):
    undo, invert, clear, widen = inpainter._edits
    undo.click()
    assert not inpainter.mask.any()
    paint(inpainter, [0])
    widen.click()
    assert inpainter.mask[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    invert.click()
    assert inpainter.mask.sum() == 12
    clear.click()
    assert not inpainter.mask.any()
    for count in (12, 4, 1, 0, 0):
        undo.click()
        assert inpainter.mask.sum() == count


def test_one_may_go_on_from_a_result(inpainter):
    assert inpainter._keep.disabled
    paint(inpainter, HOLE)
    inpainter.run()
    result, tokens = inpainter.result, inpainter.frames[-1].tokens
    inpainter._keep.click()
    assert (inpainter.image == result).all() and (inpainter.tokens == tokens).all()
    assert not inpainter.mask.any() and inpainter.result is None


@pytest.mark.slow
def test_everything_or_nothing_may_be_painted(inpainter):
    inpainter.run()
    assert "nothing is painted yet" in inpainter.canvas.message
    paint(inpainter, range(16))
    inpainter.run()
    assert inpainter.canvas.message == "" and len(inpainter.frames) == 16


def upload(inpainter, name, content):
    inpainter._upload.value = (
        {
            "name": name,
            "type": "image/png",
            "size": len(content),
            "content": content,
            "last_modified": datetime.now(),
        },
    )


def test_a_picture_of_ones_own_is_made_to_fit(inpainter):
    buffer = io.BytesIO()
    Image.new("L", (90, 60), 128).save(buffer, format="png")
    upload(inpainter, "grey.png", buffer.getvalue())
    assert inpainter.image.shape == (3, 32, 32) and inpainter.canvas.message == ""
    assert (inpainter.image * 255).round().unique().tolist() == [128]
    upload(inpainter, "cut.png", buffer.getvalue()[:40])
    assert "cut.png cannot be read as a picture" in inpainter.canvas.message
    assert inpainter.image.shape == (3, 32, 32)


@pytest.mark.slow
def test_a_picture_may_be_generated_first(inpainter):
    inpainter._invent.click()
    inpainter._generation.wait()
    made = inpainter.tokens
    assert not inpainter.mask.any() and inpainter.result is None
    paint(inpainter, HOLE)
    inpainter.run()
    hole = inpainter.mask[0]
    assert (inpainter.frames[-1].tokens[0, ~hole] == made[0, ~hole]).all()


def test_grey_pictures_are_painted_too():
    inpainter = Inpainter("digits")
    assert inpainter.image.shape == (1, 16, 16)
    paint(inpainter, [0, 1])
    inpainter.run()
    assert len(inpainter.frames) == 2 and inpainter.canvas.message == ""


def test_pictures_of_another_size_are_refused(digits):
    with pytest.raises(ValueError, match=r"expected \(N, 1, 16, 16\)"):
        Inpainter(digits, torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="expected `images` to paint on"):
        Inpainter(digits)


# ---------------------------------------------------------------------- the page
def test_the_page_is_a_notebook_of_the_three(tmp_path):
    text = write_page(tmp_path / "build" / "app.ipynb").read_text()
    for name in ("MaskOrderExplorer()", "GenerationTheatre(", "Inpainter("):
        assert name in text
