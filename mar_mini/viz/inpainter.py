"""A widget: paint over tokens of a picture and let a model fill the hole."""

import io

import ipywidgets
import torch
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from mar_mini.checkpoints import ImageFrame, Pipeline
from mar_mini.data import load_images, to_tensors
from mar_mini.run.images import center_crop
from mar_mini.viz.canvas import STYLE, WIDE, slider
from mar_mini.viz.theatre import GenerationTheatre

DATA = {"cifar10": "cifar10_mini", "digits": "digits"}  # model -> pictures to begin with
SEAM = """<details><summary>Why is there a seam?</summary>
The tokens outside the hole stay as they are, to the bit. Their pixels would not: an autoencoder
loses some detail, and it decodes the places beside the hole with a look at what is in it. Pasting
keeps the picture's own pixels outside, and where the two meet a seam may show. Widen the hole by
one ring: the tokens along its edge are then made to fit each other.</details>"""


class Inpainter(GenerationTheatre):
    """Brush over the tokens of a picture, choose a class, and generate what was painted.

    pipeline  a `Pipeline`, or the name of a trained model
    images    (N, C, H, W) float in [0, 1] to choose from; test images for a bundled model
    seed      of the generation

    `.mask` is the hole, `.tokens` and `.image` are the picture, `.result` is what became of it.
    Raises ValueError for images of another size than the model's.
    """

    label = "Picture"

    def __init__(
        self,
        pipeline: Pipeline | str = "cifar10",
        images: Float[Tensor, "N C H W"] | None = None,
        *,
        seed: int = 0,
    ):
        labels = None
        if images is None:
            if not isinstance(pipeline, str) or pipeline not in DATA:
                raise ValueError(f"expected `images` to paint on, or one of: {', '.join(DATA)}")
            pixels, labels = to_tensors(load_images(DATA[pipeline], "test"))
            images = pixels / 255
        self.images, self._labels = images, labels
        self._history: list[list[bool]] = []
        self._before: list[bool] = []  # the mask as it was last noted
        self._index = ipywidgets.BoundedIntText(
            0, 0, len(images) - 1, description="test image", style=STYLE, layout=WIDE
        )
        self._upload = ipywidgets.FileUpload(
            accept="image/*", description="Upload", tooltip="The middle of a picture of yours"
        )
        self._invent = ipywidgets.Button(
            description="Generate one", tooltip="Begin with a picture that the model makes"
        )
        self._brush = slider("brush (tokens)", 1, 1, 4)
        self._erase = ipywidgets.ToggleButton(
            description="Erase", tooltip="Brush takes tokens out of the hole"
        )
        edits = {
            "Undo": self._undo,
            "Invert": lambda: [not x for x in self.canvas.mask],
            "Clear": lambda: [False] * len(self.canvas.mask),
            "Widen by one ring": self._widened,
        }
        self._edits = [ipywidgets.Button(description=name, tooltip=name) for name in edits]
        for button, edit in zip(self._edits, edits.values(), strict=True):
            button.on_click(lambda _, edit=edit: self._change_mask(edit()))
        self._paste = ipywidgets.Checkbox(
            True, description="paste the picture's own pixels outside", indent=False, layout=WIDE
        )
        self._keep = ipywidgets.Button(
            description="Go on from this", disabled=True, tooltip="The result becomes the picture"
        )
        super().__init__(pipeline, seed=seed)
        mar = self.pipeline.mar
        blank = torch.zeros(1, mar.seq_len, mar.token_embed_dim)
        self.shape = tuple(self.pipeline.decode(blank).shape[1:])
        if tuple(images.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"images are {tuple(images.shape)}; expected (N, {wanted})")
        self._start.description = "Fill the hole"
        ipywidgets.jslink((self._brush, "value"), (self.canvas, "brush"))
        ipywidgets.jslink((self._erase, "value"), (self.canvas, "erase"))
        self._index.observe(lambda _: self._choose(), "value")
        self._upload.observe(self._uploaded, "value")
        self._invent.on_click(lambda _: self._generate_one())
        self._keep.on_click(lambda _: self._go_on())
        self._paste.observe(lambda _: self._redraw(), "value")
        self.canvas.observe(self._painted, "mask")
        self._choose()

    def _controls(self) -> list[ipywidgets.Widget]:
        row = ipywidgets.Layout(flex_flow="row wrap")
        with_vae = self.pipeline.vae is not None
        steering = [self._label, self._cfg, self._num_iter, self._sampling_steps, self._seed]
        return [
            self._index,
            ipywidgets.HBox([self._upload, self._invent], layout=row),
            self._brush,
            ipywidgets.HBox([self._erase, *self._edits], layout=row),
            *steering,
            *([self._paste] if with_vae else []),
            ipywidgets.HBox([self._start, self._stop, self._keep], layout=row),
            self._progress,
            *([ipywidgets.HTML(SEAM)] if with_vae else []),
        ]

    @property
    def mask(self) -> Bool[Tensor, "1 L"]:
        """The hole, bool (1, L), True = to be generated."""
        return torch.tensor([self.canvas.mask])

    @property
    def result(self) -> Float[Tensor, "C H W"] | None:
        """The picture with its hole filled, in [0, 1]; None before that."""
        return self.picture(self.frames[-1]) if self.frames else None

    def take(self, image: Float[Tensor, "C H W"], tokens: Tensor | None = None) -> None:
        """Make this the picture; its tokens are computed if they are not given."""
        self._generation.stop()
        self.image = image
        self.tokens = self.pipeline.encode(image[None]) if tokens is None else tokens
        self.frames, self._history, self._keep.disabled = [], [], True
        with self.canvas.hold_sync():
            self.canvas.mode, self.canvas.message = "paint", ""
            self.canvas.step = self.canvas.steps = 0
            self._before = [False] * self.pipeline.mar.seq_len
            self.canvas.mask = self._before
        self._redraw()

    # ------------------------------------------------------------------ pictures
    def _choose(self) -> None:
        if self._labels is not None:
            self._label.value = int(self._labels[self._index.value])
        self.take(self.images[self._index.value])

    def _uploaded(self, _) -> None:
        if not self._upload.value:
            return
        name, content = self._upload.value[0]["name"], self._upload.value[0]["content"]
        with self.complaints():
            try:
                with Image.open(io.BytesIO(content)) as picture:
                    pixels = center_crop(picture, self.shape[-1])
            except (UnidentifiedImageError, OSError, SyntaxError) as error:
                raise ValueError(f"{name} cannot be read as a picture; try PNG or JPEG") from error
            image = pixels / 255
            self.take(image if self.shape[0] == 3 else image.mean(0, keepdim=True))

    def _generate_one(self) -> None:
        """A picture that the model makes, to be painted on when it is finished."""
        with self.complaints():
            self._generation.stop()
            self._fill([True] * self.pipeline.mar.seq_len, becomes_picture=True)

    def _go_on(self) -> None:
        if self.frames and not self._generation.running:
            self.take(self.result, self.frames[-1].tokens)

    def _redraw(self) -> None:
        """Send the pictures of all steps again."""
        self.canvas.show_picture(self.image, 0)
        for frame in self.frames:
            self.canvas.show_picture(self.picture(frame), frame.step + 1)

    def picture(self, frame: ImageFrame) -> Tensor:
        """A frame's picture; outside the hole the picture's own pixels, if they are pasted."""
        image = frame.images()[0]
        if not self._paste.value or self.pipeline.vae is None:
            return image
        hole = self._hole.reshape(self.canvas.rows, -1)
        for dim, (side, tokens) in enumerate(zip(self.shape[1:], hole.shape, strict=True)):
            hole = hole.repeat_interleave(side // tokens, dim)
        return torch.where(hole, image, self.image)

    # ------------------------------------------------------------------ the hole
    def _painted(self, change) -> None:
        """A stroke has ended."""
        if change["new"] != self._before:
            self._history.append(self._before)
            self._before = change["new"]
            self.canvas.message = ""

    def _change_mask(self, mask: list[bool]) -> None:
        self.canvas.step = 0
        self.canvas.mask = mask

    def _undo(self) -> list[bool]:
        if self._history:
            self._before = self._history.pop()  # so that undoing is no stroke
        return self._before

    def _widened(self) -> list[bool]:
        grid = torch.tensor(self.canvas.mask).float().reshape(1, 1, self.canvas.rows, -1)
        return F.max_pool2d(grid, 3, stride=1, padding=1).bool().flatten().tolist()

    # ------------------------------------------------------------------ generation
    def start(self) -> None:
        """Generate what was painted, with the settings of the controls."""
        with self.complaints():
            self._generation.stop()
            if not any(self.canvas.mask):
                raise ValueError("nothing is painted yet: brush over the tokens to be replaced")
            self._fill(self.canvas.mask)

    def _fill(self, hole: list[bool], becomes_picture: bool = False) -> None:
        self._hole, self._becomes_picture = torch.tensor(hole), becomes_picture
        known = {} if all(hole) else {"tokens": self.tokens, "known": ~self._hole[None]}
        settings = self.settings()
        settings["num_iter"] = min(settings["num_iter"], sum(hole))
        self._keep.disabled = True
        self._begin(self._label.value, settings, self._seed.value, **known)
        self.canvas.show_picture(self.image, 0)

    def _on_end(self, reason: str) -> None:
        super()._on_end(reason)
        if reason:
            return
        if self._becomes_picture:
            self.take(self.result, self.frames[-1].tokens)
        else:
            self._keep.disabled = False
