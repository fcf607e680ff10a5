"""A widget: in which order are tokens predicted, and how many at a time?"""

import ipywidgets
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mar_mini import masking
from mar_mini.viz.canvas import STYLE, WIDE, Panel, TokenCanvas, slider, turns_of

BY_HAND = "drawn by hand"
SIDES = (4, 32)


class MaskOrderExplorer(Panel):
    """Play any order on a grid of tokens, or draw one.

    order          a name of `masking.ORDERS` or a function like those; both can be chosen later
    rows, columns  the grid, 4 to 32 each
    num_iter       in how many steps
    schedule       name of `masking.SCHEDULES`: how many tokens each step takes
    seed           of orders that draw lots
    image          (C, H, W) float in [0, 1]; known tokens uncover their part of it

    What it shows is in `.order`, `.mask` and `.tokens_per_step`. Raises ValueError for arguments
    that do not fit; later input that does not fit is answered in the widget.
    """

    def __init__(
        self,
        order: str | masking.Order = "random",
        *,
        rows: int = 8,
        columns: int = 8,
        num_iter: int = 16,
        schedule: str = "cosine",
        seed: int = 0,
        image: Float[Tensor, "C H W"] | None = None,
    ):
        for name, side in (("rows", rows), ("columns", columns)):
            if not SIDES[0] <= side <= SIDES[1]:
                raise ValueError(f"{name} is {side}; expected {SIDES[0]} to {SIDES[1]}")
        self.orders = dict(masking.ORDERS)
        if callable(order):
            name = f"{getattr(order, '__name__', 'function')} (yours)"
            self.orders[name], order = order, name
        masking.make_order(self.orders.get(order, order), rows, columns, 1)
        masking.masked_after(rows * columns, num_iter, schedule)
        self._choice = ipywidgets.Dropdown(
            options=[*self.orders, BY_HAND],
            value=order,
            description="order",
            style=STYLE,
            layout=WIDE,
        )
        self._rows = slider("rows", rows, *SIDES)
        self._columns = slider("columns", columns, *SIDES)
        self._num_iter = slider("num_iter (steps)", num_iter, 1, rows * columns)
        self._schedule = ipywidgets.Dropdown(
            options=list(masking.SCHEDULES),
            value=schedule,
            description="tokens per step",
            style=STYLE,
            layout=WIDE,
        )
        self._seed = ipywidgets.BoundedIntText(
            seed, 0, 2**31 - 1, description="seed", style=STYLE, layout=WIDE
        )
        self._speed = slider("steps per second", 4.0, 0.5, 30.0, 0.5)
        self._clear = ipywidgets.Button(
            description="Clear the drawing", tooltip="Forget the order drawn by hand"
        )
        self._clear.on_click(self._forget)
        help_text = ipywidgets.HTML(
            "Choose <i>drawn by hand</i>, then click and drag over the grid in your order. Keys: "
            "arrows and space; while drawing, Backspace takes the last token away."
        )
        super().__init__(
            TokenCanvas(label="Order of generation"),
            [
                self._choice,
                self._rows,
                self._columns,
                self._num_iter,
                self._schedule,
                self._seed,
                self._speed,
                self._clear,
                help_text,
            ],
        )
        ipywidgets.jslink((self._speed, "value"), (self.canvas, "speed"))
        if image is not None:
            self.canvas.show_picture(image)
        for control in (self._rows, self._columns):
            control.observe(self._resize, "value")
        for control in (self._choice, self._num_iter, self._schedule, self._seed):
            control.observe(self._update, "value")
        self.canvas.observe(self._update, "drawn")
        self._update()
        self.canvas.step = num_iter // 2

    @property
    def order(self) -> Int[Tensor, "1 L"]:
        """The order that is shown, int64 (1, L), first to last: a permutation.

        Of one drawn by hand, the tokens that were not reached follow row by row.
        """
        length = self._rows.value * self._columns.value
        if self._choice.value == BY_HAND:
            drawn = [place for place in self.canvas.drawn if 0 <= place < length]
            return torch.tensor([list(dict.fromkeys([*drawn, *range(length)]))])
        generator = torch.Generator().manual_seed(self._seed.value)
        function = self.orders[self._choice.value]
        return masking.make_order(function, self._rows.value, self._columns.value, 1, generator)

    @property
    def tokens_per_step(self) -> list[int]:
        """How many tokens each step predicts."""
        length = self._rows.value * self._columns.value
        return masking.tokens_per_step(length, self._num_iter.value, self._schedule.value)

    @property
    def mask(self) -> Bool[Tensor, "1 L"]:
        """What is still masked at the step that is shown, bool (1, L), True = masked."""
        known = sum(self.tokens_per_step[: self.canvas.step])
        order = self.order
        return masking.mask_by_order(order, order.shape[1] - known)

    def _resize(self, _) -> None:
        self.canvas.drawn = []  # places of another grid
        self._num_iter.max = self._rows.value * self._columns.value  # takes its value along
        self._update()

    def _forget(self, _) -> None:
        self.canvas.step = 0
        self.canvas.drawn = []

    def _update(self, _=None) -> None:
        """Bring the canvas up to date with the controls."""
        with self.complaints():
            order, counts = self.order[0].tolist(), self.tokens_per_step
            by_hand = self._choice.value == BY_HAND
            with self.canvas.hold_sync():
                if by_hand and self.canvas.mode != "draw":
                    self.canvas.step = 0
                self.canvas.rows, self.canvas.columns = self._rows.value, self._columns.value
                self.canvas.mode = "draw" if by_hand else "watch"
                self.canvas.turns = turns_of(order, counts, len(order))
                self.canvas.steps = len(counts)
                self.canvas.step = min(self.canvas.step, len(counts))
            self._clear.disabled = not (by_hand and self.canvas.drawn)
