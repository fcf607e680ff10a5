"""The token canvas: what the widgets have in common. Its other half is canvas.js."""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anywidget
import ipywidgets
import traitlets
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from mar_mini.files import write_atomically
from mar_mini.viz.figures import KNOWN, MASKED, PREDICTED, TARGET

HERE = Path(__file__).parent
STILL = 320  # pixels of the longer side of a still picture
STYLE = {"description_width": "130px"}
WIDE = ipywidgets.Layout(width="auto")


class TokenCanvas(anywidget.AnyWidget):
    """A grid of tokens: masked, predicted now and known ones, after so many of its steps.

    rows, columns  the grid; a place is row * columns + column
    turns          for each place the step (0 = first) that predicts it, -1 = known from the start
    steps, step    how many there are, and after how many of them the grid is shown
    speed          steps a second while playing
    mode           "watch"; "draw": clicks collect places in `drawn`; "paint": they change `mask`
    drawn          places in the order in which they were clicked
    mask           for each place, whether it is painted
    brush, erase   side of the square that paints, and whether it takes away
    message        shown in the widget: what is wrong with an input and what to do
    label          what the canvas shows, for screen readers
    """

    _esm = HERE / "canvas.js"
    _css = HERE / "canvas.css"

    rows = traitlets.Int(8).tag(sync=True)
    columns = traitlets.Int(8).tag(sync=True)
    turns = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.Int(0).tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    speed = traitlets.Float(4.0).tag(sync=True)
    mode = traitlets.Enum(["watch", "draw", "paint"], "watch").tag(sync=True)
    drawn = traitlets.List(traitlets.Int()).tag(sync=True)
    mask = traitlets.List(traitlets.Bool()).tag(sync=True)
    brush = traitlets.Int(1).tag(sync=True)
    erase = traitlets.Bool(False).tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    label = traitlets.Unicode("Tokens").tag(sync=True)
    colours = traitlets.List([MASKED, PREDICTED, KNOWN]).tag(sync=True)
    target = traitlets.Unicode(TARGET).tag(sync=True)

    def __init__(self, **values):
        self.pictures: dict[int, Image.Image] = {}
        super().__init__(**values)
        self.on_msg(self._answer)

    def _answer(self, _, content: dict, __) -> None:
        if content.get("kind") == "hello":
            for step in list(self.pictures):
                self._send_picture(step)

    def _send_picture(self, step: int) -> None:
        picture = self.pictures[step]
        content = {
            "kind": "picture",
            "step": step,
            "width": picture.width,
            "height": picture.height,
        }
        self.send(content, [picture.tobytes()])

    def show_picture(self, image: Float[Tensor, "C H W"], step: int = -1) -> None:
        """Let known tokens show their part of a picture in [0, 1].

        step  after which it is shown, until there is a later one; -1 = always
        """
        pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
        self.pictures[step] = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        self._send_picture(step)

    def clear_pictures(self) -> None:
        self.pictures.clear()
        self.send({"kind": "clear"})

    def play(self) -> None:
        """Start playing in every view."""
        self.send({"kind": "play"})

    def states(self, step: int | None = None) -> list[int]:
        """For each place 0 masked, 1 predicted in that step (None: the current one), 2 known."""
        step = self.step if step is None else step
        if self.mode == "paint" and step == 0:
            return [0 if painted else 2 for painted in self.mask]
        return [0 if turn >= step else 1 if turn == step - 1 >= 0 else 2 for turn in self.turns]

    def still(self, step: int | None = None) -> Image.Image:
        """What the canvas shows after a step, for where no JavaScript runs."""
        step = self.step if step is None else step
        cell = max(6, STILL // max(self.rows, self.columns))
        size = (cell * self.columns, cell * self.rows)
        shown = max((k for k in self.pictures if k <= step), default=None)
        base = Image.new("RGB", size, MASKED)
        if shown is not None:
            base = self.pictures[shown].resize(size, Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(base)
        for place, state in enumerate(self.states(step)):
            y, x = divmod(place, self.columns)
            box = (x * cell, y * cell, (x + 1) * cell - 2, (y + 1) * cell - 2)
            if state == 0 or shown is None:
                draw.rectangle(box, fill=self.colours[state])
            elif state == 1:
                draw.rectangle(box, outline=self.colours[1], width=max(2, cell // 16))
        return base

    def still_png(self) -> bytes:
        """`still` as PNG."""
        buffer = io.BytesIO()
        self.still().save(buffer, format="png", optimize=True)
        return buffer.getvalue()

    def save(self, path: str | Path, seconds: float = 5.0) -> Path:
        """Write the whole course as an animated GIF that takes about that long.

        Raises ValueError for another kind of file, or if there is nothing to play.
        """
        path = Path(path)
        if path.suffix.lower() != ".gif":
            raise ValueError(f"{path.name}: expected a name that ends in .gif")
        if not self.steps:
            raise ValueError("nothing to save yet; generate first, or draw an order")
        frames = [self.still(step) for step in range(self.steps + 1)]
        duration = max(40, math.ceil(1000 * seconds / len(frames)))
        pauses = [duration] * (len(frames) - 1) + [1500]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path,
            lambda temporary: frames[0].save(
                temporary,
                format="gif",
                save_all=True,
                append_images=frames[1:],
                duration=pauses,
                loop=0,
            ),
        )
        return path


class Panel(ipywidgets.HBox):
    """A canvas beside its controls; where no JavaScript runs, a still picture of the canvas."""

    def __init__(self, canvas: TokenCanvas, controls: list[ipywidgets.Widget]):
        self.canvas = canvas
        canvas.layout = ipywidgets.Layout(flex="0 1 450px", min_width="240px")
        layout = ipywidgets.Layout(flex="1 1 300px", max_width="460px", min_width="280px")
        super().__init__(
            [canvas, ipywidgets.VBox(controls, layout=layout)],
            layout=ipywidgets.Layout(
                flex_flow="row wrap", align_items="flex-start", grid_gap="16px"
            ),
        )

    def _repr_mimebundle_(self, **arguments):
        data = super()._repr_mimebundle_(**arguments)
        counts = [self.canvas.states().count(state) for state in (2, 1, 0)]
        alt = (
            f"{self.canvas.label} after step {self.canvas.step} of {self.canvas.steps}: "
            "{} tokens known, {} predicted in this step, {} masked".format(*counts)
        )
        return {**data, "image/png": self.canvas.still_png(), "text/plain": alt}, {
            "image/png": {"alt": alt}
        }

    def save(self, path: str | Path) -> Path:
        """Write what the canvas shows, from its first step to its last, as an animated GIF."""
        return self.canvas.save(path)

    @contextmanager
    def complaints(self) -> Iterator[None]:
        """Show what is wrong with an input in the widget, instead of raising it."""
        self.canvas.message = ""
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            self.canvas.message = str(error)


def turns_of(order: Iterable[int], counts: Iterable[int], length: int) -> list[int]:
    """For each place the step that predicts it; -1 for a place that the order does not name.

    order   places, first to last
    counts  tokens of each step
    """
    turns, places = [-1] * length, iter(order)
    for step, count in enumerate(counts):
        for _ in range(count):
            turns[next(places)] = step
    return turns


def slider(description: str, value, low, high, step=1, **arguments) -> ipywidgets.Widget:
    """A slider that reports when it is let go; whole numbers if `step` is one."""
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    return kind(
        value=value,
        min=low,
        max=high,
        step=step,
        description=description,
        continuous_update=False,
        style=STYLE,
        layout=WIDE,
        **arguments,
    )
